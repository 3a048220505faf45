"""A gradient that is not finite on one rank only: all ranks refuse the step alike, and go on as if it never was.

Oracles: copies from before the bad step, and a run that never saw the batch; both bitwise.
`test_deepspeed_refusals.py` has more of DeepSpeed's settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_symopt import SymOpt
from lit_symopt.errors import GradientError
from tests.sharding import small_engines
from tests.sharding.processes import Ranks
from tests.sharding.small_engines import (
    ACCUMULATED,
    BF16,
    BF16_OPTIMIZER,
    FP16,
    OFFLOAD,
    everything_held,
    fp16_on_cpu,
    poison,
)
from tests.sharding.small_network import assert_change_is, groups_of, micro_batch, network, trained

pytestmark = pytest.mark.deepspeed

UNCHECKED = {"bf16.check_grad_overflow": False}
UNNORMED = {"zero_optimization.compute_grad_norm": False}

# Strategies, and for DeepSpeed a stage and settings.
STRATEGIES: dict[str, tuple[int, dict[str, Any]] | None] = {
    "ddp": None,
    "ddp, one rank's own": None,  # after the gradients were averaged: memory that flips, say
    "fsdp2": None,
    "fsdp2, one rank's own": None,
    "zero 1": (1, {}),
    "zero 2": (2, {}),
    "zero 3": (3, {}),
    "zero 1, unnormed": (1, UNNORMED),
    "zero 2, unnormed": (2, UNNORMED),
    "zero 1, bf16": (1, BF16),
    "zero 1, bf16, unchecked": (1, {**BF16, **UNCHECKED}),
    "zero 2, bf16, unchecked": (2, {**BF16, **UNCHECKED}),
    "zero 2, bf16, unchecked, unnormed": (2, {**BF16, **UNCHECKED, **UNNORMED}),
    "zero 1, bf16, unchecked, accumulated": (1, {**BF16, **UNCHECKED, **ACCUMULATED}),
    "zero 2, bf16, unchecked, accumulated": (2, {**BF16, **UNCHECKED, **ACCUMULATED}),
    "zero 2, unnormed, accumulated": (2, {**UNNORMED, **ACCUMULATED}),
    "zero 2, bf16, unchecked, offloaded": (2, {**BF16, **UNCHECKED, **OFFLOAD}),
    "zero 3, accumulated": (3, ACCUMULATED),
    "zero 3, bf16": (3, BF16),
    "zero 3, bf16, unchecked": (3, {**BF16, **UNCHECKED}),
    "BF16_Optimizer": (1, BF16_OPTIMIZER),
    "BF16_Optimizer, unchecked": (1, {**BF16_OPTIMIZER, **UNCHECKED}),
    "zero 1, fp16": (1, FP16),
    "zero 3, fp16": (3, FP16),
    "stage 0": (0, {}),
    "stage 0, accumulated": (0, ACCUMULATED),
    "stage 0, bf16": (0, BF16),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2) as started:
        yield started


@dataclass(frozen=True)
class Training:
    """A network under a strategy.

    Attributes:
        optimizer: attached.
        step: takes the step of a number, on this rank's micro-batch.
        poison: the switch of `small_engines.poison`.
        skipped: steps that the strategy has skipped by itself.
        weights: whole, in fp32.
        recover: what a training loop does before it goes on.
    """

    optimizer: SymOpt
    step: Callable[[int], None]
    poison: dict[str, bool]
    skipped: Callable[[], int]
    weights: Callable[[], dict[str, Tensor]]
    recover: Callable[[], None]


def on_a_rank(strategy: str, value: float, poisoned: str) -> dict[str, Any]:
    """Step 0, a bad step 1, and steps 1 and 2; then the same without the bad one."""
    with fp16_on_cpu():
        with _training(strategy, value, poisoned) as training:
            training.step(0)
            before, held = training.weights(), everything_held(training.optimizer)
            training.poison["on"] = dist.get_rank() == 1
            raised = ""
            try:
                training.step(1)
            except GradientError as error:
                raised = str(error)
                training.recover()
            training.poison["on"] = False
            after, still = training.weights(), everything_held(training.optimizer)
            skipped = training.skipped()
            training.step(1)
            training.step(2)
            end, kept = training.weights(), everything_held(training.optimizer)
        with _training(strategy, value, poisoned) as training:
            for number in range(3):
                training.step(number)
            oracle, due = training.weights(), everything_held(training.optimizer)
            assert training.skipped() == 0
    return {
        "raised": raised,
        "skipped": skipped,
        "weights kept": _equal(before, after),
        "all kept": _equal(held, still),
        "weights go on": _equal(end, oracle),
        "all goes on": _equal(kept, due),
        "end": end,
    }


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        torch.equal(tensor, other[key]) and bool(tensor.isfinite().all()) for key, tensor in one.items()
    )


@contextmanager
def _training(strategy: str, value: float, poisoned: str) -> Iterator[Training]:
    settings = STRATEGIES[strategy]
    if settings is None:
        yield (_fsdp2 if strategy.startswith("fsdp2") else _ddp)(strategy, value, poisoned)
        return
    with small_engines.started(*settings) as (engine, optimizer):
        yield Training(
            optimizer,
            step=lambda number: small_engines.step(engine, [number]),
            poison=poison(engine.module, poisoned, value),
            skipped=lambda: int(engine.skipped_steps),
            weights=lambda: small_engines.whole_weights(engine),
            recover=lambda: None,  # an engine drops gradients itself, as after a step that it skips
        )


def _ddp(strategy: str, value: float, poisoned: str) -> Training:
    module = network()
    wrapped = nn.parallel.DistributedDataParallel(module)
    optimizer = SymOpt(groups_of(module)).attach(dist.group.WORLD)
    own = strategy.endswith("own")
    switch = _flip(optimizer, module, poisoned, value) if own else poison(module, poisoned, value)
    return _plain(wrapped, module, optimizer, switch, _copied)


def _fsdp2(strategy: str, value: float, poisoned: str) -> Training:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module, switch = network(), {"on": False}

    # FSDP2 hands parameters of its own to the forward pass; what flows back is met where it is made.
    def spoil(_: nn.Module, inputs: Any, __: Any) -> Any:
        return tuple(torch.full_like(one, value) if switch["on"] else one for one in inputs)

    module.mix.register_full_backward_hook(spoil)
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = SymOpt(groups_of(module))
    if strategy.endswith("own"):
        switch = _flip(optimizer, module, poisoned, value)
    return _plain(module, module, optimizer, switch, _gathered)


def _flip(optimizer: SymOpt, module: nn.Module, name: str, value: float) -> dict[str, bool]:
    """A switch: while it is on, one element of one gradient turns bad on this rank after all have averaged theirs."""
    switch = {"on": False}

    def flip(*_: Any) -> None:
        gradient: Any = dict(module.named_parameters())[name].grad
        if switch["on"]:
            (gradient.to_local() if hasattr(gradient, "to_local") else gradient).view(-1)[0] = value

    optimizer.register_step_pre_hook(flip)
    return switch


def _plain(called: nn.Module, module: nn.Module, optimizer: SymOpt, switch: dict[str, bool], weights: Any) -> Training:
    def step(number: int) -> None:
        optimizer.zero_grad()
        called(micro_batch(number, dist.get_rank())).backward()
        optimizer.step()

    return Training(
        optimizer, step, switch, skipped=lambda: 0, weights=lambda: weights(module), recover=optimizer.zero_grad
    )


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def _gathered(module: Any) -> dict[str, Tensor]:
    return {name: parameter.full_tensor().detach().clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize(
    ("value", "poisoned"),
    [(torch.nan, "mix.bias"), (torch.inf, "mix.weight")],  # in the last group of the optimizer, and in the first
    ids=["nan", "overflow"],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_ranks_refuse_alike_and_go_on_alike(ranks: Ranks, strategy: str, value: float, poisoned: str) -> None:
    found = ranks(on_a_rank, strategy, value, poisoned)
    half, accumulated = "16" in strategy, "accumulated" in strategy
    oracle = trained(3, micro_batches=4 if accumulated else 2)
    for one in found:
        assert one["weights kept"]
        assert one["all kept"]
        assert one["weights go on"]
        assert one["all goes on"]
        assert_change_is(one["end"], oracle, 0.05 if half else 1e-4)
    for key in ("raised", "skipped"):
        assert found[0][key] == found[1][key]
    # Either the strategy has skipped the step by itself, or ours was refused; never both, never neither.
    assert (found[0]["skipped"] == 1) != ("No weight and no state was changed" in found[0]["raised"])
