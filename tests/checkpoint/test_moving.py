"""Checkpoints moved from every strategy into every other. The oracle is the run that was not moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_symopt.checkpoint import consolidate
from tests.checkpoint.runs import trained, went_on
from tests.sharding.processes import Ranks

SAVED_AT, LAST = 3, 13
PLACES = {
    "one": ("one", 1),
    "ddp of 2": ("ddp", 2),
    "zero1 of 2": ("zero1", 2),
    "zero2 of 3": ("zero2", 3),
    "zero3 of 2": ("zero3", 2),
    "fsdp2 of 2": ("fsdp2", 2),
}


class Workplace:
    """Processes for every number of ranks, and one run of every strategy, saved in the middle."""

    def __init__(self, folder: Path, ranks: Mapping[int, Ranks]) -> None:
        self.folder, self.ranks = folder, ranks
        self.unmoved = {place: self._train(place) for place in PLACES}

    def call(self, world: int, function: Any, *arguments: Any, **options: Any) -> dict[str, Tensor]:
        result: dict[str, Tensor] = (
            function(*arguments, **options) if world == 1 else self.ranks[world](function, *arguments, **options)[0]
        )
        return result

    def file(self, place: str) -> str:
        return str(self.folder / f"{place}.whole.ckpt")

    def _train(self, place: str) -> dict[str, Tensor]:
        strategy, world = PLACES[place]
        saved = self.folder / (place + (".ckpt" if world == 1 or strategy == "ddp" else ""))
        weights = self.call(world, trained, strategy, saved_at=SAVED_AT, path=str(saved), last=LAST)
        consolidate(saved, self.file(place))
        return weights


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with ExitStack() as stack:
        ranks = {world: stack.enter_context(Ranks(world)) for world in (2, 3)}
        yield Workplace(tmp_path_factory.mktemp("moving"), ranks)


def difference(moved: Mapping[str, Tensor], unmoved: Mapping[str, Tensor]) -> dict[str, float]:
    """‖ΔW‖/‖W‖ of every tensor."""
    return {name: float((moved[name] - weight).norm() / weight.norm()) for name, weight in unmoved.items()}


# Every place is left once and reached once; the other pairs are in the slow set.
CORE = dict(zip(PLACES, [*list(PLACES)[2:], *list(PLACES)[:2]], strict=True))
PAIRS = [
    pytest.param(source, target, marks=[] if CORE[source] == target else pytest.mark.slow)
    for source, target in product(PLACES, PLACES)
]


@pytest.mark.deepspeed
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_ten_steps_after_a_move_agree_with_the_run_that_was_not_moved(
    workplace: Workplace, source: str, target: str
) -> None:
    strategy, world = PLACES[target]
    moved = workplace.call(world, went_on, strategy, workplace.file(source), first=SAVED_AT, last=LAST)
    unmoved = workplace.unmoved[source]
    errors = difference(moved, unmoved)
    assert max(errors.values()) <= 1e-5, errors
    # The steps after the move did something that a lost momentum would change.
    before = torch.load(workplace.file(source), weights_only=True)["state_dict"]
    assert max(difference(unmoved, before).values()) > 1e-2


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("strategy", "world"),
    [
        ("zero0", 2),
        ("zero1", 2),
        ("zero2", 3),
        ("zero3", 2),
        ("bf16_optimizer", 2),
        ("bf16_zero2", 2),
        ("bf16_zero3", 2),
    ],
)
def test_back_on_the_same_strategy_it_is_bitwise_the_run_that_was_not_moved(
    workplace: Workplace, tmp_path: Path, strategy: str, world: int
) -> None:
    unmoved = workplace.call(world, trained, strategy, saved_at=SAVED_AT, path=str(tmp_path / "run"), last=LAST)
    file = consolidate(tmp_path / "run", tmp_path / "whole.ckpt")
    moved = workplace.call(world, went_on, strategy, str(file), first=SAVED_AT, last=LAST)
    assert all(torch.equal(moved[name], weight) for name, weight in unmoved.items())
