"""Copies on every rank as holdings. Oracle: what DDP is."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lit_symopt import SymOpt
from lit_symopt.errors import ConfigError
from lit_symopt.sharding.attach import distribution_for
from lit_symopt.sharding.replicated import replicated_holding
from tests.sharding.processes import run_on_ranks


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
