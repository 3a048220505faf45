"""The record of a profile: what it keeps of the runs, and what it refuses to read."""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path

import pytest

from lit_symopt.errors import ProfileError
from lit_symopt.profiling.costs import UNATTRIBUTED, Cost, StepCosts, TraceCosts
from lit_symopt.profiling.record import Record, StackRecord
from lit_symopt.profiling.run import MemoryUse, RunProfile, Work
from lit_symopt.profiling.samples import OTHERS
from tests.profiling.records import record_of, stack_of


def step(number: int, *, router: float, loose: float = 0.0, forward: float = 100.0) -> StepCosts:
    """A step with two kernels of the router, something unattributed, and a forward pass."""
    in_router = {"stage": "optimizer", "role": "router", "rule": "row_norm", "phase": "rule", "calls": 1.0}
    costs = [
        Cost(**in_router, kernel="aten::mul", device_us=router / 4, host_us=router),  # type: ignore[arg-type]
        Cost(**in_router, kernel="aten::norm", device_us=router * 3 / 4, host_us=router),  # type: ignore[arg-type]
        Cost(stage="forward", kernel="aten::mm", calls=1.0, device_us=forward, host_us=forward),
    ]
    if loose:
        costs.append(
            Cost(stage="optimizer", role=UNATTRIBUTED, kernel="aten::add", calls=1, device_us=loose, host_us=loose)
        )
    return StepCosts(step=number, wall_us=1000.0, update_us=router + loose, costs=tuple(costs))


def run(*windows: tuple[StepCosts, ...], rank: int = 0) -> RunProfile:
    return RunProfile(
        optimizer="symmetric",
        rank=rank,
        world=2,
        device={"type": "cpu", "name": "here", "threads": 1},
        windows=tuple(TraceCosts(device="cpu", worker=f"rank{rank}", steps=steps) for steps in windows),
        work=(Work(role="router", rule="row_norm", flops=8.0, bytes=16.0, dtype="float32", blocks=1, elements=4),),
        memory=(MemoryUse(rank=0, parameters=1, gradients=1, masters=0, state={}, scratch=None, peak=None),),
    )


def test_samples_are_microseconds_by_round_window_and_step() -> None:
    one, other = run((step(1, router=10.0), step(2, router=20.0)), (step(3, router=30.0),)), run((step(1, router=5.0),))
    found = StackRecord.of([[one], [other]])
    assert found.blocks == {"router/row_norm": (((10.0, 20.0), (30.0,)), ((5.0,),))}
    assert found.stages["forward"] == (((100.0, 100.0), (100.0,)), ((100.0,),))
    assert found.control == {"aten::mm": found.stages["forward"]}
    assert found.stages["optimizer"] == found.blocks["router/row_norm"]
    assert found.wall == (((1000.0, 1000.0), (1000.0,)), ((1000.0,),))
    assert found.update == (((10.0, 20.0), (30.0,)), ((5.0,),))
    assert found.work[0]["flops"] == 8.0
    assert found.memory[0]["parameters"] == 1


def test_the_control_is_forward_and_backward_by_their_costliest_kernels_and_the_others() -> None:
    costs = tuple(
        Cost(stage="backward", kernel=f"aten::op{us}", calls=1, device_us=us, host_us=us) for us in range(1, 21)
    )
    found = StackRecord.of([[run((StepCosts(step=1, wall_us=1.0, update_us=0.0, costs=costs),))]])
    assert list(found.control) == [*(f"aten::op{us}" for us in range(20, 8, -1)), OTHERS]
    assert found.control["aten::op20"] == (((20.0,),),)
    assert found.control[OTHERS] == (((sum(range(1, 9)),),),)


def test_samples_of_several_ranks_are_means_over_the_steps_that_all_have() -> None:
    ranks = [
        run((step(1, router=10.0), step(2, router=20.0)), rank=0),
        run((step(1, router=30.0),), (step(3, router=1.0),), rank=1),
    ]
    assert StackRecord.of([ranks]).blocks == {"router/row_norm": (((20.0,),),)}


def test_the_attributed_share_is_of_the_device_time_of_the_update() -> None:
    found = StackRecord.of([[run((step(1, router=30.0, loose=10.0),))], [run((step(1, router=60.0),))]])
    assert found.attributed_share == 0.9
    assert found.blocks[f"{UNATTRIBUTED}/"] == (((10.0,),), ((0.0,),))


def test_a_run_without_a_whole_step_is_refused() -> None:
    with pytest.raises(ProfileError, match="round 2 measured no whole step"):
        StackRecord.of([[run((step(1, router=1.0),))], [run(())]])


def test_a_record_is_read_as_it_was_written_to_a_tenth_of_a_microsecond(tmp_path: Path) -> None:
    record = record_of({"symmetric": stack_of({"router/row_norm": 1234.56}, attributed_share=float("nan"))})
    record.save(tmp_path)
    found = Record.load(tmp_path)
    assert isnan(found.stacks["symmetric"].attributed_share)
    assert found.stacks["symmetric"].blocks["router/row_norm"][0][0][0] == pytest.approx(1234.56, abs=0.05)
    assert {**vars(found), "stacks": None} == {**vars(record), "stacks": None}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_record_of_six_stacks_stays_small_enough_for_git(tmp_path: Path) -> None:
    blocks = {f"role_{number}/spectral": 1234.5 * number for number in range(1, 16)}
    stack = stack_of(blocks, rounds=3, windows=4, steps=6)
    record_of({"symmetric": stack, **{f"stack_{number}": stack for number in range(5)}}).save(tmp_path)
    assert (tmp_path / "summary.json").stat().st_size < 300_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "not the whole summary of a profile"),
        (lambda text: "[]", "not the summary of a profile"),
        (lambda text: '{"loss": 3.0}', "not the summary of a profile"),
        (lambda text: text.replace('"format": 1', '"format": 99'), "another format than 1"),
        (lambda text: text.replace('"own": "symmetric"', '"own": "muon"'), "has no stack 'muon'"),
        (lambda text: text.replace('"wall": ', '"walls": '), "not the whole summary of a profile: 'wall'"),
        (lambda text: text.replace('"device": {', '"devices": {'), "not the whole summary of a profile"),
        (lambda text: text.replace("[500.0", "[-500.0"), "negative or not a number"),
        (lambda text: text.replace("[500.0, 500.0", "[500.0"), "not of the same steps"),
        (lambda text: text.replace('"forward"', '"forwards"'), "'forward'|same steps"),
        (lambda text: text.replace("[500.0", "[null"), "not the whole summary of a profile"),
        (lambda text: text.replace("[500.0", '["fast"'), "not the whole summary of a profile"),
    ],
)
def test_a_summary_that_is_truncated_or_foreign_is_refused(tmp_path: Path, change: object, message: str) -> None:
    record_of({"symmetric": stack_of({"router/row_norm": 500.0})}).save(tmp_path)
    path = tmp_path / "summary.json"
    changed = change(path.read_text())  # type: ignore[operator]
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(ProfileError, match=message) as caught:
        Record.load(tmp_path)
    assert str(path) in str(caught.value)


def test_a_summary_with_a_window_without_steps_is_refused(tmp_path: Path) -> None:
    record_of({"symmetric": stack_of({"router/row_norm": 500.0})}).save(tmp_path)
    value = json.loads((tmp_path / "summary.json").read_text())
    value["stacks"]["symmetric"]["wall"][0][0] = []
    (tmp_path / "summary.json").write_text(json.dumps(value))
    with pytest.raises(ProfileError, match="a round or a window has no steps"):
        Record.load(tmp_path)


def test_a_folder_that_is_no_record_is_refused_with_the_way_to_one(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"is not the folder of a record: .* lit-symopt profile makes one"):
        Record.load(tmp_path / "none")
