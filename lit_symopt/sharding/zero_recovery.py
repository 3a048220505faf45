"""DeepSpeed's bookkeeping after a step was refused in its middle: what its own overflow handling leaves behind."""

from __future__ import annotations

from typing import Any


def drop_gradients(zero: Any) -> None:
    """Forget the gradients of the current step, in whichever buffers a ZeRO wrapper keeps them.

    Args:
        zero: `engine.optimizer`.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    if isinstance(zero, BF16_Optimizer):
        zero.zero_grad()
    elif isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        zero._overflow_clean_up(zero.loss_scale)
        zero._clear_fp32_optimizer_param_groups()
        if not zero.offload_optimizer:
            for partition in zero.fp32_partitioned_groups_flat:
                partition.grad = None
    else:
        zero.zero_grad(set_to_none=True)
        zero._release_preflattened_grad_buffers()
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
            return
        for index, partition in enumerate(zero.single_partition_of_fp32_groups):
            partition.grad = None
            zero.averaged_gradients[index] = None
            zero.all_grad_tensors[index] = None


def close_step(engine: Any) -> None:
    """End the engine's step as if it had returned, so that the next backward begins a new accumulation."""
    engine._running_engine_step = False
    engine.micro_steps += 1
    for timer in getattr(engine.timers, "timers", {}).values():
        if timer.started_:
            timer.stop()


def undo_trial_step(optimizer: Any, engine: Any) -> None:
    """Take back the step on zero gradients with which stage 0 in half precision makes its optimizer's state.

    It decays the masters once and leaves AdamW's counters at 1, so that the first real step would correct the wrong
    bias. Nothing is taken back from a training that has begun.
    """
    masters = getattr(engine.optimizer, "fp32_groups", None)
    if masters is None or engine.global_steps > 0 or engine.skipped_steps > 0:
        return
    for group, bit16 in zip(masters, engine.optimizer.fp16_groups, strict=True):
        for master, parameter in zip(group, bit16, strict=True):
            master.detach().copy_(parameter.detach())
            optimizer.state.pop(master, None)
