"""The same numbers on every strategy: the core. Oracle: one process that accumulates the micro-batches of all ranks.

Twenty steps from the same weights, in fp32, every rank on micro-batches of its own; `test_parity_all.py` has the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.sharding.parity.cases import CONTROL, TOLERANCE, Case, Work, core
from tests.sharding.parity.claims import (
    Runs,
    agrees_with_one_process,
    keeps_its_share_of_state,
    moves_what_is_planned,
)
from tests.sharding.parity.oracle import oracle

pytestmark = pytest.mark.deepspeed
CASES = list(core())
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    with Runs() as started:
        yield started


@each_case
def test_twenty_steps_give_the_weights_of_one_process(runs: Runs, case: Case) -> None:
    agrees_with_one_process(runs(case), case)


@each_case
def test_a_rank_keeps_the_state_of_the_elements_it_holds(runs: Runs, case: Case) -> None:
    keeps_its_share_of_state(runs(case), case)


@each_case
def test_a_step_moves_the_bytes_of_the_plan(runs: Runs, case: Case) -> None:
    moves_what_is_planned(runs(case), case)


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_every_way_of_computing_an_update_is_among_the_cases(runs: Runs, strategy: str) -> None:
    reports = [runs(case)[0].report for case in CASES if case.strategy == strategy]
    taken = {route for report in reports if report for by_route in report.routes.values() for route in by_route}
    assert taken == {"local", "owner", "rows", "gram"}


# -- the harness itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero3", "fsdp2"])
def test_without_a_rule_of_ours_strategies_agree_with_the_oracle(runs: Runs, strategy: str) -> None:
    case = Case(work=Work(family="olmoe", stack=CONTROL), strategy=strategy)  # type: ignore[arg-type]
    agrees_with_one_process(runs(case), case)


def test_the_oracle_sees_when_one_rank_is_not_heard() -> None:
    # Half of the micro-batches: what averaging over too few ranks, or a lost exchange, would amount to.
    work = CASES[0].work
    whole, half = oracle(work), oracle(replace(work, micro_batches=1))
    for name in whole:
        assert (whole[name] - half[name]).norm() / whole[name].norm() > 100 * TOLERANCE, name
