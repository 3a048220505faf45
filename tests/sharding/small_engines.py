"""DeepSpeed engines around `small_network.Network`, on one rank of `tests.sharding.processes`."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_symopt import SymOpt
from tests.sharding.small_network import Network, groups_of, initial_weights, micro_batch, network

Changes = Mapping[str, Any]

BF16 = {"bf16.enabled": True}
BF16_OPTIMIZER = {"bf16.enabled": True, "data_types.grad_accum_dtype": "fp32"}  # with stage 1
FP16 = {"fp16.enabled": True, "fp16.initial_scale_power": 16, "fp16.hysteresis": 1}
OFFLOAD = {"zero_optimization.offload_optimizer": {"device": "cpu"}}
ACCUMULATED = {"gradient_accumulation_steps": 2}


def config_of(stage: int, changes: Changes) -> dict[str, Any]:
    """DeepSpeed's configuration of a ZeRO stage, with buckets that hold a matrix or two.

    Args:
        stage: 0 to 3.
        changes: entries by their dotted keys; `None` removes one.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 100,
            "allgather_bucket_size": 100,
            "stage3_param_persistence_threshold": 0,
        },
    }
    for key, value in changes.items():
        *outer, last = key.split(".")
        section = config
        for name in outer:
            section = section.setdefault(name, {})
        section[last] = value
        if value is None:
            del section[last]
    return config


def start(
    stage: int,
    changes: Changes,
    *,
    init: bool = False,
    module: Network | None = None,
    groups: Mapping[str, Mapping[str, Any]] | None = None,
    attach: bool = True,
    scheduler: Any = None,
    loudness: float = 1.0,
) -> tuple[Any, SymOpt]:
    """An engine and the optimizer that was given to it.

    Args:
        stage: of ZeRO.
        changes: see `config_of`.
        init: build under `deepspeed.zero.Init`.
        module: in place of a new network.
        groups: keys of groups to set otherwise; see `groups_of`.
        attach: attach the optimizer to the engine.
        scheduler: makes a scheduler of the optimizer.
        loudness: factor of the loss.
    """
    import deepspeed

    # DeepSpeed collects garbage a dozen times for one BF16_Optimizer; of what is imported nothing is garbage.
    gc.freeze()
    config = config_of(stage, changes)
    module = module or (_sharded_from_the_start(config) if init else network())
    module.loudness = loudness
    optimizer = SymOpt(groups_of(module, **(groups or {})))
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, lr_scheduler=scheduler and scheduler(optimizer)
    )
    if attach:
        optimizer.attach(engine)
    return engine, optimizer


@contextmanager
def started(stage: int, changes: Changes, **options: Any) -> Iterator[tuple[Any, SymOpt]]:
    """`start`, and the end of it."""
    engine, optimizer = start(stage, changes, **options)
    try:
        yield engine, optimizer
    finally:
        engine.destroy()


def _sharded_from_the_start(config: dict[str, Any]) -> Network:
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=config):
        module = Network()
    weights = initial_weights()
    for name, parameter in module.named_parameters():
        assert parameter.numel() == 0  # the other ranks have the rest, if there is a rest at all
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0), torch.no_grad():
            parameter.copy_(weights[name])
    return module


def step(engine: Any, numbers: Iterable[int]) -> None:
    """Take training steps; the ranks share a step's micro-batches."""
    for number in numbers:
        for turn in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(micro_batch(number, turn * dist.get_world_size() + dist.get_rank())))
            engine.step()


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """The parameters, or their fp32 masters where there are some, whole."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    named = dict(engine.module.named_parameters())
    if engine.bfloat16_enabled() or engine.fp16_enabled():
        if engine.zero_optimization_stage() == 0:
            groups = engine.basic_optimizer.param_groups
            found = {
                name: one for group in groups for name, one in zip(group["param_names"], group["params"], strict=True)
            }
        else:
            found = {name: safe_get_full_fp32_param(parameter) for name, parameter in named.items()}
        return {name: found[name].detach().clone() for name in named}
    sharded = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(list(named.values()), enabled=sharded):
        return {name: parameter.detach().clone() for name, parameter in named.items()}


def everything_held(optimizer: SymOpt) -> dict[str, Tensor]:
    """Copies of what the optimizer writes on this rank: its tensors and their state."""
    assert optimizer.distribution is not None
    return {
        f"{holding.key}.{name}": _local(tensor).detach().clone()
        for holding in optimizer.distribution.holdings
        for name, tensor in {"weight": holding.tensor, **optimizer.state[holding.tensor]}.items()
    }


def straddling(optimizer: SymOpt) -> set[str]:
    """Blocks of which more than one rank holds something, but none holds all."""
    assert optimizer.distribution is not None
    return {
        placement.name
        for holding in optimizer.distribution.holdings
        for placement in holding.placements
        if all(stop - start < placement.numel for start, stop in placement.held)
    }


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


@contextmanager
def fp16_on_cpu() -> Iterator[None]:
    """DeepSpeed refuses float16 on CPUs without it in hardware; torch computes with it all the same."""
    from deepspeed.accelerator import get_accelerator

    kind = type(get_accelerator())
    kept = kind.is_fp16_supported
    kind.is_fp16_supported = lambda self: True
    try:
        yield
    finally:
        kind.is_fp16_supported = kept


def poison(module: nn.Module, name: str, value: float) -> dict[str, bool]:
    """A switch: while it is on (`["on"]`), the gradient of one parameter is `value` on this rank.

    It acts between the backward pass and the strategy, where an overflow would come from.
    """
    switch = {"on": False}
    parameter = dict(module.named_parameters())[name]
    parameter.register_hook(lambda gradient: torch.full_like(gradient, value) if switch["on"] else gradient)
    return switch
