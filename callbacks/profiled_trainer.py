"""What `KernelTime` asks of a Trainer."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.optim import Optimizer

from lit_symopt.optim import SymOpt
from lit_symopt.profiling.expected import expected_work
from lit_symopt.profiling.memory import memory_use
from lit_symopt.profiling.run import MemoryUse, Work

OF_TRAINER = "the Trainer's PyTorchProfiler"


def limits_of(trainer: L.Trainer) -> list[tuple[float, str]]:
    """Optimizer steps that are left, and what says so: the fewest first."""
    found: list[tuple[float, str]] = []
    done = f" after step {trainer.global_step}" if trainer.global_step else ""
    if trainer.max_steps >= 0:
        found.append((trainer.max_steps - trainer.global_step, f"max_steps={trainer.max_steps}{done}"))
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is not None and epochs >= 0 and batches != float("inf"):
        steps = ceil(batches / trainer.accumulate_grad_batches)
        epochs_left = epochs - trainer.current_epoch
        found.append((epochs_left * steps, f"max_epochs={epochs} of {batches} batches{done}"))
    return sorted(found)


def in_the_way(trainer: L.Trainer) -> str | None:
    """The Trainer's own profiler, while it records or is going to in training."""
    # Its private attributes: nothing public says whether it has recorded what it is going to record.
    profiler: Any = trainer.profiler  # type: ignore[attr-defined]  # set by a part of the Trainer
    if not isinstance(profiler, PyTorchProfiler):
        return None
    inner, schedule = profiler.profiler, profiler._schedule
    if inner is None:
        return None
    idle = getattr(inner, "current_action", None) is torch.profiler.ProfilerAction.NONE
    finished = schedule is not None and schedule._training_step_reached_end
    return None if idle and finished else OF_TRAINER


def records_validation(trainer: L.Trainer) -> bool:
    """Whether the Trainer's own profiler is going to record in a validation."""
    profiler: Any = trainer.profiler  # type: ignore[attr-defined]
    schedule = profiler._schedule if isinstance(profiler, PyTorchProfiler) else None
    return schedule is not None and not schedule._validation_step_reached_end


def optimizers_of(trainer: L.Trainer) -> list[Optimizer]:
    """The optimizers that compute updates, without a strategy's wrapping."""
    strategy: Any = trainer.strategy
    # The Trainer's optimizer is DeepSpeed's own then, which keeps the one that it was given.
    if isinstance(strategy, DeepSpeedStrategy):
        return [strategy.deepspeed_engine.basic_optimizer]
    return list(trainer.optimizers)


def name_of(trainer: L.Trainer, pl_module: L.LightningModule) -> str:
    """The stack, or the classes of optimizers that have none."""
    stack = getattr(getattr(pl_module, "symopt", None), "stack", None)
    optimizers = optimizers_of(trainer)
    if isinstance(stack, str) and any(isinstance(optimizer, SymOpt) for optimizer in optimizers):
        return stack
    return " + ".join(type(optimizer).__name__ for optimizer in optimizers) or "none"


def work_of(trainer: L.Trainer) -> tuple[Work, ...]:
    """What the updates must at least do; empty for optimizers other than `SymOpt`."""
    found = [expected_work(optimizer) for optimizer in optimizers_of(trainer) if isinstance(optimizer, SymOpt)]
    return tuple(work for works in found for work in works)


def memory_of(trainer: L.Trainer, pl_module: L.LightningModule) -> MemoryUse:
    """Of all optimizers; the module is the same."""
    uses = [memory_use(optimizer, pl_module, rank=trainer.global_rank) for optimizer in optimizers_of(trainer)]
    state: dict[str, int] = {}
    for use in uses:
        for role, size in use.state.items():
            state[role] = state.get(role, 0) + size
    return replace(uses[0], state=state, masters=sum(use.masters for use in uses))


def boards_of(trainer: L.Trainer) -> list[TensorBoardLogger]:
    """The loggers that take texts and pictures; none but on rank 0."""
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
