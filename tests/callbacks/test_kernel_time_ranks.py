"""KernelTime on two processes (DDP, gloo): whose traces there are, and that nobody waits for anybody in vain."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.callbacks.profiled import record, stages, steps, traces


def run(folder: Path, case: str) -> str:
    subprocess.run(
        [sys.executable, "-m", "tests.callbacks.kernel_time_on_ranks", str(folder), case],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )
    return (folder / "ended").read_text()


def test_two_ranks_write_two_traces_which_tensorboard_shows_as_two_workers(tmp_path: Path) -> None:
    equal = run(tmp_path, "all")
    assert equal == "True"  # weights, to those of a run without the callback
    folder = tmp_path / "run" / "version_0"
    found = traces(tmp_path)
    assert [path.name.partition(".")[0] for path in found] == ["rank0", "rank1"]
    assert {path.parent for path in found} == {folder / "traces"}
    records = [record(folder, rank) for rank in (0, 1)]
    for rank, (path, saved) in enumerate(zip(found, records, strict=True)):
        assert steps(path) == [3, 4]
        assert stages(path) == ["data", "optimizer", "forward", "backward"] * 2
        assert (saved.rank, saved.world, saved.windows[0].worker) == (rank, 2, f"rank{rank}")
        assert [memory.rank for memory in saved.memory] == [0, 1]
        assert saved.work
    assert records[0].ceilings == records[1].ceilings != None  # noqa: E711  # measured once

    loader = pytest.importorskip("torch_tb_profiler.profiler.loader")
    io = pytest.importorskip("torch_tb_profiler.io")
    with warnings.catch_warnings(), io.Cache() as cache:
        warnings.simplefilter("ignore")  # the plugin's own
        shown = loader.RunLoader("traces", str(folder / "traces"), cache).load()
    assert {worker for worker in shown.workers if worker != "All"} == {"rank0", "rank1"}


def test_a_rank_other_than_the_first_can_be_profiled_and_stops_all(tmp_path: Path) -> None:
    assert run(tmp_path, "one") == "stopped"
    [path] = traces(tmp_path)
    assert path.name.startswith("rank1.")
    assert steps(path) == [3, 4]
    assert [memory.rank for memory in record(tmp_path, 1).memory] == [0, 1]
    assert not (tmp_path / "kernel_time.rank0.json").exists()


def test_a_folder_that_one_rank_cannot_write_is_an_error_on_all(tmp_path: Path) -> None:
    ended = run(tmp_path, "unwritable")
    assert ended.startswith("ProfileError: rank 1: the folder ")
    assert "folder of 1/traces for traces cannot be written" in ended
