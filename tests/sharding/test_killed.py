"""Runs of several ranks of which one is killed, in mid-training and in mid-save. Oracle: the run that nobody killed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from tests.sharding.processes import Outcome, Ranks, RanksFailed
from tests.sharding.trainer_runs import LAST, PLACES, fit, write_data, written_curve

pytestmark = pytest.mark.deepspeed

EVERY, KILLED_AT, KILLED_IN_SAVE = 4, 6, 8
PATIENCE = 60.0  # seconds for the others to end by themselves


@dataclass
class Story:
    """What happened to a run: killed after a step, killed in a save, and brought to its end.

    Attributes:
        oracle: what comes out of the run that nobody killed; `curve`: its losses.
        deaths: how the ranks ended, each time.
        victim: the rank that was killed.
        left: the checkpoints there were after each death, half-written ones too.
        finished: what the last resume brought.
        curve: the steps and losses that the three parts have written, in this order.
    """

    oracle: dict[str, Any]
    deaths: list[list[Outcome]]
    victim: int
    left: list[set[str]]
    finished: dict[str, Any]
    curve: list[tuple[int, float]]


# Rank 0 writes the only file of DDP, and leads where all ranks write.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("DDP of 2", 0), id="DDP"),
        pytest.param(("ZeRO 3 of 2", 1), id="ZeRO 3"),
        pytest.param(("ZeRO 2 of 3", 0), id="ZeRO 2", marks=pytest.mark.slow),
        pytest.param(("FSDP2 of 2", 0), id="FSDP2", marks=pytest.mark.slow),
        pytest.param(("FSDP2 of 2", 1), id="FSDP2, the other rank", marks=pytest.mark.slow),
    ],
)
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Story:
    place, victim = request.param
    whole, folder = (write_data(tmp_path_factory.mktemp(name)) for name in ("whole", "killed"))
    deaths, left = [], []
    with Ranks(PLACES[place][1], group=False, patience=PATIENCE) as ranks:
        oracle = ranks(fit, place, str(whole))[0]
        for options in (
            {"kill": {"rank": victim, "step": KILLED_AT}},
            {"kill_in_save": {"rank": victim, "step": KILLED_IN_SAVE}, "resume": "last"},
        ):
            with pytest.raises(RanksFailed) as failed:
                ranks(fit, place, str(folder), every=EVERY, **options)
            deaths.append(failed.value.outcomes)
            left.append({path.name for path in folder.iterdir()} - {"train.bin", "curve.jsonl"})
        # What a strategy would have left that writes in place.
        for partial in folder.glob(".*.partial"):
            partial.rename(folder / f"step={KILLED_IN_SAVE}.ckpt")
        finished = ranks(fit, place, str(folder), every=EVERY, resume="last")[0]
    return Story(oracle, deaths, victim, left, finished, written_curve(folder))


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(bool((one[name] == other[name]).all()) for name in one)


def test_the_others_stop_with_an_error(story: Story) -> None:
    for outcomes in story.deaths:
        for rank, outcome in enumerate(outcomes):
            if rank == story.victim:
                assert outcome.error == "the process ended with signal SIGKILL"
            else:
                assert outcome.error is not None
                assert "Traceback" in outcome.error  # and not that it had to be killed
                assert outcome.seconds < PATIENCE


def test_a_save_that_was_killed_leaves_nothing_that_looks_whole(story: Story) -> None:
    assert story.left[0] == {f"step={EVERY}.ckpt"}
    assert story.left[1] - {f".step={KILLED_IN_SAVE}.ckpt.partial"} == {f"step={EVERY}.ckpt"}


def test_the_last_whole_checkpoint_is_found_and_what_is_not_whole_is_passed_over(story: Story) -> None:
    assert story.finished["started_from"] == f"step={EVERY}.ckpt"
    partial = f".step={KILLED_IN_SAVE}.ckpt.partial" in story.left[1]
    assert partial or story.victim != 0  # rank 0 clears up unless it is killed itself
    assert len(story.finished["passed_over"]) == partial
    for reason in story.finished["passed_over"]:
        assert f"step={KILLED_IN_SAVE}.ckpt" in reason
        assert "use an earlier one" in reason


def test_the_run_ends_with_bitwise_the_weights_of_the_one_that_nobody_killed(story: Story) -> None:
    assert story.finished["step"] == LAST
    assert same_weights(story.finished["weights"], story.oracle["weights"])
    for key in ("rates", "schedule", "tokens", "consumed", "counts"):
        assert story.finished[key] == story.oracle[key], key


def test_the_curve_is_the_one_of_the_run_that_nobody_killed(story: Story) -> None:
    parts = [range(1, KILLED_AT + 1), range(EVERY + 1, KILLED_IN_SAVE + 1), range(EVERY + 1, LAST + 1)]
    assert [step for step, _ in story.curve] == [step for part in parts for step in part]
    assert all(loss == story.oracle["curve"][step] for step, loss in story.curve)
