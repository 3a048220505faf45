"""What of DeepSpeed cannot be honored, refused by name before anything is attached."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

from lit_symopt.errors import ConfigError


def refuse_unsupported(optimizer: Optimizer, engine: Any) -> None:
    """Check that an engine steps this optimizer, in a way in which its updates are those of one device.

    Args:
        optimizer: that the groups were built with.
        engine: `deepspeed.DeepSpeedEngine`.

    Raises:
        ConfigError: naming every setting that stands in the way, why, and what to do.
    """
    reasons = [*_another_optimizer(optimizer, engine), *_parallelism(engine), *_zero(engine)]
    if reasons:
        listed = "".join(f"\n- {reason}" for reason in reasons)
        raise ConfigError(f"{type(optimizer).__name__} cannot step this DeepSpeed engine:{listed}")


def warn_of_clipping(optimizer: Optimizer, engine: Any) -> None:
    """Say that gradients are clipped although nobody asked for it, where that changes updates.

    Most rules ignore the scale of a gradient. The scale `nuclear` is made of it, and so is the rule `sgd`; DeepSpeed
    clips to a norm of 1 where its config is silent (reported to it as #8439). Lightning always writes the key.
    """
    affected = [
        group["name"] for group in optimizer.param_groups if group["scale"] == "nuclear" or group["rule"] == "sgd"
    ]
    if affected and engine.gradient_clipping() > 0 and "gradient_clipping" not in engine._config._param_dict:
        warnings.warn(
            f"DeepSpeed clips gradients to a norm of {engine.gradient_clipping():g} unless its config says otherwise, "
            f"which shrinks the updates of the groups whose rule 'sgd' or scale 'nuclear' sees the size of a gradient "
            f"({', '.join(affected)}): set gradient_clipping, to 0.0 for none",
            stacklevel=4,
        )


def _another_optimizer(optimizer: Optimizer, engine: Any) -> Iterator[str]:
    configured = engine._config.optimizer_name  # engine.optimizer_name() is the class of what was passed, if any was
    if configured is not None:
        yield (
            f"the DeepSpeed config has an optimizer of its own, {configured!r}: remove the key "
            f"`optimizer` from it, or there are two"
        )
    elif engine.basic_optimizer is not optimizer:
        yield (
            f"it steps another optimizer, a {type(engine.basic_optimizer).__name__}: attach the object that was "
            f"given to deepspeed.initialize(optimizer=...) (engine.basic_optimizer)"
        )
    if "muon" in type(optimizer).__name__.lower():
        yield (
            f"the class name {type(optimizer).__name__!r} contains 'muon', by which DeepSpeed recognizes its own "
            f"optimizer and rewrites gradients: give the subclass another name"
        )


def _parallelism(engine: Any) -> Iterator[str]:
    ways = {
        "pipeline parallelism (PipelineModule)": engine.pipeline_parallelism,
        "DeepSpeed's mixture-of-experts layers (expert parallelism)": engine.has_moe_layers,
        f"tensor parallelism (model parallel size {engine.mp_world_size})": engine.mp_world_size > 1,
        f"tensor_parallel.autotp_size={engine.autotp_size()}": engine.autotp_size() > 1,
        f"sequence parallelism (size {engine.sequence_parallel_size})": engine.sequence_parallel_size > 1,
        f"zero_hpz_partition_size={engine.zero_hpz_partition_size()} (hpZ)": engine.zero_hpz_partition_size() > 1,
    }
    for name, used in ways.items():
        if used:
            yield f"{name} splits blocks or ranks in a way that no plan here knows: use data parallelism alone"


def _zero(engine: Any) -> Iterator[str]:
    wrapper, parameters = engine.optimizer, engine.zero_offload_param()
    if engine.zenflow or engine.super_offload():
        name = "zenflow" if engine.zenflow else "offload_optimizer.super_offload"
        yield f"{name} updates on the host with an Adam of its own: remove it (offload_optimizer alone works)"
    if engine.zero_nvme_offload_optimizer() or (parameters is not None and parameters.device == "nvme"):
        yield "offloading to NVMe takes the state out of memory between steps: offload to the cpu"
    for name, used in (
        ("zero_quantized_weights", engine.zero_quantized_weights()),
        ("zero_quantized_gradients", engine.zero_quantized_gradients()),
    ):
        # Rules that ignore the scale of a gradient make rounding noise in small rows as large as signal elsewhere.
        if used:
            yield f"{name} rounds what updates are computed from to a few bits, so they are not those of one device"
    for name, used in (
        ("bf16.bf16_master_weights_and_grads", engine.bf16_master_weights_and_gradients()),
        ("fp16.fp16_master_weights_and_grads", engine.fp16_master_weights_and_gradients()),
    ):
        if used:
            yield f"{name} leaves no fp32 weights to update: remove it"
    if engine.fp16_enabled() and engine.zero_optimization_stage() == 0:
        # FP16_UnfusedOptimizer divides gradients by a loss scale that engine.backward has not multiplied the loss by.
        yield "fp16 at stage 0 makes gradients too small by the loss scale (a fault of DeepSpeed): use ZeRO stage 1"
    if engine.zero_elastic_checkpoint():
        yield (
            "elastic_checkpoint saves the state without the names of its blocks: remove it; "
            "`lit-symopt checkpoint consolidate` moves checkpoints between world sizes"
        )
    if engine.load_universal_checkpoint():
        yield (
            "checkpoint.load_universal restores AdamW's state and no other: remove it; "
            "`lit-symopt checkpoint consolidate` moves checkpoints between strategies"
        )
    if engine.torch_autocast_z0_gradscaler is not None or getattr(wrapper, "torch_autocast_gradscaler", None):
        yield (
            "torch_autocast with float16 skips steps by what one rank sees, and the others wait for it: "
            "use bfloat16, or the `fp16` section, whose loss scale all ranks agree on"
        )
