from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import torch

from lit_symopt.sharding.exchange import Exchange
from lit_symopt.sharding.plan import Block, Plan, Route, make_plan
from lit_symopt.sharding.transport import Transport
from tests.cpp.places import MULTIPLIES_BF16
from tests.sharding.cuts import (
    LAYOUTS,
    block,
    contiguous,
    direction_of,
    equal_shards,
    expected,
    flattened,
    options,
    row_shards,
    segments,
)
from tests.sharding.processes import Ranks

TOLERANCE = 2e-6
"""Relative difference of an update in fp32: both are rounded once, and the Gram matrices are in float64."""

OPTIONS = [
    options("spectral", scale="rms"),
    options("right_spectral", scale="nuclear", alpha=0.5),
    options("left_spectral", centered=True),
    options("row_norm", row_damping=0.1),
    options("row_norm", centered=True, scale="rms"),
    options("row_then_spectral", centered=True, row_damping=0.3, scale="row_nuclear", alpha=1.0),
    options("spectral_then_row", row_damping=0.1),
    options("spectral", precision="exact"),
    options("spectral", precision="bf16"),
    options("sgd"),
    options("sgd", centered=True),
    options("sign", scale="inverse_fan_in"),
    options("sign", centered=True),
    options("adamw", centered=True),
]
if MULTIPLIES_BF16:
    OPTIONS += [
        options("spectral", precision="bf16", backend="cpp"),
        options("row_then_spectral", centered=True, precision="bf16", backend="cpp"),
    ]


def blocks_cut(kind: str, world: int, chosen: list[tuple[Any, ...]], seed: int) -> list[Block]:
    """Every layout with every choice of options, two of each, cut in one way."""
    random, found = Random(seed), []
    for number, one in enumerate(chosen):
        for name, (layout, shape) in LAYOUTS.items():
            for copy in range(2):
                numel, dim = torch.Size(shape).numel(), 0
                if kind == "flat":
                    held = contiguous(numel, world, random)
                elif kind == "equal":
                    held = equal_shards(numel, world)
                elif kind == "rows":
                    dim = random.randrange(len(shape))
                    held = row_shards(shape, world, dim=dim)
                elif kind == "replicated":
                    held = ((0, numel),) * world
                else:  # replicated shards: pairs of ranks hold the same rows
                    shards = row_shards(shape, world // 2)
                    held = (*shards, *shards)
                found.append(block(f"{number}.{name}.{copy}", layout, shape, held, one, dim))
    return found


def on_a_rank(kind: str, chosen: list[tuple[Any, ...]], seed: int) -> dict[str, Any]:
    """Runs a plan on this rank: the largest error, and what was sent beside what was planned."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    blocks = blocks_cut(kind, world, chosen, seed)
    plan = make_plan(blocks, world=world)
    transport = Transport(dist.group.WORLD)  # type: ignore[arg-type]
    here = segments(blocks, rank)
    exchange = Exchange(plan, transport, here)
    directions, updates, wanted = {}, {}, {}
    for number, one in enumerate(blocks):
        if (name := one.placement.name) in here:
            direction, stretch = direction_of(one, seed + number), slice(here[name].start, here[name].stop)
            directions[name] = flattened(direction, one.placement.dim)[stretch].clone()
            updates[name] = torch.full_like(directions[name], torch.nan)
            wanted[name] = flattened(expected(one, direction), one.placement.dim)[stretch]
    before = {name: tensor.clone() for name, tensor in directions.items()}
    errors = {}
    for _ in range(2):  # a plan is run many times
        transport.moved.bytes = 0
        exchange.run(directions, updates)
        errors = {
            name: float((updates[name] - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-3)) for name in updates
        }
    return {
        "errors": errors,
        "sent": transport.moved.bytes,
        "planned": sum(by_rank[rank] for by_rank in plan.sent().values()),
        "untouched": all(torch.equal(before[name], directions[name]) for name in before),
        "routes": _routes(plan),
    }


def _routes(plan: Plan) -> dict[str, int]:
    return {route.value: sum(len(one.cells) for one in plan.rounds if one.route is route) for route in Route}


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with Ranks(request.param) as started:
        yield started


@pytest.mark.parametrize("kind", ["flat", "equal", "rows", "replicated", "replicated shards"])
def test_every_rank_gets_its_stretch_of_what_one_device_computes(ranks: Ranks, kind: str) -> None:
    if kind == "replicated shards" and ranks.world == 3:
        pytest.skip("copies of shards need an even number of ranks")
    taken: set[str] = set()
    for seed in (1, 2, 3) if kind == "flat" else (1,):
        results = ranks(on_a_rank, kind, OPTIONS, seed)
        for rank, result in enumerate(results):
            assert result["errors"], "this rank holds nothing"
            worst = max(result["errors"], key=lambda name: result["errors"][name])
            assert result["errors"][worst] <= TOLERANCE, (rank, worst)
            assert result["untouched"]
            assert abs(result["sent"] - result["planned"]) <= 16  # of rounding the ring's share of each sum
        taken |= {route for route, count in results[0]["routes"].items() if count}
    assert taken >= {"local", "owner"}
    if kind in ("flat", "equal"):
        assert taken == {"local", "owner", "rows", "gram"}
