"""Samples: the time of every step, by round, window and step.

A round is a process, a window one trace. Over profiled ranks they are means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite
from statistics import fmean
from typing import Any

from lit_symopt.profiling.costs import STAGES, Cost, Stage, StepCosts, total
from lit_symopt.profiling.run import RunProfile

Samples = tuple[tuple[tuple[float, ...], ...], ...]
"""Microseconds of one training step, `[round][window][step]`."""

Rounds = Sequence[Sequence[RunProfile]]
"""Of each run of a stack, the records of its profiled ranks."""

CONTROL_STAGES = ("forward", "backward")
CONTROL_KERNELS = 12
OTHERS = "(others)"


def blocks_of(rounds: Rounds) -> dict[str, Samples]:
    """Device time of the update by `role/rule`; what it spends outside the ranges of phases has a role of its own."""
    blocks = dict.fromkeys((cost.role, cost.rule) for cost in costs_of(rounds) if cost.in_update)
    return {f"{role}/{rule}": samples_of(rounds, partial(_in_block, role=role, rule=rule)) for role, rule in blocks}


def stages_of(rounds: Rounds) -> dict[str, Samples]:
    """Device time by stage of the training step."""
    return {stage: samples_of(rounds, partial(_in_stage, stage=stage)) for stage in STAGES}


def control_of(rounds: Rounds) -> dict[str, Samples]:
    """Samples of forward and backward by kernel. In parts, bursts that meet one of them in a step spare the others."""
    times = total((cost for cost in costs_of(rounds) if cost.stage in CONTROL_STAGES), lambda cost: cost.kernel)
    most = sorted(times, key=lambda kernel: -times[kernel])[:CONTROL_KERNELS]
    found = {kernel: samples_of(rounds, partial(_in_kernels, kernels={kernel})) for kernel in most}
    others = set(times) - set(most)
    return {**found, OTHERS: samples_of(rounds, partial(_in_kernels, kernels=others))} if others else found


def _in_kernels(step: StepCosts, *, kernels: set[str]) -> float:
    return step.device_us(lambda cost: cost.stage in CONTROL_STAGES and cost.kernel in kernels)


def _in_block(step: StepCosts, *, role: str, rule: str) -> float:
    return step.device_us(lambda cost: cost.role == role and cost.rule == rule)


def _in_stage(step: StepCosts, *, stage: Stage) -> float:
    return step.device_us(lambda cost: cost.stage == stage)


def costs_of(rounds: Rounds) -> list[Cost]:
    """Everything that was measured."""
    return [
        cost
        for ranks in rounds
        for rank in ranks
        for window in rank.windows
        for step in window.steps
        for cost in step.costs
    ]


def samples_of(rounds: Rounds, value: Callable[[StepCosts], float]) -> Samples:
    """A number of each step, the mean over ranks; of what a rank cut short, the steps that all have."""
    return tuple(
        tuple(
            tuple(
                fmean(value(step) for step in steps)
                for steps in zip(*(window.steps for window in windows), strict=False)
            )
            for windows in zip(*(rank.windows for rank in ranks), strict=False)
            if all(window.steps for window in windows)
        )
        for ranks in rounds
    )


def added(parts: Sequence[Samples]) -> Samples:
    """The sum of samples of the same steps.

    Example:
        >>> added([(((1.0, 2.0),),), (((10.0, 20.0),),)])
        (((11.0, 22.0),),)
    """
    return tuple(
        tuple(tuple(map(sum, zip(*windows, strict=True))) for windows in zip(*rounds, strict=True))
        for rounds in zip(*parts, strict=True)
    )


def checked(value: Any) -> Samples:
    """Samples from JSON.

    Raises:
        ValueError, TypeError: if they are none.
    """
    samples = tuple(tuple(tuple(float(us) for us in window) for window in round_) for round_ in value)
    if not all(samples) or not samples or not all(all(round_) for round_ in samples):
        raise ValueError("a round or a window has no steps")
    if not all(isfinite(us) and us >= 0 for round_ in samples for window in round_ for us in window):
        raise ValueError("a time is negative or not a number")
    return samples
