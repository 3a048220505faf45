"""Finding the strategy, and the check that all ranks have the same optimizer. Oracle: optimizers made different."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lit_symopt import Layout, SymOpt
from lit_symopt.errors import ConfigError
from lit_symopt.sharding.attach import distribution_for
from tests.sharding.processes import Ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2) as started:
        yield started


def groups(**changes: Any) -> list[dict[str, Any]]:
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4, bias=False))
    first = {"name": "first", "params": [("0.weight", net[0].weight)], "rule": "spectral", "layout": Layout.matrix()}
    second = {"name": "second", "params": [("0.bias", net[0].bias)], "rule": "adamw"}
    return [{**first, **changes}, second]


# What rank 1 does differently, and what the error says of it.
UNEQUAL: dict[str, tuple[dict[str, Any], str]] = {
    "rate": ({"lr": 0.5}, "group 'first': lr is '0.001' on rank 0 and '0.5' on rank 1"),
    "rule": ({"rule": "row_norm"}, "group 'first': rule is 'spectral' on rank 0 and 'row_norm' on rank 1"),
    "layout": ({"layout": Layout.transposed()}, "group 'first': layout is 'matrix"),
    "shape": (
        {"params": [("0.weight", nn.Parameter(nn.Linear(4, 7).weight.detach()))]},
        "'0.weight' has another shape, or is cut at other places, on rank 1 than on rank 0",
    ),
    "parameter": ({"params": [("other", nn.Linear(4, 6).weight)]}, "block 'other' is on rank 1 and not on rank 0"),
    "group": ({"name": "third"}, "group 'third' is on rank 1 and not on rank 0"),
}


def refusals() -> dict[str, str]:
    said = {}
    for name, (changes, _) in UNEQUAL.items():
        try:
            distribution_for(SymOpt(groups(**(changes if dist.get_rank() == 1 else {}))), dist.group.WORLD)
        except ConfigError as error:
            said[name] = str(error)
    swapped = groups() if dist.get_rank() == 0 else groups()[::-1]
    try:
        distribution_for(SymOpt(swapped), dist.group.WORLD)
    except ConfigError as error:
        said["order"] = str(error)
    return said


def test_unequal_optimizers_are_refused_on_every_rank_with_what_differs(ranks: Ranks) -> None:
    here, there = ranks(refusals)
    assert here == there
    assert set(here) == {*UNEQUAL, "order"}
    for name, (_, expected) in UNEQUAL.items():
        assert expected in here[name], here[name]
    assert "the groups of rank 1 are in another order than those of rank 0" in here["order"]


def equal() -> list[str]:
    distribution = distribution_for(SymOpt(groups()), dist.group.WORLD)
    assert distribution is not None
    return [holding.key for holding in distribution.holdings]


def test_equal_optimizers_are_attached(ranks: Ranks) -> None:
    assert ranks(equal) == [["0.weight", "0.bias"]] * 2


def test_on_one_device_there_is_nothing_to_attach_to() -> None:
    assert distribution_for(SymOpt(groups())) is None


def test_anything_else_is_refused_with_what_can_be_given() -> None:
    with pytest.raises(ConfigError, match=r"attach\(torch.nn.modules.linear.Linear\): give the engine that"):
        distribution_for(SymOpt(groups()), nn.Linear(2, 2))


def fsdp1() -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = FullyShardedDataParallel(nn.Linear(4, 6), use_orig_params=True, device_id=torch.device("cpu"))
    try:
        distribution_for(SymOpt(net.named_parameters(), rule="adamw"))
    except ConfigError as error:
        return str(error)
    return ""


def test_parameters_flattened_by_fsdp1_are_refused_by_name(ranks: Ranks) -> None:
    assert all("(FSDP1), which is not supported; use FSDP2" in said for said in ranks(fsdp1))


def test_attaching_without_an_engine_does_not_import_deepspeed() -> None:
    code = (
        "import sys; from torch import nn; from lit_symopt import SymOpt; "
        "SymOpt(nn.Linear(2, 2).parameters(), rule='adamw').attach(); "
        "assert not {'deepspeed', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
