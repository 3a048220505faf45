"""Blocks cut at random, for the tests of plan and exchange."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from random import Random
from typing import Any

import torch
from torch import Tensor

from lit_symopt.layout import Layout
from lit_symopt.linalg import Execution
from lit_symopt.sharding.holdings import Placement, Segment
from lit_symopt.sharding.plan import OPTIONS, Block
from lit_symopt.update import direction_to_update

LAYOUTS: dict[str, tuple[Layout, tuple[int, ...]]] = {
    "matrix": (Layout.matrix(), (13, 6)),
    "wide": (Layout.matrix(), (5, 12)),
    "transposed": (Layout.transposed(), (6, 11)),
    "heads": (Layout.heads(3), (12, 7)),
    "head columns": (Layout.heads(3, dim="columns"), (7, 12)),
    "qkv": (Layout.qkv(4, 2, 3, order="stacked"), (24, 5)),
    "qkv whole": (Layout.qkv(4, 2, 3, order="per_group", whole=True), (24, 5)),
    "experts": (Layout.experts(Layout.gate_up("stacked")), (5, 8, 3)),
    "interleaved": (Layout.experts(Layout.gate_up("interleaved", stored="in_out")), (3, 4, 6)),
    "pairs": (Layout.gate_up("stacked", pairs=True), (10, 4)),
    "vector": (Layout.column(), (17,)),
}


def options(rule: str, **others: Any) -> tuple[Any, ...]:
    """The options of a plan's block."""
    given = {
        "rule": rule,
        "centered": False,
        "scale": "none",
        "alpha": None,
        "eps": 1e-8,
        "row_damping": 0.0,
        "precision": "auto",
        "backend": "auto",
        "scratch": None,
    }
    return tuple({**given, **others}[key] for key in OPTIONS)


def contiguous(numel: int, world: int, random: Random) -> tuple[tuple[int, int], ...]:
    """Stretches of random lengths, some empty."""
    edges = sorted(random.choice([0, numel, random.randrange(numel + 1)]) for _ in range(world - 1))
    return tuple(pairwise([0, *edges, numel]))


def equal_shards(numel: int, world: int) -> tuple[tuple[int, int], ...]:
    """ZeRO 3: stretches of equal length, the last ones shorter or empty."""
    size = -(-numel // world)
    return tuple((min(rank * size, numel), min((rank + 1) * size, numel)) for rank in range(world))


def row_shards(shape: Sequence[int], world: int, *, dim: int = 0) -> tuple[tuple[int, int], ...]:
    """FSDP2: whole rows of dimension `dim`."""
    row = prod(shape) // shape[dim]
    return tuple((first * row, last * row) for first, last in equal_shards(shape[dim], world))


def block(name: str, layout: Layout, shape: tuple[int, ...], held: Any, chosen: tuple[Any, ...], dim: int = 0) -> Block:
    """A block of a plan."""
    return Block(
        placement=Placement(name=name, shape=shape, held=held, dim=dim), role="linear", layout=layout, options=chosen
    )


def flattened(tensor: Tensor, dim: int) -> Tensor:
    """A block as a placement flattens it."""
    return tensor.movedim(dim, 0).reshape(-1)


def segments(blocks: Sequence[Block], rank: int) -> dict[str, Segment]:
    """What a rank holds."""
    found = {}
    for one in blocks:
        start, stop = one.placement.held[rank]
        if start < stop:
            found[one.placement.name] = Segment(name=one.placement.name, start=start, stop=stop, offset=0)
    return found


def expected(one: Block, direction: Tensor) -> Tensor:
    """The update that one device computes: the oracle."""
    group = one.named_options()
    whole = direction_to_update(
        direction[None],
        group=group,
        layout=one.layout,
        shape=one.placement.shape,
        how=Execution(backend=group["backend"]),
    )
    return whole[0]


def direction_of(one: Block, seed: int) -> Tensor:
    """A direction with rows of very different sizes, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(one.placement.shape, generator=generator)
    if tensor.ndim > 1:
        tensor *= torch.logspace(0, -3, tensor.shape[-2])[:, None]
        tensor[..., -1, :] = 0.0
    return tensor
