"""A copy of the source tree, and environments that see the installed dependencies and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = ("lit_symopt", "callbacks", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "Makefile", ".ci")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A virtual environment that borrows the dependencies of the running one, so that nothing is downloaded."""

    root: Path

    @property
    def scripts(self) -> Path:
        return self.root / "bin"

    @property
    def site_packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", vars={"base": str(self.root), "platbase": str(self.root)}))

    def call(self, *command: str, cwd: Path, **variables: str) -> str:
        """Run a program of this environment and return what it printed; a non-zero exit fails the test."""
        inherited = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
        done = subprocess.run(
            [str(self.scripts / command[0]), *command[1:]],
            cwd=cwd,
            env=inherited | variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def python(self, code: str, *, cwd: Path, **variables: str) -> str:
        """Run Python statements and return what they printed."""
        return self.call("python", "-c", code, cwd=cwd, **variables).strip()

    def install(self, *what: str, cwd: Path) -> None:
        """Install without an index, without dependencies and without build isolation."""
        offline = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
        self.call("python", "-m", "pip", "install", *offline, *what, cwd=cwd)


@pytest.fixture
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """A fresh environment in which lit_symopt is not installed."""
    made = Environment(root=tmp_path / "environment")
    venv.create(made.root, symlinks=True)
    # A path that comes from a .pth file is only put on sys.path: an editable lit-symopt of the running environment,
    # a .pth file itself, is not followed.
    borrowed = [entry for entry in sys.path if Path(entry).name in {"site-packages", "dist-packages"}]
    (made.site_packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    return made


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a clone holds of the package, links as links, without caches: a test may write to it."""
    root = tmp_path / "tree"
    root.mkdir()
    for name in SHIPPED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, root / name)
    return root
