"""Copies on every rank as holdings. Oracle: what DDP is."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lit_symopt import SymOpt
from lit_symopt.bench.counting import scratch_bytes as allocated_by
from lit_symopt.errors import ConfigError, GradientError
from lit_symopt.sharding.attach import distribution_for
from lit_symopt.sharding.replicated import replicated_holding
from tests.sharding.processes import Ranks, run_on_ranks


def copies() -> list[object]:
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    optimizer = SymOpt(ddp.module.named_parameters(), rule="adamw")
    distribution = distribution_for(optimizer, ddp.process_group)
    assert distribution is not None
    assert distribution.finite() is None
    assert [holding.tensor for holding in distribution.holdings] == optimizer.param_groups[0]["params"]
    for holding in distribution.holdings:
        (segment,), (placement,) = holding.segments, holding.placements
        assert (segment.start, segment.stop, segment.offset) == (0, holding.tensor.numel(), 0)
        assert placement.shape == tuple(holding.tensor.shape)
        assert placement.held == ((0, holding.tensor.numel()),) * 2
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    elsewhere = dist.new_group([0])  # rank 1 is not in it
    try:
        distribution_for(optimizer, elsewhere)
        refused = ""
    except ConfigError as error:
        refused = str(error)
    return [
        distribution.strategy,
        distribution.world,
        distribution.rank,
        [holding.key for holding in distribution.holdings],
        distribution_for(optimizer, alone),
        refused,
    ]


def test_every_rank_holds_all_of_every_block_and_one_rank_alone_shares_nothing() -> None:
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    (first, second) = run_on_ranks(copies, 2)
    assert first[:5] == ["DDP", 2, 0, names, None]
    assert second[:5] == ["DDP", 2, 1, names, None]
    assert first[5] == ""  # alone in its group
    assert "process group" in second[5]


def test_a_sharded_parameter_is_no_copy() -> None:
    parameter = nn.Linear(2, 2).weight
    parameter.ds_shape = (4, 2)  # type: ignore[attr-defined]  # what DeepSpeed marks its partitions with
    with pytest.raises(ConfigError, match=r"'w' is partitioned by DeepSpeed.*deepspeed\.initialize"):
        replicated_holding("w", parameter, world=2)


# ---- whole steps of row_norm

EMBEDDING = (2048, 512)
OTHERS = {"head": (96, 64), "up": (64, 96), "norm": (64,)}


def trainee(**options: Any) -> SymOpt:
    """An embedding among matrices whose update the ranks share, each group with a role of its own."""
    shapes = {"embedding": EMBEDDING, **OTHERS}
    generator = torch.Generator().manual_seed(1)
    groups = []
    for name, shape in shapes.items():
        rule: dict[str, Any] = {"rule": "spectral"}
        if name == "embedding":
            rule = {"rule": "row_norm", "row_damping": 0.1, **options}
        elif name == "norm":
            rule = {"rule": "adamw"}
        parameter = nn.Parameter(torch.randn(shape, generator=generator))
        groups.append({"params": [(name, parameter)], "name": name, "role": name, **rule})
    return SymOpt(groups, lr=0.1, weight_decay=0.1)


def set_gradients(optimizer: SymOpt, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def weights_of(optimizer: SymOpt) -> list[torch.Tensor]:
    return [parameter.detach().clone() for group in optimizer.param_groups for parameter in group["params"]]


def beside_one_alone(options: dict[str, Any]) -> dict[str, Any]:
    """Steps on this rank together with the others, and the same alone."""
    alone, shared = optimizers = [trainee(**options), trainee(**options).attach(dist.group.WORLD)]
    for step in range(4):
        for optimizer in optimizers:
            set_gradients(optimizer, step)
            if step == 2:
                optimizer.param_groups[0]["params"][0].grad = None  # another plan, and the first one again after it
            optimizer.step()
    before = weights_of(shared)
    set_gradients(shared, 4)
    shared.param_groups[0]["params"][0].grad[5, 7] = torch.nan
    with pytest.raises(GradientError, match="'embedding'"):
        shared.step()
    report = shared.plan_report()
    return {
        "alone": weights_of(alone),
        "shared": weights_of(shared),
        "untouched": all(torch.equal(a, b) for a, b in zip(before, weights_of(shared), strict=True)),
        "routes": report.routes,
        "sent": report.sent,
        "work": report.work,
    }


def allocated_beside_one_alone() -> list[int | None]:
    found = []
    for optimizer in (trainee(), trainee().attach(dist.group.WORLD)):
        set_gradients(optimizer, 0)
        for group in optimizer.param_groups[1:]:
            group["params"][0].grad = None
        for _ in range(2):
            optimizer.step()
        found.append(allocated_by(optimizer.step, torch.device("cpu")))
    return found


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2) as started:
        yield started


@pytest.mark.parametrize("options", [{}, {"momentum_kind": "nesterov"}, {"centered": True}], ids=str)
def test_a_copy_of_an_embedding_takes_the_step_of_one_process_and_the_others_share_their_work(
    ranks: Ranks, options: dict[str, Any]
) -> None:
    for result in (results := ranks(beside_one_alone, options)):
        assert torch.equal(result["shared"][0], result["alone"][0])
        assert not torch.equal(result["shared"][0], weights_of(trainee())[0])
        for shared, alone in zip(result["shared"], result["alone"], strict=True):
            torch.testing.assert_close(shared, alone)
        assert result["untouched"]
    first, second = results
    assert all(torch.equal(a, b) for a, b in zip(first["shared"], second["shared"], strict=True))
    assert first["routes"] == {"embedding": {"local": 1}, "head": {"owner": 1}, "up": {"owner": 1}}
    assert first["sent"]["embedding"] == [0, 0]
    assert sum(first["sent"]["head"]) == sum(first["sent"]["up"]) == 96 * 64 * 4
    assert first["work"] == [prod(EMBEDDING) + 96 * 64 * 64] * 2


def test_a_copy_of_an_embedding_needs_no_more_memory_than_in_one_process(ranks: Ranks) -> None:
    for alone, shared in ranks(allocated_beside_one_alone):
        assert alone is not None
        assert shared <= alone + 4096  # of the flags on which the ranks agree
        assert shared < prod(EMBEDDING)  # a quarter of it
