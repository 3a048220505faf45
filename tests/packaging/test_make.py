"""`make train`, `make test` and `.ci/run` do the set-up they promise; a stand-in for Python records what they call."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

# `PYTHON -m venv DIR` makes DIR/bin/python, a copy of this script, and the program that pip would install.
STAND_IN = """#!/bin/sh
echo "$@" >> "$LOG"
if [ "$2" = venv ]; then
  mkdir -p "$3/bin"
  cp "$0" "$3/bin/python"
  printf '#!/bin/sh\\necho lit-symopt "$@" >> "$LOG"\\n' > "$3/bin/lit-symopt"
  chmod +x "$3/bin/lit-symopt"
fi
if [ "$2" = pytest ]; then exit "${TESTS_EXIT:-0}"; fi
"""
INSTALL = "-m pip install --disable-pip-version-check --constraint constraints.txt"


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    script = tmp_path / "python"
    script.write_text(STAND_IN, encoding="utf-8")
    script.chmod(0o755)
    return script


def run(*command: str, tree: Path, stand_in: Path, **variables: str) -> tuple[int, list[str]]:
    """The exit code, and the calls that were made."""
    log = tree / "log"
    log.unlink(missing_ok=True)
    # What an outer `make test ARGS=...` was given must not reach the one under test.
    given = {"ARGS", "CONFIG", "JOBS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "VENV"}
    kept = {key: value for key, value in os.environ.items() if key not in given}
    environment = kept | {"PYTHON": str(stand_in), "LOG": str(log), "TMPDIR": str(tree / "tmp")} | variables
    (tree / "tmp").mkdir(exist_ok=True)
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, log.read_text(encoding="utf-8").splitlines() if log.exists() else []


def test_make_train_installs_torch_first_and_trains_the_quick_start(tree: Path, stand_in: Path) -> None:
    assert run("make", "train", tree=tree, stand_in=stand_in) == (
        0,
        [
            "-m venv .venv",
            f"{INSTALL} torch",
            f"{INSTALL} --editable .",
            "lit-symopt fit --config configs/quickstart.yaml",
        ],
    )


def test_nothing_is_installed_again_until_a_requirement_changes(tree: Path, stand_in: Path) -> None:
    train = "lit-symopt fit --config configs/quickstart.yaml"
    run("make", "train", tree=tree, stand_in=stand_in)
    assert run("make", "train", tree=tree, stand_in=stand_in) == (0, [train])
    later = (tree / ".venv" / ".train-installed").stat().st_mtime + 10
    os.utime(tree / "pyproject.toml", (later, later))
    assert run("make", "train", tree=tree, stand_in=stand_in) == (0, [f"{INSTALL} --editable .", train])


def test_make_study_installs_its_extra_and_runs_the_reduced_study(tree: Path, stand_in: Path) -> None:
    _, calls = run("make", "study", "ARGS=--jobs 3", tree=tree, stand_in=stand_in)
    study = "lit-symopt study --config configs/studies/reduced.yaml --jobs 3"
    assert calls[-2:] == [f"{INSTALL} --editable .[study]", study]


def test_make_test_uses_the_environment_it_is_given(tree: Path, stand_in: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    code, calls = run("make", "test", f"VENV={there}", tree=tree, stand_in=stand_in)
    assert code == 0
    assert calls[:3] == [f"-m venv {there}", f"{INSTALL} torch", f"{INSTALL} --editable .[dev]"]
    assert calls[3].startswith("-m pytest")
    assert not (tree / ".venv").exists()


def test_make_test_all_takes_no_marker_out(tree: Path, stand_in: Path) -> None:
    _, calls = run("make", "test-all", tree=tree, stand_in=stand_in)
    assert calls[-1].rstrip().endswith("-m")  # the stand-in prints the empty expression as nothing


@pytest.mark.parametrize("code", [0, 1])
def test_ci_fails_exactly_when_the_tests_fail_and_leaves_no_environment(tree: Path, stand_in: Path, code: int) -> None:
    exit_code, calls = run(str(tree / ".ci" / "run"), tree=tree, stand_in=stand_in, TESTS_EXIT=str(code))
    assert (exit_code != 0) == (code != 0)
    assert calls[-1].startswith("-m pytest")
    assert list((tree / "tmp").iterdir()) == []
    assert not (tree / ".venv").exists()
