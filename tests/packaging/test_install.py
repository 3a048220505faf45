"""`callbacks/` is imported as `lit_symopt.callbacks`: editable, from a wheel, and from a tree that is not installed."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.packaging.conftest import Environment

WHERE = "import lit_symopt.callbacks as callbacks; print(callbacks.__name__, callbacks.__file__)"


def where_callbacks_are(environment: Environment, *, cwd: Path, **variables: str) -> Path:
    """The resolved file that `import lit_symopt.callbacks` finds."""
    name, file = environment.python(WHERE, cwd=cwd, **variables).split(maxsplit=1)
    assert name == "lit_symopt.callbacks"
    return Path(file).resolve()


def elsewhere(tmp_path: Path) -> Path:
    """An empty folder to start from, so that the current folder does not help an import."""
    folder = tmp_path / "elsewhere"
    folder.mkdir(exist_ok=True)
    return folder


def package_files(tree: Path) -> set[str]:
    """The files a wheel has to hold: modules, py.typed and kernels in C++, with callbacks/ below lit_symopt/."""
    package = {path.relative_to(tree).as_posix() for path in (tree / "lit_symopt").rglob("*.py")}
    callbacks = {f"lit_symopt/{path.relative_to(tree).as_posix()}" for path in (tree / "callbacks").rglob("*.py")}
    kernels = {str(path.relative_to(tree)) for path in (tree / "lit_symopt").rglob("*.cpp")}
    return package | callbacks | kernels | {"lit_symopt/py.typed"}


def test_the_link_to_callbacks_is_relative_and_ends_in_the_tree(repository: Path) -> None:
    link = repository / "lit_symopt" / "callbacks"
    assert link.is_symlink()
    assert link.readlink() == Path("../callbacks")
    assert link.resolve() == repository / "callbacks"


def test_editable_callbacks_are_the_files_of_the_tree(environment: Environment, tree: Path, tmp_path: Path) -> None:
    environment.install("--editable", str(tree), cwd=tree)
    assert where_callbacks_are(environment, cwd=elsewhere(tmp_path)) == tree / "callbacks" / "__init__.py"
    assert "fit" in environment.call("lit-symopt", "--help", cwd=elsewhere(tmp_path))


def test_wheel_holds_the_package_once_and_no_tests(environment: Environment, tree: Path, tmp_path: Path) -> None:
    environment.call("python", "-m", "build", "--wheel", "--no-isolation", str(tree), cwd=tree)
    (wheel,) = (tree / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {name for name in names if ".dist-info/" not in name} == package_files(tree)
    assert any(name.endswith("licenses/LICENSE") for name in names)

    environment.install(str(wheel), cwd=tmp_path)
    installed = environment.site_packages / "lit_symopt" / "callbacks" / "__init__.py"
    assert where_callbacks_are(environment, cwd=elsewhere(tmp_path)) == installed
    assert "fit" in environment.call("lit-symopt", "--help", cwd=elsewhere(tmp_path))


def test_wheel_built_from_the_source_distribution_is_the_same(environment: Environment, tree: Path) -> None:
    expected = package_files(tree)
    environment.call("python", "-m", "build", "--no-isolation", str(tree), cwd=tree)
    (wheel,) = (tree / "dist").glob("*.whl")
    (source,) = (tree / "dist").glob("*.tar.gz")
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == expected
    with tarfile.open(source) as archive:
        assert any(name.endswith("/callbacks/__init__.py") for name in archive.getnames())


def test_uninstalled_callbacks_are_found_through_the_link(environment: Environment, tree: Path, tmp_path: Path) -> None:
    found = where_callbacks_are(environment, cwd=elsewhere(tmp_path), PYTHONPATH=str(tree))
    assert found == tree / "callbacks" / "__init__.py"
    printed = environment.call("python", "-m", "lit_symopt", "--help", cwd=elsewhere(tmp_path), PYTHONPATH=str(tree))
    assert "fit" in printed


def test_callbacks_are_imported_under_one_name_only(environment: Environment, tree: Path) -> None:
    # In the root of the tree `import callbacks` would load a second copy of every class. The package does not do so.
    code = "import sys, lit_symopt.callbacks; print([name for name in sys.modules if name.startswith('callbacks')])"
    assert environment.python(code, cwd=tree) == "[]"


@pytest.mark.parametrize(
    "statement",
    [
        "import lit_symopt",
        "from lit_symopt import SymOpt",
        "import lit_symopt.models",
        "import lit_symopt.backends",
        "import contextlib, os, lit_symopt.cli\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(open(os.devnull, 'w')):\n"
        "    lit_symopt.cli.main(['--help'])",
    ],
    ids=["lit_symopt", "SymOpt", "models", "backends", "--help"],
)
def test_import_is_light(environment: Environment, tree: Path, tmp_path: Path, statement: str) -> None:
    heavy = {"transformers", "deepspeed", "triton", "tensorboard", "lightning", "datasets", "matplotlib"}
    code = f"{statement}\nimport sys\nprint(sorted({heavy!r} & set(sys.modules)))"
    assert environment.python(code, cwd=elsewhere(tmp_path), PYTHONPATH=str(tree)) == "[]"
