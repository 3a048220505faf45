"""What a trace says: the time of every kernel in every step, by stage, role, rule and phase.

Times are microseconds, as in a trace. On a CPU the host is the device: `device_us` is the self time of operators, and
of the Python between them, on the main thread; `host_us` is that of other threads, which run in parallel with it. With
a GPU `device_us` is the time of kernels, copies and fills, each where it was launched, and `host_us` the self time of
all threads of the host; the two overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Stage = Literal["data", "forward", "backward", "optimizer", "validation", "other"]
STAGES: tuple[Stage, ...] = get_args(Stage)

STAGE_RANGE = "train/"
"""What the ranges of stages begin with: `train/forward`. What lies in none of them is `other`."""

UNATTRIBUTED = "(unattributed)"
"""The role of what a step of the optimizer spends outside the ranges of its phases."""

HOST = "(between operators)"
"""The kernel of what the host spends inside a range, but in no operator: Python, and waiting for other processes."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The time of one kernel in one place.

    Attributes:
        stage: of the training step.
        role, rule, phase: of the optimizer's step; empty elsewhere. `UNATTRIBUTED` is a role.
        kernel: name of the operator, of the GPU kernel, or `HOST`.
        calls: how often; a fraction where a batch of several roles was split.
        device_us: time of the device.
        host_us: time of the host's threads that is not `device_us`.
    """

    stage: Stage
    role: str = ""
    rule: str = ""
    phase: str = ""
    kernel: str
    calls: float
    device_us: float
    host_us: float

    @property
    def attributed(self) -> bool:
        """Whether it lies in a phase of the optimizer's step."""
        return bool(self.phase)

    @property
    def in_update(self) -> bool:
        """Whether it lies in the optimizer's step (`symopt/step`), attributed or not."""
        return bool(self.role)


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """One training step.

    Attributes:
        step: the number in the profiler's own range, `ProfilerStep#12`.
        wall_us: its duration on the host, without validation.
        update_us: duration on the host of the optimizer's steps in it (`symopt/step`).
        costs: everything in it, each place and kernel once.
    """

    step: int
    wall_us: float
    update_us: float
    costs: tuple[Cost, ...]

    def device_us(self, belongs: Callable[[Cost], bool] = lambda cost: True) -> float:
        """Device time of the costs that `belongs` says."""
        return sum(cost.device_us for cost in self.costs if belongs(cost))


@dataclass(frozen=True, kw_only=True)
class TraceCosts:
    """One window: the whole steps of one trace.

    Attributes:
        device: `cpu`, or `cuda` if there are kernels of a GPU in it.
        worker: who wrote it, from the name of the file: `rank0`.
        steps: in order.
    """

    device: Literal["cpu", "cuda"]
    worker: str
    steps: tuple[StepCosts, ...]

    @property
    def attributed_share(self) -> float:
        """Share of the device time of the optimizer's steps that lies in a phase; NaN without any."""
        update = sum(step.device_us(lambda cost: cost.in_update) for step in self.steps)
        known = sum(step.device_us(lambda cost: cost.attributed) for step in self.steps)
        return known / update if update else float("nan")

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> TraceCosts:
        """What `to_json` gave."""
        steps = tuple(
            StepCosts(**{**step, "costs": tuple(Cost(**cost) for cost in step["costs"])}) for step in value["steps"]
        )
        return TraceCosts(**{**value, "steps": steps})


def total(costs: Iterable[Cost], key: Callable[[Cost], Any]) -> dict[Any, float]:
    """Device time by what `key` says of a cost, in the order in which keys first appear."""
    found: dict[Any, float] = {}
    for cost in costs:
        found[key(cost)] = found.get(key(cost), 0.0) + cost.device_us
    return found
