"""Built once, whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_symopt.data import StdlibCorpus
from lit_symopt.data.cache import build_folder, build_once, cache_root
from lit_symopt.errors import DataError


def write(folder: Path) -> None:
    (folder / "whole").write_text("yes")


def must_not_run(folder: Path) -> None:
    raise AssertionError("built twice")


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_the_cache_lies_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(tmp_path / "own") == tmp_path / "own"
    assert cache_root("~/own") == tmp_path / "own"
    assert cache_root() == tmp_path / "cache_home" / "lit-symopt"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_root() == tmp_path / ".cache" / "lit-symopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == tmp_path / ".cache" / "lit-symopt"


def test_a_folder_is_built_once(tmp_path: Path) -> None:
    folder = build_once("a", write, cache_dir=tmp_path / "cache")
    assert build_once("a", must_not_run, cache_dir=tmp_path / "cache") == folder
    assert visible(folder) == ["whole"]
    assert folder.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_build_that_fails_leaves_nothing_and_the_next_succeeds(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise KeyError("half way")

    with pytest.raises(KeyError):
        build_once("a", fail, cache_dir=tmp_path)
    assert visible(tmp_path) == []
    assert visible(build_once("a", write, cache_dir=tmp_path)) == ["whole"]


def test_what_a_killed_build_left_is_no_cache_and_is_removed(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, signal\n"
        "from lit_symopt.data.cache import build_once\n"
        "def build(folder):\n"
        "    (folder / 'half').write_text('')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"build_once('a', build, cache_dir={str(tmp_path)!r})\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == -9
    assert len(visible(tmp_path)) == 1
    assert visible(build_once("a", write, cache_dir=tmp_path)) == ["whole"]
    assert visible(tmp_path) == ["a"]


def test_a_folder_that_another_process_finished_first_is_kept(tmp_path: Path) -> None:
    """As on a file system whose locks do not work."""

    def overtaken(folder: Path) -> None:
        write(folder)
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "first").write_text("")

    assert visible(build_once("a", overtaken, cache_dir=tmp_path)) == ["first"]
    assert visible(tmp_path) == ["a"]


def test_two_processes_that_build_at_once_both_end_well(tmp_path: Path, cache_home: Path) -> None:
    script = (
        "from lit_symopt.data import StdlibCorpus\n"
        "data = StdlibCorpus(vocab_size=400, sequence_length=32, max_files=60)\n"
        "data.prepare_data(); data.setup()\n"
        "print(next(iter(data.train_dataloader()))['input_ids'].sum().item())\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    [folder] = visible(cache_home / "lit-symopt")
    assert visible(cache_home / "lit-symopt" / folder) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for data in (StdlibCorpus(max_files=5, cache_dir=str(tmp_path / "file" / "cache")), StdlibCorpus(max_files=5)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.raises(DataError, match=rf"cannot write .*{tmp_path}/file/.*cache_dir=.*XDG_CACHE_HOME"):
            data.prepare_data()


def test_a_disk_that_fills_up_during_the_build_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="No space left on device"):
        build_once("a", full, cache_dir=tmp_path)
    assert visible(tmp_path) == []


def test_a_damaged_cache_says_which_folder_to_remove(tmp_path: Path) -> None:
    data = StdlibCorpus(vocab_size=300, sequence_length=32, max_files=20, cache_dir=str(tmp_path))
    (data.folder / "meta.json").write_text("{")
    with pytest.raises(DataError, match=f"remove {data.folder}"):
        data.setup()


def test_an_output_folder_that_exists_is_never_written_into(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    build_folder(tmp_path / "out", write)
    with pytest.raises(DataError, match="out exists"):
        build_folder(tmp_path / "out", must_not_run)
    assert visible(tmp_path / "out") == ["whole"]
