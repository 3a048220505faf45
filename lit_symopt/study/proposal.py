"""What a search tries next: a point of rates, from the points so far and their losses, by one of Optuna's samplers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from lit_symopt.study.spec import Axis, Search

if TYPE_CHECKING:
    from optuna.distributions import FloatDistribution
    from optuna.samplers import BaseSampler

DIGITS = 3
"""Significant digits of proposed rates."""

# Trials before the model decides, the start among them: of 12 over three rates, 2 and 4 do as well, 6 are too many.
_BEFORE_MODEL = 3
# What is worse than the best by more than this multiple of what the median is worse counts as that much worse: beside
# a run that nearly diverged, the differences that matter would vanish.
_WORST = 2.0
_LEAST_WIDTH = 0.05  # nats a token; keeps a trial that diverged above one that did not
_ATTEMPTS = 100  # at a point that was not tried yet

Point = tuple[float, ...]
Trial = tuple[Point, float | None]
"""Rates in the order of the axes, and the loss; `None`: diverged."""


def propose(trials: Sequence[Trial], axes: Sequence[Axis], settings: Search, *, seed: int) -> Point | None:
    """The point to try after these trials: the start first, then what the sampler says, rounded.

    Args:
        trials: all of this search so far, in their order.
        axes: ranges, in the order of the rates of a point.
        settings: which sampler.
        seed: of this proposal; the same trials with the same seed give the same point.

    Returns:
        A point that is not among the trials; `None` if none was found.
    """
    import optuna

    tried = {point for point, _ in trials}
    start = tuple(axis.start for axis in axes if axis.start is not None)
    if start not in tried:
        return start
    distributions = {axis.option: distribution(axis) for axis in axes}
    values = flattened([loss for _, loss in trials])
    sampler = _sampler(settings, seed)
    for _ in range(_ATTEMPTS):
        study = optuna.create_study(sampler=sampler)
        for (point, _), value in zip(trials, values, strict=True):
            params = dict(zip(distributions, point, strict=True))
            study.add_trial(optuna.create_trial(params=params, distributions=dict(distributions), value=value))
        asked = study.ask(dict(distributions)).params
        found = tuple(_rounded(asked[axis.option]) for axis in axes)
        if found not in tried:
            return found
        sampler = optuna.samplers.RandomSampler(seed=seed)  # the model wants a point again: one from anywhere
        seed += 1
    return None


def flattened(losses: Sequence[float | None]) -> list[float]:
    """Losses as the sampler shall see them: with `m` the median of the finite ones, at most `min + 2 (m − min)`.

    A trial that diverged gets that upper bound.

    Example:
        >>> flattened([3.0, 3.25, 3.5, 9.0, None])  # the median is 3.375
        [3.0, 3.25, 3.5, 3.75, 3.75]
    """
    finite = [loss for loss in losses if loss is not None]
    lowest = min(finite, default=0.0)
    highest = lowest + _WORST * max(median(finite) - lowest, _LEAST_WIDTH) if finite else 1.0
    return [highest if loss is None else min(loss, highest) for loss in losses]


def distribution(axis: Axis) -> FloatDistribution:
    """The range of an axis for Optuna, its ends rounded like what is proposed."""
    from optuna.distributions import FloatDistribution

    start = axis.low if axis.start is None else axis.start
    return FloatDistribution(min(_rounded(axis.low), start), max(_rounded(axis.high), start), log=True)


def _sampler(settings: Search, seed: int) -> BaseSampler:
    from optuna import samplers

    if settings.sampler == "gp":
        return samplers.GPSampler(seed=seed, n_startup_trials=_BEFORE_MODEL, deterministic_objective=False)
    if settings.sampler == "tpe":
        return samplers.TPESampler(seed=seed, n_startup_trials=_BEFORE_MODEL, multivariate=True)
    return samplers.RandomSampler(seed=seed)


def _rounded(rate: float) -> float:
    return float(f"{rate:.{DIGITS}g}")
