"""From windows to numbers: milliseconds in every step, by block, stage, phase or kernel.

A *sample* is one training step. Every list has one number for each step of every window, in order; a step in which
something did not happen counts as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, TypeVar

from lit_symopt.profiling.costs import STAGES, Cost, Stage, StepCosts, TraceCosts

Clock = Literal["device", "host"]
"""Whose time: the device's, or that of the host. On a CPU the main thread is the device, and other threads the host."""

Place = tuple[Stage, str, str, str, str]
"""Stage, role, rule, phase, kernel."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, lowest and highest of samples; zeros of none."""

    median: float
    lowest: float
    highest: float

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """The spread of samples.

        Example:
            >>> Spread.of([3.0, 1.0, 2.0])
            Spread(median=2.0, lowest=1.0, highest=3.0)
        """
        if not samples:
            return Spread(median=0.0, lowest=0.0, highest=0.0)
        return Spread(median=median(samples), lowest=min(samples), highest=max(samples))


def by_block(windows: Sequence[TraceCosts], *, clock: Clock = "device") -> dict[tuple[str, str], list[float]]:
    """Samples in ms by role and rule, with `(UNATTRIBUTED, "")` for the rest of the optimizer's step, if it has any.

    Example:
        >>> cost = Cost(stage="optimizer", role="router", rule="row_norm", phase="rule", kernel="aten::mul",
        ...             calls=1, device_us=250.0, host_us=250.0)
        >>> step = StepCosts(step=7, wall_us=1000.0, update_us=260.0, costs=(cost,))
        >>> by_block([TraceCosts(device="cpu", worker="rank0", steps=(step, step))])
        {('router', 'row_norm'): [0.25, 0.25]}
    """
    return samples(windows, lambda cost: (cost.role, cost.rule) if cost.in_update else None, milliseconds(clock))


def by_stage(windows: Sequence[TraceCosts], *, clock: Clock = "device") -> dict[Stage, list[float]]:
    """Samples in ms by stage of the training step, all stages, in their order."""
    found = samples(windows, lambda cost: cost.stage, milliseconds(clock))
    return {stage: found.get(stage, [0.0] * len(steps_of(windows))) for stage in STAGES}


def by_phase(windows: Sequence[TraceCosts], *, clock: Clock = "device") -> dict[tuple[str, str, str], list[float]]:
    """Samples in ms by role, rule and phase; the phase is empty where the role is `UNATTRIBUTED`."""
    return samples(
        windows, lambda cost: (cost.role, cost.rule, cost.phase) if cost.in_update else None, milliseconds(clock)
    )


def by_kernel(windows: Sequence[TraceCosts], *, clock: Clock = "device") -> dict[Place, list[float]]:
    """Samples in ms by stage, role, rule, phase and kernel."""
    return samples(windows, place, milliseconds(clock))


def place(cost: Cost) -> Place:
    """Where a cost lies, and its kernel."""
    return cost.stage, cost.role, cost.rule, cost.phase, cost.kernel


def wall_ms(windows: Sequence[TraceCosts]) -> list[float]:
    """Duration of every training step on the host, without validation."""
    return [step.wall_us / 1000 for step in steps_of(windows)]


def update_ms(windows: Sequence[TraceCosts]) -> list[float]:
    """Duration of the optimizer's step (`symopt/step`) on the host, in every training step."""
    return [step.update_us / 1000 for step in steps_of(windows)]


def steps_of(windows: Sequence[TraceCosts]) -> list[StepCosts]:
    """The steps of all windows."""
    return [step for window in windows for step in window.steps]


def samples(
    windows: Sequence[TraceCosts], key: Callable[[Cost], Key | None], value: Callable[[Cost], float]
) -> dict[Key, list[float]]:
    """Samples by what `key` says of a cost, in the order in which keys first appear.

    Args:
        windows: of one run.
        key: where a cost is counted; `None` leaves it out.
        value: what is added up.
    """
    steps = steps_of(windows)
    found: dict[Key, list[float]] = {}
    for number, step in enumerate(steps):
        for cost in step.costs:
            where = key(cost)
            if where is not None:
                found.setdefault(where, [0.0] * len(steps))[number] += value(cost)
    return found


def milliseconds(clock: Clock) -> Callable[[Cost], float]:
    """The time of a cost by a clock, in ms."""
    return (lambda cost: cost.device_us / 1000) if clock == "device" else (lambda cost: cost.host_us / 1000)


def scalars_of(costs: TraceCosts) -> dict[str, float]:
    """The scalars of a window, by tag."""
    windows = [costs]
    wall = wall_ms(windows)
    stages = by_stage(windows)
    roles = samples(windows, lambda cost: cost.role if cost.in_update else None, milliseconds("device"))
    found = {"profile/step_ms": Spread.of(wall).median}
    found |= {f"profile/{stage}_ms": Spread.of(ms).median for stage, ms in stages.items()}
    found["profile/optimizer_share"] = sum(stages["optimizer"]) / sum(wall)
    for role, ms in roles.items():
        tag = role.strip("()")  # TensorBoard has no parentheses in tags
        found[f"profile/ms/{tag}"] = Spread.of(ms).median
        found[f"profile/share/{tag}"] = sum(ms) / sum(wall)
    if roles:
        found["profile/attributed_share"] = costs.attributed_share
    return found
