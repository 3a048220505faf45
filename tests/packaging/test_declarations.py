"""What pyproject.toml, constraints.txt and LICENSE say agrees with the code and with each other."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lit_symopt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture
def pyproject(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def constraints(repository: Path) -> list[Requirement]:
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def requirements(pyproject: dict[str, Any]) -> list[Requirement]:
    """Everything that is required, with or without an extra, other than the project itself."""
    project = pyproject["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    listed = [Requirement(line) for group in groups for line in group]
    return [required for required in listed if required.name != project["name"]]


def test_every_package_of_the_tree_is_listed(pyproject: dict[str, Any], repository: Path) -> None:
    folders = {path.parent.relative_to(repository) for path in repository.glob("lit_symopt/**/__init__.py")}
    folders |= {
        "lit_symopt" / path.parent.relative_to(repository) for path in repository.glob("callbacks/**/__init__.py")
    }
    assert set(pyproject["tool"]["setuptools"]["packages"]) == {".".join(folder.parts) for folder in folders}


def test_the_package_tells_the_version_of_the_project(pyproject: dict[str, Any]) -> None:
    assert lit_symopt.__version__ == pyproject["project"]["version"]


def test_every_requirement_has_one_exact_version_within_its_bounds(
    pyproject: dict[str, Any], constraints: list[Requirement]
) -> None:
    exact = {}
    for constraint in constraints:
        (pin,) = constraint.specifier
        assert pin.operator == "==", f"{constraint} is not an exact version"
        exact[canonicalize_name(constraint.name)] = pin.version
    assert len(exact) == len(constraints)
    for required in requirements(pyproject):
        assert required.specifier.contains(exact[canonicalize_name(required.name)]), str(required)


def test_constraints_name_no_local_version_and_no_host(constraints: list[Requirement]) -> None:
    # A local version such as 2.13.0+cpu exists on one index only.
    assert [str(constraint) for constraint in constraints if "+" in str(constraint.specifier) or constraint.url] == []


def test_lightning_excludes_the_two_malicious_uploads(pyproject: dict[str, Any]) -> None:
    (lightning,) = (required for required in requirements(pyproject) if required.name == "lightning")
    assert not any(lightning.specifier.contains(version) for version in ("2.6.2", "2.6.3"))


def test_license_is_the_published_text(repository: Path) -> None:
    # Oracle: the digest of https://www.apache.org/licenses/LICENSE-2.0.txt.
    digest = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert hashlib.sha256((repository / "LICENSE").read_bytes()).hexdigest() == digest
