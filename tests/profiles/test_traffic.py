"""The traffic record: how bytes are counted, and that its data, its plans and its page say the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lit_symopt import SymOpt, SymOptConfig
from profiles import traffic
from profiles.traffic_on_ranks import Case, Traffic
from tests.sharding.processes import Ranks, run_on_ranks


def collectives_on_a_rank() -> dict[str, int]:
    """What each kind of collective is counted as, for 30 elements of fp32 on three ranks."""
    world = dist.get_world_size()
    whole, part = torch.zeros(10 * world), torch.zeros(10)
    counted = {}
    calls: dict[str, Callable[[], Any]] = {
        "all-reduce": lambda: dist.all_reduce(whole),
        "all-gather": lambda: dist.all_gather_into_tensor(whole, part),
        "all-gather of lists": lambda: dist.all_gather(list(whole.split(10)), part),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "broadcast": lambda: dist.broadcast(whole, 0),
        "reduce": lambda: dist.reduce(whole, 0),
        "all-to-all": lambda: dist.all_to_all_single(torch.empty_like(whole), whole),
    }
    for name, call in calls.items():
        seen = Traffic()
        with seen.watching():
            call()
        counted[name] = sum(seen.sent.values())
    return counted


def test_collectives_are_counted_as_a_ring_sends_them() -> None:
    expected = {
        "all-reduce": 160,  # 2 · 120 · 2/3
        "all-gather": 80,  # 40 to two others, its own and one that it passes on
        "all-gather of lists": 80,
        "reduce-scatter": 80,  # 120 · 2/3
        "broadcast": 80,
        "reduce": 80,
        "all-to-all": 80,  # 40 to each of two others
    }
    assert run_on_ranks(collectives_on_a_rank, 3) == [expected] * 3


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2) as started:
        yield started


@pytest.mark.parametrize(
    "strategy",
    [
        "DDP",
        "FSDP2",
        pytest.param("ZeRO 2", marks=[pytest.mark.deepspeed, pytest.mark.slow]),
        pytest.param("ZeRO 3", marks=[pytest.mark.deepspeed, pytest.mark.slow]),
    ],
)
def test_a_step_sends_what_its_plan_says_and_what_is_planned_from_shapes_alone(ranks: Ranks, strategy: str) -> None:
    """The oracles are the collectives of a real step, and the plan made from the strategy's real partitions."""
    row = traffic._side_by_side(
        ranks("profiles.traffic_on_ranks:measure", Case(model="Qwen3", strategy=strategy, optimizer="muon"))
    )
    traffic.check(row)
    assert min(traffic.sent(row)) > 1e5
    optimizer = SymOpt.for_module(traffic.small_model("Qwen3"), config=SymOptConfig(stack="muon"))
    plans = traffic.plans_of(optimizer, strategy=strategy, world=2, device_type="cpu")
    sent = [sum(by_rank[rank] for plan in plans for by_rank in plan.sent().values()) for rank in range(2)]
    assert sent == [sum(moved for role, moved in rank.items() if role != "finite check") for rank in row["planned"]]


def test_everything_measured_agrees_with_its_plan_or_formula() -> None:
    measured = traffic._read("measured")
    for row in measured:
        traffic.check(row)
    moved = [row for row in measured if max(traffic.sent(row)) > 0]
    assert {row["strategy"] for row in moved} == set(traffic.STRATEGIES)


def test_the_pages_are_what_the_data_say() -> None:
    tables = [traffic._read(name) for name in ("measured", "planned", "timed")]
    for name, text in traffic.report(*tables).items():
        assert text == (traffic.RECORD / name).read_text()
