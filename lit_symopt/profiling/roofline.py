"""How near each update runs to what the machine can do.

    least time = max(operations / peak of the dtype, bytes / bandwidth),   share = least time / measured time

The operations and bytes are those of `expected_work`, the least a step can do; the peak is that of a large matrix
product, the bandwidth that of a large copy. A share of one is a rule that cannot become faster on this machine. Three
things to know when reading it:

- A decomposition (`eigh`, `svd`) reaches a small part of the peak of a product on any machine; its share says so.
- The bytes are counted once, however many passes a rule takes over its data: the share of a rule that is bound by
  memory is at most one over its passes.
- It can exceed one for blocks that fit the cache, which is faster than the copy.

Communication is left out on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from lit_symopt.errors import ProfileError
from lit_symopt.profiling.costs import Cost, StepCosts, TraceCosts
from lit_symopt.profiling.run import Ceilings, Work

COMMUNICATION = "communication"
"""The phase that no expectation covers."""


@dataclass(frozen=True, kw_only=True)
class RooflinePoint:
    """One role and rule under its roof.

    Attributes:
        role, rule: of the blocks.
        dtype: in which the products are computed; several are joined by `+`.
        flops, bytes: expected in one step.
        measured_us: device time of one step, the median over the steps.
        compute_us, memory_us: the least time that the operations, and that the bytes, take at the ceilings.
    """

    role: str
    rule: str
    dtype: str
    flops: float
    bytes: float
    measured_us: float
    compute_us: float
    memory_us: float

    @property
    def least_us(self) -> float:
        """The least time of one step at the ceilings."""
        return max(self.compute_us, self.memory_us)

    @property
    def bound(self) -> Literal["compute", "memory"]:
        """What the least time is spent on."""
        return "compute" if self.compute_us > self.memory_us else "memory"

    @property
    def share(self) -> float:
        """Least over measured time."""
        return self.least_us / self.measured_us

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes

    @property
    def flops_per_second(self) -> float:
        """Operations a second that were reached."""
        return self.flops / self.measured_us * 1e6

    @property
    def bytes_per_second(self) -> float:
        """Bytes a second that were reached."""
        return self.bytes / self.measured_us * 1e6

    def to_json(self) -> dict[str, Any]:
        """Plain types, with everything that follows from the fields."""
        derived = ("least_us", "bound", "share", "intensity", "flops_per_second", "bytes_per_second")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def roofline(windows: Sequence[TraceCosts], work: Sequence[Work], ceilings: Ceilings) -> tuple[RooflinePoint, ...]:
    """The points of all roles and rules of which something was both expected and measured, in the order of `work`.

    Args:
        windows: of one rank; the median is over the steps of all of them.
        work: of the same rank, for one step.
        ceilings: of the same machine.

    Raises:
        ProfileError: if the peak of a dtype was not measured.

    Example:
        >>> from lit_symopt.profiling.costs import Cost, StepCosts
        >>> cost = Cost(stage="optimizer", role="query", rule="spectral", phase="rule", kernel="aten::bmm", calls=1,
        ...             device_us=200.0, host_us=200.0)
        >>> step = StepCosts(step=3, wall_us=900.0, update_us=210.0, costs=(cost,))
        >>> work = Work(role="query", rule="spectral", flops=5e6, bytes=1e5, dtype="float64", blocks=1, elements=6250)
        >>> ceilings = Ceilings(flops={"float64": 5e10}, bytes_per_second=1e10)
        >>> (point,) = roofline([TraceCosts(device="cpu", worker="rank0", steps=(step,))], [work], ceilings)
        >>> point.bound, point.least_us, point.share, point.intensity
        ('compute', 100.0, 0.5, 50.0)
    """
    together: dict[tuple[str, str], list[Work]] = {}
    for one in work:
        if one.dtype not in ceilings.flops:
            raise ProfileError(
                f"the matrix products of {one.role}/{one.rule} are computed in {one.dtype}, whose peak was not "
                f"measured (only {', '.join(ceilings.flops) or 'none'}); give measure_ceilings this dtype too"
            )
        together.setdefault((one.role, one.rule), []).append(one)
    steps = [step for window in windows for step in window.steps]
    points = []
    for (role, rule), parts in together.items():
        measured = _measured(steps, role=role, rule=rule)
        total = sum(part.bytes for part in parts)
        if measured <= 0 or total <= 0:
            continue
        points.append(
            RooflinePoint(
                role=role,
                rule=rule,
                dtype="+".join(dict.fromkeys(part.dtype for part in parts)),
                flops=sum(part.flops for part in parts),
                bytes=total,
                measured_us=measured,
                compute_us=sum(part.flops / ceilings.flops[part.dtype] for part in parts) * 1e6,
                memory_us=total / ceilings.bytes_per_second * 1e6,
            )
        )
    return tuple(points)


def _measured(steps: Sequence[StepCosts], *, role: str, rule: str) -> float:
    """Median device time of a step in microseconds, without communication; zero without any."""

    def belongs(cost: Cost) -> bool:
        return (cost.role, cost.rule) == (role, rule) and cost.phase != COMMUNICATION

    return median([step.device_us(belongs) for step in steps]) if steps else 0.0
