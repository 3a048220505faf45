"""Trainer runs that are moved from every strategy into every other. Oracle: the run that stayed in one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_symopt.cli import main
from tests.sharding.processes import Ranks
from tests.sharding.trainer_runs import LAST, LENGTH, MICRO_BATCHES, PLACES, SAVED_AT, WINDOWS, fit, write_data

pytestmark = pytest.mark.deepspeed

TOLERANCE = 1e-5  # ‖ΔW‖/‖W‖ of every tensor
ALONE = "1 process"
SOURCES = [place for place in PLACES if place != "FSDP2 of 3"]
# Every source and every target once; the other pairs are slow.
CORE = {
    (ALONE, "ZeRO 1 of 2"),
    ("DDP of 2", "ZeRO 3 of 2"),
    ("ZeRO 1 of 2", "FSDP2 of 2"),
    ("ZeRO 2 of 3", ALONE),
    ("ZeRO 3 of 2", "DDP of 2"),
    ("FSDP2 of 2", "ZeRO 2 of 3"),
}
pairs = pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(*pair, marks=() if pair in CORE else pytest.mark.slow, id=" to ".join(pair))
        for pair in product(SOURCES, SOURCES)
    ],
)
each_source = pytest.mark.parametrize("source", SOURCES)


class Workplace:
    """Processes for every number of ranks, and one run of every strategy, saved on the way and trained to the end."""

    def __init__(self, folder: Path, ranks: Mapping[int, Ranks]) -> None:
        self._folder, self._ranks = folder, ranks
        self._unmoved: dict[str, dict[str, Any]] = {}
        self._short: dict[str, Any] | None = None

    def unmoved(self, place: str) -> dict[str, Any]:
        """What came out of the run that a place has saved and gone on with."""
        if place not in self._unmoved:
            folder = self._folder / place
            folder.mkdir(exist_ok=True)
            self._unmoved[place] = self.fit(place, str(write_data(folder)), every=SAVED_AT)
        return self._unmoved[place]

    def short_epochs(self, folder: str) -> dict[str, Any]:
        """What comes out of one process on short epochs; `folder` has their data."""
        if self._short is None:
            self._short = self.fit(ALONE, folder)
        return self._short

    def moved(self, place: str, checkpoint: Path) -> dict[str, Any]:
        """What comes out of a run that goes on from a checkpoint at a place."""
        folder = self._folder / f"into {place}"
        folder.mkdir(exist_ok=True)
        return self.fit(place, str(write_data(folder)), resume=str(checkpoint))

    def saved(self, place: str) -> Path:
        """The checkpoint of a place, as it was saved."""
        self.unmoved(place)
        return self._folder / place / f"step={SAVED_AT}.ckpt"

    def file(self, place: str) -> Path:
        """The checkpoint of a place, as an ordinary file."""
        saved = self.saved(place)
        if not saved.is_dir():
            return saved
        whole = self._folder / f"{place}.ckpt"
        if not whole.exists():
            assert main(["checkpoint", "consolidate", str(saved), str(whole)]) == 0
        return whole

    def fit(self, place: str, folder: str, **options: Any) -> dict[str, Any]:
        """`fit` on all ranks; they must agree."""
        found = self._ranks[PLACES[place][1]](fit, place, folder, **options)
        for one in found[1:]:
            assert {**one, "weights": None} == {**found[0], "weights": None}
            assert max(differences(one["weights"], found[0]["weights"]).values()) == 0.0
        first: dict[str, Any] = found[0]
        return first


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with ExitStack() as stack:
        ranks = {world: stack.enter_context(Ranks(world, group=False)) for world in (1, 2, 3)}
        yield Workplace(tmp_path_factory.mktemp("reshard"), ranks)


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """‖ΔW‖/‖W‖ of every tensor."""
    assert found.keys() == expected.keys()
    return {name: float((found[name] - weight).norm() / weight.norm()) for name, weight in expected.items()}


def assert_same_run(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    errors = differences(found["weights"], expected["weights"])
    assert max(errors.values()) <= TOLERANCE, errors
    for key in ("step", "rates", "schedule", "tokens", "consumed", "counts"):
        assert found[key] == expected[key], key
    for step, loss in found["curve"].items():
        assert loss == pytest.approx(expected["curve"][step], rel=TOLERANCE)


def test_the_run_that_stays_has_what_a_move_could_lose(work: Workplace) -> None:
    alone = work.unmoved(ALONE)
    assert alone["step"] == alone["schedule"] == LAST
    assert alone["consumed"] == LAST * MICRO_BATCHES * WINDOWS
    assert alone["tokens"] == alone["consumed"] * LENGTH
    assert alone["counts"] == {LAST}  # AdamW's, on matrices and vectors
    assert alone["rules"] >= {"spectral", "left_spectral", "row_norm", "adamw"}
    assert len(set(alone["rates"].values())) >= 3
    assert 0 < max(alone["rates"].values()) < 0.04  # the schedule has brought it down
    assert list(alone["curve"]) == list(range(1, LAST + 1))
    assert alone["curve"][LAST] < alone["curve"][1] - 0.2  # log 61 = 4.11


@each_source
def test_every_strategy_trains_the_run_of_one_process(work: Workplace, source: str) -> None:
    # Batches are accumulated: gradients divided by their number twice would show in AdamW's blocks.
    found = work.unmoved(source)
    assert_same_run(found, work.unmoved(ALONE))
    kind = source.split(" of ", maxsplit=1)[0]
    assert found["strategy"] == {ALONE: None, "DDP": "DDP", "FSDP2": "FSDP2"}.get(kind, f"DeepSpeed {kind}")


@pytest.mark.parametrize("source", ["DDP of 2", "ZeRO 1 of 2", "ZeRO 3 of 2", "FSDP2 of 2"])
def test_an_epoch_that_ends_amid_a_step_ends_it_on_every_strategy(work: Workplace, tmp_path: Path, source: str) -> None:
    # 22 micro-batches: three steps of six and one of four. Left to itself DeepSpeed fills up the fourth.
    folder = str(write_data(tmp_path, micro_batches=22))
    alone = work.short_epochs(folder)
    found = work.fit(source, folder)
    assert alone["consumed"] == (22 * (LAST // 4) + MICRO_BATCHES * (LAST % 4)) * WINDOWS
    assert_same_run(found, alone)


@pairs
def test_ten_steps_after_a_move_are_those_of_the_run_that_stayed(work: Workplace, source: str, target: str) -> None:
    found, alone = work.moved(target, work.file(source)), work.unmoved(ALONE)
    assert list(found["curve"]) == list(range(SAVED_AT + 1, LAST + 1))
    assert_same_run(found, alone)


@each_source
def test_on_the_same_strategy_and_ranks_what_it_saved_is_resumed_bitwise(work: Workplace, source: str) -> None:
    found, unmoved = work.moved(source, work.saved(source)), work.unmoved(source)
    assert work.saved(source).is_dir() == source.startswith(("ZeRO", "FSDP2"))
    assert max(differences(found["weights"], unmoved["weights"]).values()) == 0.0
    assert_same_run(found, unmoved)
    assert all(loss == unmoved["curve"][step] for step, loss in found["curve"].items())


def test_a_folder_of_fsdp2_is_resumed_on_another_number_of_ranks_as_it_is(work: Workplace) -> None:
    assert_same_run(work.moved("FSDP2 of 3", work.saved("FSDP2 of 2")), work.unmoved(ALONE))


def test_a_move_that_lost_the_momentum_would_show(work: Workplace, tmp_path: Path) -> None:
    checkpoint = torch.load(work.file("ZeRO 2 of 3"), weights_only=True)
    for state in checkpoint["optimizer_states"][0]["state"].values():
        for key in state.keys() - {"step"}:
            state[key].zero_()
    torch.save(checkpoint, tmp_path / "lost.ckpt")
    found, alone = work.moved(ALONE, tmp_path / "lost.ckpt"), work.unmoved(ALONE)
    assert max(differences(found["weights"], alone["weights"]).values()) > 100 * TOLERANCE
