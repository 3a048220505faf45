"""Costs made up for tests: what a trace would have said of a small run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from lit_symopt.profiling.costs import HOST, UNATTRIBUTED, Cost, Stage, StepCosts, TraceCosts

# Role, rule, phase, kernel, calls, µs: roughly a tiny mixture of experts on one core.
PLACES = (
    ("query", "spectral", "momentum", "aten::_foreach_lerp_", 4, 140.0),
    ("query", "spectral", "rule", "aten::bmm", 30, 2100.0),
    ("query", "spectral", "rule", "aten::baddbmm", 15, 900.0),
    ("query", "spectral", "write", "aten::_foreach_add_", 4, 110.0),
    ("expert_gate", "spectral", "pack", "aten::cat", 2, 310.0),
    ("expert_gate", "spectral", "rule", "aten::bmm", 30, 5200.0),
    ("expert_gate", "spectral", "write", "aten::_foreach_add_", 4, 260.0),
    ("router", "left_spectral", "rule", "aten::linalg_eigh", 2, 640.0),
    ("router", "left_spectral", "momentum", "aten::_foreach_lerp_", 2, 40.0),
    ("embedding", "row_norm", "rule", "aten::linalg_vector_norm", 1, 220.0),
    ("embedding", "row_norm", "scale", "aten::mul", 2, 130.0),
    ("lm_head", "row_norm", "rule", "aten::linalg_vector_norm", 1, 240.0),
    ("vector", "adamw", "rule", "aten::_fused_adamw_", 1, 75.0),
    ("all", "step", "prepare", HOST, 1, 90.0),
    ("all", "finite", "check", "aten::isfinite", 12, 60.0),
)
STAGES: tuple[tuple[Stage, str, float], ...] = (
    ("data", HOST, 800.0),
    ("forward", "aten::mm", 14_000.0),
    ("forward", "aten::_softmax", 3_000.0),
    ("backward", "aten::mm", 31_000.0),
    ("other", HOST, 1_500.0),
)


def cost(
    role: str,
    rule: str,
    phase: str,
    us: float,
    *,
    kernel: str = "aten::mul",
    calls: float = 1.0,
    stage: Stage = "optimizer",
    host_us: float = 0.0,
) -> Cost:
    """One cost; as on a CPU, if nothing is said of the host."""
    return Cost(
        stage=stage, role=role, rule=rule, phase=phase, kernel=kernel, calls=calls, device_us=us, host_us=host_us
    )


def step(costs: Iterable[Cost], *, number: int = 0, wall_us: float | None = None) -> StepCosts:
    """A step that lasts as long as its costs, if nothing else is said."""
    costs = tuple(costs)

    def lasts(parts: Iterable[Cost]) -> float:
        parts = tuple(parts)
        return sum(part.host_us for part in parts) or sum(part.device_us for part in parts)

    wall = lasts(part for part in costs if part.stage != "validation") if wall_us is None else wall_us
    return StepCosts(step=number, wall_us=wall, update_us=lasts(part for part in costs if part.in_update), costs=costs)


def window(*steps: StepCosts, device: Literal["cpu", "cuda"] = "cpu", worker: str = "rank0") -> TraceCosts:
    """A trace of steps."""
    return TraceCosts(device=device, worker=worker, steps=steps)


def realistic(
    factor: float = 1.0, *, device: Literal["cpu", "cuda"] = "cpu", lost_us: float = 85.0
) -> list[TraceCosts]:
    """Two windows of three steps of a tiny mixture of experts.

    Args:
        factor: on the time of every phase.
        device: on a GPU the host takes 1.8 times as long.
        lost_us: in no phase.
    """

    def one(number: int, jitter: float) -> StepCosts:
        slower = factor * jitter
        host = 0.0 if device == "cpu" else 1.8
        places = [
            cost(role, rule, phase, us * slower, kernel=kernel, calls=calls, host_us=us * slower * host)
            for role, rule, phase, kernel, calls, us in PLACES
        ]
        lost = cost(UNATTRIBUTED, "", "", lost_us, kernel=HOST, host_us=lost_us * host)
        stages = [
            cost("", "", "", us * jitter, kernel=kernel, calls=9, stage=stage, host_us=us * jitter * host)
            for stage, kernel, us in STAGES
        ]
        return step([*stages[:-1], *places, lost, stages[-1]], number=number)

    steps = [one(number, jitter) for number, jitter in enumerate((1.0, 1.06, 0.97, 1.02, 0.99, 1.1))]
    return [window(*steps[:3], device=device), window(*steps[3:], device=device)]
