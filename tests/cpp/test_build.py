"""Compiling a library: once, for its source, compiler and processor, and with an error that helps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_symopt.cpp import build
from lit_symopt.errors import ConfigError
from tests.cpp.places import NEEDS_COMPILER


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path
    build.library.cache_clear()


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "lit-symopt" / "cpp").iterdir())


@NEEDS_COMPILER
def test_a_library_is_compiled_once_and_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.library("row_step")
    (made,) = kept(fresh)
    before = made.stat().st_mtime_ns
    build.library.cache_clear()
    build.library("row_step")
    assert [path.stat().st_mtime_ns for path in kept(fresh)] == [before]
    # With other flags it is another library.
    monkeypatch.setattr(build, "FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in build.FLAGS))
    build.library.cache_clear()
    build.library("row_step")
    assert len(kept(fresh)) == 2


@NEEDS_COMPILER
def test_processes_that_start_together_all_load_a_whole_library(fresh: Path) -> None:
    code = "from lit_symopt.cpp.build import library; print(library('row_step').row_step)"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert all("_FuncPtr" in one for one in said)
    assert len(kept(fresh)) == 1


def test_without_a_compiler_the_error_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(ConfigError, match=r"there is no 'no-such-compiler': install g\+\+.* or choose backend 'eager'"):
        build.library("row_step")


@NEEDS_COMPILER
def test_what_a_compiler_says_is_handed_on(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-fno-such-flag"))
    with pytest.raises(ConfigError, match=r"compiling row_step.cpp failed: (.|\n)*-fno-such-flag(.|\n)*install g\+\+"):
        build.library("row_step")
    assert kept(fresh) == []


def test_a_user_without_a_home_is_told_where_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match=r"to keep C\+\+ kernels in: Could not .* XDG_CACHE_HOME, or choose"):
        build.library("row_step")


def test_a_cache_that_cannot_be_written_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    monkeypatch.setenv("CXX", "true")
    with pytest.raises(ConfigError, match=r"kept in .*file/lit-symopt/cpp, .*XDG_CACHE_HOME"):
        build.library("row_step")
