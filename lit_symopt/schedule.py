"""Learning-rate schedules as factors of the peak rate."""

from __future__ import annotations

from math import cos, pi

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_symopt.capture import shortest
from lit_symopt.config import ScheduleConfig


def factor(step: int, config: ScheduleConfig) -> float:
    """The share of the peak rate that optimizer step `step` (counted from 0) uses.

    Example:
        >>> config = ScheduleConfig(kind="linear", warmup_steps=2, total_steps=6)
        >>> [factor(step, config) for step in range(7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "constant" or config.total_steps is None:
        return 1.0
    length = config.total_steps - config.warmup_steps
    if config.kind == "wsd":
        length = config.decay_steps or length
    start = config.total_steps - length
    progress = min(max((step - start) / length, 0.0), 1.0)
    shape = 0.5 * (1.0 + cos(pi * progress)) if config.kind == "cosine" else 1.0 - progress
    return config.final_ratio + (1.0 - config.final_ratio) * shape


def build_scheduler(optimizer: Optimizer, config: ScheduleConfig) -> LambdaLR:
    """A torch scheduler that multiplies every group's own rate by `factor`; step it once per optimizer step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # of a capturable optimizer: what is saved of the schedule stays a number
            group.setdefault("initial_lr", shortest(group["lr"]))
    return LambdaLR(optimizer, lambda step: factor(step, config))
