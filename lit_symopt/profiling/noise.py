"""How sure a time is: what noise does to the samples of a record, and what is left of it.

Other programs only ever add time, in bursts and for minutes, and each process is a little faster or slower as a whole.
So the lowest of the steps of each window is taken, and of what has parts the sum of the lowest of each, `q_rw` (round
r, window w): a burst seldom meets every step of a window, but often every long one. What a window does to everything is
taken out, and processes are what counts as repeated:

    ℓ_rw = log q_rw − v_rw
    v_rw = median over groups of (log g_rw − median_rw log g_rw)      g: `q` of forward and backward, and of each rule
    T    = exp median_rw ℓ_rw                                         the time
    s²   = max(V(median_w ℓ_rw), V(ℓ_rw))                             the squared standard error of log T

where V is the variance of a mean of such numbers: `(1.4826 · MAD)² / n`, and for fewer than four `(range / d)² / n`
with d = 1.128 or 1.693, what the range of 2 or 3 normal numbers is expected to be. Of a single window, V is that of its
steps. A cost that only some steps have is not in the lowest of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from statistics import median

from lit_symopt.profiling.samples import Samples, added

_EXPECTED_RANGE = {2: 1.128, 3: 1.693}
Windows = list[list[float]]
"""A number of each window, `[round][window]`."""

_TO_DEVIATION = 1.4826  # of a normal distribution, from the median absolute deviation


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A time, and how sure it is.

    Attributes:
        value: in the unit of the samples.
        error: standard error of its logarithm: about what it is off by, as a share.
    """

    value: float
    error: float


def estimate(*parts: Samples, speed: Windows | None = None) -> Estimate:
    """The time of a step.

    Args:
        parts: samples `[round][window][step]` of what makes it up.
        speed: `v` of each window, from `speed_of`; default: zeros.

    Example:
        >>> samples = (((10.0, 10.0, 30.0), (10.0, 10.0, 10.0)), ((12.0, 12.0, 12.0), (12.0, 14.0, 12.0)))
        >>> one = estimate(samples)
        >>> round(one.value, 2), round(one.error, 2)
        (10.95, 0.11)
    """
    lowest = lowest_of(parts)
    if speed is None:
        speed = [[0.0] * len(round_) for round_ in lowest]
    logs = [
        [log(value) - v for value, v in zip(values, of_round, strict=True) if value > 0]
        for values, of_round in zip(lowest, speed, strict=True)
    ]
    logs = [round_ for round_ in logs if round_]
    windows = [value for round_ in logs for value in round_]
    if not windows:
        return Estimate(value=0.0, error=0.0)
    levels = [[median(round_) for round_ in logs], windows]
    if len(windows) == 1:
        levels.append([log(value) for round_ in added(parts) for window in round_ for value in window if value > 0])
    return Estimate(value=exp(median(windows)), error=sqrt(max(map(_variance_of_mean, levels))))


def speed_of(groups: Sequence[Sequence[Samples]]) -> Windows:
    """How slow the machine was in each window, `v`: the logarithm of a factor.

    Args:
        groups: of each, the samples of its parts.

    Example:
        >>> slow_in_the_second = ((((1.0, 1.0), (2.0, 2.0), (1.0, 1.0)),),)
        >>> [round(v, 2) for v in speed_of([slow_in_the_second])[0]]
        [0.0, 0.69, 0.0]
    """
    each = []
    for parts in groups:
        lowest = lowest_of(parts)
        values = [value for round_ in lowest for value in round_]
        if values and min(values) > 0:
            middle = median(map(log, values))
            each.append([[log(value) - middle for value in round_] for round_ in lowest])
    return [[median(window) for window in zip(*rounds, strict=True)] for rounds in zip(*each, strict=True)]


def lowest_of(parts: Sequence[Samples]) -> Windows:
    """`q` of each window."""
    return [[sum(map(min, windows)) for windows in zip(*round_, strict=True)] for round_ in zip(*parts, strict=True)]


def over_rounds(*parts: Samples) -> list[float]:
    """The time of a step in each round."""
    return [estimate(*((round_,) for round_ in rounds)).value for rounds in zip(*parts, strict=True)]


def _variance_of_mean(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    if len(values) in _EXPECTED_RANGE:
        deviation = (max(values) - min(values)) / _EXPECTED_RANGE[len(values)]
    else:
        middle = median(values)
        deviation = _TO_DEVIATION * median(abs(value - middle) for value in values)
    return deviation**2 / len(values)
