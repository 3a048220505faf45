"""Which stretch of which block lies where in DeepSpeed's partitions, found by writing into the model and reading there.

Oracle of the weights: the numbers that the model was filled with. Oracle of the gradients: torch alone, in one
process, over the micro-batches of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lit_symopt import SymOpt
from tests.sharding.processes import Ranks
from tests.sharding.zero_engines import MICRO_BATCHES, MODES, engine_of, micro_batch, model_of

pytestmark = pytest.mark.deepspeed

Reading = Callable[[str, int], list[dict[str, Any]]]
Read = dict[str, list[tuple[int, int, Tensor]]]  # by block: stretches [start, stop) and what lies there


class Recorder(SymOpt):
    """Takes no step, but keeps the gradients that it is called with."""

    seen: list[dict[int, Tensor]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen.append({id(p): p.grad.clone() for group in self.param_groups for p in group["params"]})


def read_partitions(mode: str) -> dict[str, Any]:
    """What a rank finds at its segments, before and in the first step, and what the adapter says of all ranks."""
    from lit_symopt.sharding.deepspeed import partitioned

    engine, optimizer = engine_of(mode, Recorder)
    assert isinstance(optimizer, Recorder)
    optimizer.seen = []
    distribution = partitioned(optimizer, engine)
    flat = {holding.key: holding.tensor.detach() for holding in distribution.holdings}
    found: dict[str, Any] = {
        "weights": _read(distribution.holdings, flat),
        "sizes": {holding.key: holding.tensor.numel() for holding in distribution.holdings},
        "segments": {holding.key: holding.segments for holding in distribution.holdings},
        "placements": {holding.key: holding.placements for holding in distribution.holdings},
        "state": {
            holding.key: {
                name: (tuple(value.shape), value.dtype) for name, value in optimizer.state[holding.tensor].items()
            }
            for holding in distribution.holdings
        },
        "strategy": distribution.strategy,
    }
    accumulated = engine.gradient_accumulation_steps()
    for index in range(accumulated):
        engine.backward(engine(micro_batch(dist.get_rank(), index)))
        engine.step()
    gradients = {key: value for call in optimizer.seen for key, value in call.items()}
    assert len(gradients) == sum(map(len, optimizer.seen))  # each partition was stepped once
    by_key = {holding.key: gradients[id(holding.tensor)] for holding in distribution.holdings}
    found["gradients"] = _read(distribution.holdings, by_key)
    found["calls"] = [[holding.key for holding in call] for call in distribution.calls()]
    keys = {id(holding.tensor): holding.key for holding in distribution.holdings}
    found["called"] = [[keys[one] for one in call] for call in optimizer.seen]
    engine.destroy()
    return found


def _read(holdings: Any, flat: dict[str, Tensor]) -> Read:
    read: Read = {}
    for holding in holdings:
        for segment in holding.segments:
            length = segment.stop - segment.start
            piece = flat[holding.key][segment.offset : segment.offset + length].float().clone()
            read.setdefault(segment.name, []).append((segment.start, segment.stop, piece))
    return read


def expected(mode: str, world: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and gradients averaged over ranks and micro-batches, of one process without DeepSpeed."""
    model = model_of(mode).number()
    if "bf16" in mode:
        model = model.bfloat16()
    count = MICRO_BATCHES if "accumulated" in mode else 1
    total: dict[str, Tensor] = {}
    for rank in range(world):
        for index in range(count):
            model.zero_grad()
            model(micro_batch(rank, index)).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None and parameter.numel():
                    total[name] = total.get(name, 0.0) + parameter.grad.float() / (world * count)
    weights = {name: p.detach().float() for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    return weights, total


def assemble(read: list[Read], shapes: dict[str, Any]) -> dict[str, Tensor]:
    """Blocks put together from the stretches of all ranks; NaN where none was."""
    blocks = {name: torch.full(shape, torch.nan).flatten() for name, shape in shapes.items()}
    for on_rank in read:
        for name, stretches in on_rank.items():
            for start, stop, piece in stretches:
                assert blocks[name][start:stop].isnan().all(), f"{name}: [{start}, {stop}) lies twice"
                blocks[name][start:stop] = piece
    return {name: block.reshape(shapes[name]) for name, block in blocks.items()}


@pytest.fixture(scope="module")
def reading() -> Iterator[Reading]:
    """What the ranks of a mode found; every engine is built once."""
    with Ranks(2) as two, Ranks(3) as three:

        @cache
        def read(mode: str, world: int) -> list[dict[str, Any]]:
            return (two if world == 2 else three)(read_partitions, mode)

        yield read


# Three processes where partitions are laid out in different ways, two where only the way of a gradient is another.
LAID_OUT = ("zero1", "zero3_init", "bf16", "zero2_round_robin", "zero2_aligned", "zero2_offload", "zero3_sub_groups")


@pytest.mark.parametrize(("mode", "world"), [(mode, 2) for mode in MODES] + [(mode, 3) for mode in LAID_OUT])
def test_segments_and_placements_reconstruct_every_block(reading: Reading, mode: str, world: int) -> None:
    found = reading(mode, world)
    weights, gradients = expected(mode, world)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}

    assembled = assemble([one["weights"] for one in found], shapes)
    for name, weight in weights.items():
        torch.testing.assert_close(assembled[name], weight, rtol=0, atol=0)
    # bf16: gradients are added up in another order and rounded in between.
    rtol, atol = (0.05, 2e-4) if "bf16" in mode else (1e-5, 1e-7)
    assembled = assemble([one["gradients"] for one in found], shapes)
    for name, gradient in gradients.items():
        torch.testing.assert_close(assembled[name], gradient, rtol=rtol, atol=atol)
        assert gradient.abs().max() > 0

    first = found[0]
    placements = {one.name: one for listed in first["placements"].values() for one in listed}
    assert {name: one.shape for name, one in placements.items()} == shapes
    for rank, one in enumerate(found):
        assert one["placements"] == first["placements"]
        assert one["calls"] == one["called"] == first["calls"]  # the order of step() is the one that was announced
        for key, segments in one["segments"].items():
            ends = 0
            for segment in segments:
                assert placements[segment.name].held[rank] == (segment.start, segment.stop)
                assert ends <= segment.offset  # in the order of the partition, without overlap
                ends = segment.offset + segment.stop - segment.start
            assert ends <= one["sizes"][key]
            told = [block.held[rank] for block in one["placements"][key]]
            assert sum(stop - start for start, stop in told) == sum(s.stop - s.start for s in segments)


@pytest.mark.parametrize("mode", ["zero1", "zero2", "zero3", "bf16", "zero2_offload", "zero3_sub_groups"])
def test_the_state_of_every_partition_is_there_before_the_first_step(reading: Reading, mode: str) -> None:
    for one in reading(mode, 2):
        for key, state in one["state"].items():
            flat = ((one["sizes"][key],), torch.float32)
            if key.startswith("matrices"):
                assert state == {"momentum_buffer": flat}
            else:
                assert state == {"step": ((), torch.float32), "exp_avg": flat, "exp_avg_sq": flat}


@pytest.mark.parametrize(
    ("mode", "strategy"),
    [("zero1", "ZeRO 1"), ("zero2", "ZeRO 2"), ("zero3", "ZeRO 3"), ("bf16", "ZeRO 1 (BF16_Optimizer)")],
)
def test_the_strategy_says_which_stage_it_is(reading: Reading, mode: str, strategy: str) -> None:
    assert {one["strategy"] for one in reading(mode, 2)} == {f"DeepSpeed {strategy}"}
