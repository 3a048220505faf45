"""The same numbers on every strategy: everything that `test_parity.py` leaves out. `make parity` runs it.

Families × stacks × strategies, every rule, three ranks, clipping, accumulation and DeepSpeed's own settings. Oracle:
one process that accumulates the micro-batches of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest

from tests.sharding.parity.cases import (
    STRATEGIES,
    TOLERANCE,
    Case,
    Work,
    control,
    families_and_stacks,
    rules,
    settings,
    three_ranks,
)
from tests.sharding.parity.claims import (
    Runs,
    agrees_with_one_process,
    distances,
    keeps_its_share_of_state,
    moves_what_is_planned,
)
from tests.sharding.parity.oracle import oracle

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    with Runs() as started:
        yield started


def each(cases: Iterable[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", list(cases), ids=lambda case: case.name)


def holds(runs: Runs, case: Case) -> None:
    """All claims; the weights last, so that a plan that is not followed is said first."""
    found = runs(case)
    keeps_its_share_of_state(found, case)
    moves_what_is_planned(found, case)
    agrees_with_one_process(found, case)


@each(families_and_stacks())
def test_every_stack_on_every_family(runs: Runs, case: Case) -> None:
    holds(runs, case)


@each(rules())
def test_every_rule(runs: Runs, case: Case) -> None:
    holds(runs, case)


@each(three_ranks())
def test_three_ranks(runs: Runs, case: Case) -> None:
    holds(runs, case)


@each(settings())
def test_settings_of_a_strategy(runs: Runs, case: Case) -> None:
    holds(runs, case)


@pytest.mark.parametrize("work", dict.fromkeys(case.work for case in settings() if case.work.clip))
def test_clipping_is_felt(work: Work) -> None:
    off = distances(oracle(work), oracle(replace(work, clip=0.0)))
    assert max(off.values()) > 1000 * TOLERANCE  # vectors, by AdamW, do not feel it


@each(control())
def test_the_strategy_itself_without_a_rule_of_ours(runs: Runs, case: Case) -> None:
    agrees_with_one_process(runs(case), case)


WORKS = dict.fromkeys(
    case.work for case in (*families_and_stacks(), *rules(), *three_ranks(), *settings()) if case.strategy in STRATEGIES
)


@pytest.mark.parametrize("work", WORKS, ids=lambda work: f"{work.family} / {work.stack} / {work.micro_batches}")
def test_a_change_of_one_rounding_stays_below_the_tolerance_in_one_process(work: Work) -> None:
    # Otherwise a difference between strategies would say nothing about them: training itself would be chaotic.
    off = distances(oracle(work, nudge=6e-8), oracle(work))
    assert max(off.values()) <= TOLERANCE
