"""Weights of a DeepSpeed engine: whole ones into the model, and the fp32 partitions into the model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lit_symopt.blocks import shape_of
from lit_symopt.errors import CheckpointError

SHOWN = 4


def publish(engine: Any) -> None:
    """Make the weights that the model computes with follow the fp32 partitions, as after a step. A collective call.

    Args:
        engine: `deepspeed.DeepSpeedEngine` with an optimizer.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    zero = engine.optimizer
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        zero.checkpoint_event_prologue()  # no parameter is gathered while its shards change
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        zero.checkpoint_event_epilogue()
    elif engine.zero_optimization():
        zero.update_lp_params()
    else:  # stage 0: 16-bit weights beside the fp32 ones that the optimizer holds, or those alone
        for held, low in zip(getattr(zero, "fp32_groups", ()), getattr(zero, "fp16_groups", ()), strict=True):
            torch._foreach_copy_([parameter.data for parameter in low], [parameter.data for parameter in held])


def load_weights(engine: Any, weights: Mapping[str, Any], *, strict: bool = True) -> None:
    """Load a whole state dict into the model of an engine, and what fp32 weights it keeps. A collective call.

    Under ZeRO 3 parameters are put together and taken apart again one at a time, so one whole one is in memory.

    Args:
        engine: `deepspeed.DeepSpeedEngine`, with or without an optimizer.
        weights: by the names of `engine.module.state_dict()`; the same on every rank.
        strict: whether a missing or an unknown name is an error.

    Raises:
        CheckpointError: naming the tensors that differ; nothing has been loaded then.
    """
    own = {name: value for name, value in engine.module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    given = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    differences = [
        f"{name!r} has the shape {tuple(given[name].shape)} there and {shape_of(value)} here"
        for name, value in own.items()
        if name in given and tuple(given[name].shape) != shape_of(value)
    ]
    if strict:
        differences += [f"{name!r} is only here" for name in own if name not in given]
        differences += [f"{name!r} is only there" for name in given if name not in own]
    if differences:
        more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise CheckpointError(f"the weights are of another model: {'; '.join(differences[:SHOWN])}{more}")
    with torch.no_grad():
        for name in (name for name in own if name in given):
            with _gathered(own[name]):
                own[name].data.copy_(given[name])
    if hasattr(type(engine.optimizer), "refresh_fp32_params"):
        engine.optimizer.refresh_fp32_params()


def _gathered(tensor: Tensor) -> Any:
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([tensor], modifier_rank=0)
