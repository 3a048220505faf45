"""KernelTime on two processes (DDP, gloo): whose traces there are, and that nobody waits for anybody in vain."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.callbacks.moe import olmoe
from tests.callbacks.profiled import crossings, ranges, record, stages, steps, traces


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


@pytest.mark.parametrize(
    ("strategy", "partitions"),
    [
        pytest.param("zero2", {"masters"}, marks=pytest.mark.deepspeed),
        pytest.param("fsdp2", {"parameters", "gradients"}, marks=pytest.mark.slow),
    ],
)
def test_each_rank_says_what_its_part_of_the_update_costs(tmp_path: Path, strategy: str, partitions: set[str]) -> None:
    """DeepSpeed calls `SymOpt.step` once for each group, FSDP2 once; each rank holds half of the state."""
    assert run(tmp_path, strategy) == "trained"
    assert [path.name.partition(".")[0] for path in traces(tmp_path)] == ["rank0", "rank1"]
    whole = sum(parameter.numel() for parameter in olmoe().parameters())
    for rank, path in enumerate(traces(tmp_path)):
        assert steps(path) == [3, 4]
        assert crossings(path) == []
        found = ranges(path)
        assert {event.name for event in found} == {
            f"train/{stage}" for stage in ("data", "forward", "backward", "optimizer")
        }
        saved = record(tmp_path, rank)
        assert (saved.optimizer, saved.rank, saved.world) == ("symmetric", rank, 2)
        [window] = saved.windows
        for step in window.steps:
            [around] = ranges(path, f"ProfilerStep#{step.step}")
            calls = [
                event for event in ranges(path, "symopt/step") if around.start_us <= event.start_us < around.end_us
            ]
            assert len(calls) == (len(saved.work) if strategy == "zero2" else 1)
            assert step.update_us == pytest.approx(sum(event.duration_us for event in calls), rel=0.01)
            assert step.device_us(lambda cost: cost.in_update) == pytest.approx(step.update_us, rel=0.05)
            roles = {cost.role for cost in step.costs if cost.attributed}
            assert {work.role for work in saved.work} <= roles
        # Far from what is asked of one process: here many wait for a processor, between two ranges too.
        assert window.attributed_share > 0.3
    assert [sum(work.elements for work in record(tmp_path, rank).work) for rank in (0, 1)] == [whole // 2] * 2
    for memory in record(tmp_path).memory:
        assert {name: getattr(memory, name) for name in partitions} == dict.fromkeys(partitions, 4 * whole // 2)
        assert 4 * whole // 2 <= sum(memory.state.values()) < 4 * whole
