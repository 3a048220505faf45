"""What each update costs, as rows: by role and rule, and by stage.

Milliseconds are those of one training step: the median over all steps of all windows, and the lowest and the highest.
Shares are ratios of sums over all steps, so that they add up; the share of a training step is of its duration on the
host, without validation. The rows of blocks add up to the optimizer's step, `(unattributed)` being what lies in no
phase, and is always shown. Roles are those of the ranges: `all` stands for what belongs to no block in particular.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lit_symopt.profiling.costs import UNATTRIBUTED, Stage, TraceCosts
from lit_symopt.profiling.reduce import (
    Spread,
    by_block,
    by_phase,
    by_stage,
    milliseconds,
    samples,
    update_ms,
    wall_ms,
)

if TYPE_CHECKING:
    from lit_symopt.profiling.roofline import RooflinePoint

_MOST_KERNELS, _LEAST_SHARE = 2, 0.1  # of a row; all are in the rows for a file


@dataclass(frozen=True, kw_only=True)
class BlockCosts:
    """One row: what the blocks of a role and rule cost.

    Attributes:
        role, rule: of the blocks.
        ms: of the device, in a step.
        host_ms: of the host thread, in a step; on a CPU, where that is the device, of other threads.
        of_update: share of the optimizer's step.
        of_step: share of the training step.
        phase, of_phase: the costliest phase, and its share of this row.
        kernels: the costliest and its share of this row, and the next one with at least a tenth.
        roofline: time at the ceilings over measured time; `None` if not known.
    """

    role: str
    rule: str
    ms: Spread
    host_ms: Spread
    of_update: float
    of_step: float
    phase: str = ""
    of_phase: float = 0.0
    kernels: tuple[tuple[str, float], ...] = ()
    roofline: float | None = None


@dataclass(frozen=True, kw_only=True)
class StageCosts:
    """One row: what a stage of the training step costs; `of_step` is `None` for validation, which is outside."""

    stage: Stage
    ms: Spread
    host_ms: Spread
    of_step: float | None


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """Everything a table says.

    Attributes:
        device: `cpu` or `cuda`.
        windows, steps: how many were measured.
        wall: ms of a training step on the host.
        update: ms of the optimizer's step on the host, as its outer range says.
        parts: ms of the optimizer's step, as the sum of its parts on the device.
        of_update: sum of the parts over `update`, on the host; 1 if nothing is counted twice or lost.
        of_step: share of the training step that the parts take.
        attributed: share of the parts that lies in a phase; NaN without an update.
        blocks: the costliest first, `(unattributed)` last.
        stages: in order.
    """

    device: Literal["cpu", "cuda"]
    windows: int
    steps: int
    wall: Spread
    update: Spread
    parts: Spread
    of_update: float
    of_step: float
    attributed: float
    blocks: tuple[BlockCosts, ...]
    stages: tuple[StageCosts, ...]


def cost_table(windows: Sequence[TraceCosts], points: Iterable[RooflinePoint] = ()) -> CostTable:
    """The table of a run.

    Args:
        windows: of one run; of several ranks, their steps count alike.
        points: of the roofline, for the last column.
    """
    wall, update = wall_ms(windows), update_ms(windows)
    blocks, hosts = by_block(windows), by_block(windows, clock="host")
    for found in (blocks, hosts):
        found.setdefault((UNATTRIBUTED, ""), [0.0] * len(wall))
    parts = [sum(column) for column in zip(*blocks.values(), strict=True)]
    cuda = any(window.device == "cuda" for window in windows)
    # On a CPU the device is the host, and only other threads have a time of their own there.
    on_host = [sum(column) for column in zip(*hosts.values(), strict=True)] if cuda else parts
    reached = {(point.role, point.rule): point.share for point in points}
    inside = _Inside(windows)
    rows = [
        BlockCosts(
            role=role,
            rule=rule,
            ms=Spread.of(ms),
            host_ms=Spread.of(hosts[role, rule]),
            of_update=_ratio(ms, parts),
            of_step=_ratio(ms, wall),
            phase=inside.phase(role, rule)[0],
            of_phase=inside.phase(role, rule)[1],
            kernels=inside.kernels(role, rule),
            roofline=reached.get((role, rule)),
        )
        for (role, rule), ms in blocks.items()
    ]
    stages, stage_hosts = by_stage(windows), by_stage(windows, clock="host")
    phased = sum(sum(ms) for (_, _, phase), ms in by_phase(windows).items() if phase)
    return CostTable(
        device="cuda" if cuda else "cpu",
        windows=len(windows),
        steps=len(wall),
        wall=Spread.of(wall),
        update=Spread.of(update),
        parts=Spread.of(parts),
        of_update=_ratio(on_host, update),
        of_step=_ratio(parts, wall),
        attributed=phased / sum(parts) if sum(parts) else float("nan"),
        blocks=tuple(sorted(rows, key=lambda row: (row.role == UNATTRIBUTED, -row.ms.median, -row.of_update))),
        stages=tuple(
            StageCosts(
                stage=stage,
                ms=Spread.of(ms),
                host_ms=Spread.of(stage_hosts[stage]),
                of_step=None if stage == "validation" else _ratio(ms, wall),
            )
            for stage, ms in stages.items()
        ),
    )


class _Inside:
    """Phases and kernels of each row, by share."""

    def __init__(self, windows: Sequence[TraceCosts]) -> None:
        self._phases: dict[tuple[str, str], dict[str, float]] = {}
        self._kernels: dict[tuple[str, str], dict[str, float]] = {}
        for (role, rule, phase), ms in by_phase(windows).items():
            self._phases.setdefault((role, rule), {})[phase] = sum(ms)
        kernels = samples(
            windows,
            lambda cost: (cost.role, cost.rule, cost.kernel) if cost.in_update else None,
            milliseconds("device"),
        )
        for (role, rule, kernel), ms in kernels.items():
            self._kernels.setdefault((role, rule), {})[kernel] = sum(ms)

    def phase(self, role: str, rule: str) -> tuple[str, float]:
        return next(iter(_shares(self._phases.get((role, rule), {}))), ("", 0.0))

    def kernels(self, role: str, rule: str) -> tuple[tuple[str, float], ...]:
        found = _shares(self._kernels.get((role, rule), {}))
        return (*found[:1], *(kernel for kernel in found[1:_MOST_KERNELS] if kernel[1] >= _LEAST_SHARE))


def _shares(parts: dict[str, float]) -> list[tuple[str, float]]:
    whole = sum(parts.values())
    return [(name, part / whole) for name, part in sorted(parts.items(), key=lambda item: -item[1]) if part > 0]


def _ratio(part: Sequence[float], whole: Sequence[float]) -> float:
    return sum(part) / sum(whole) if sum(whole) else 0.0
