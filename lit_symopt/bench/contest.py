"""Contestants step in turn, and their times are put beside that of the first.

Rounds go A B C, B C A, C A B, ...: what drifts over seconds meets all alike, and nobody always follows the same other.
A round of a contestant is a number of steps, of which each is timed; the ratio of two contestants is that of the
medians of their rounds, with the lowest and highest ratio of any single round.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch

WARM_UP = 2
"""Steps that are not timed: the first makes state, and compiles what is compiled."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """Somebody who can take a step.

    Attributes:
        name: in the table.
        step: takes one step of the optimizer, whatever it consists of.
        about: what runs, in a few words.
        iterations: of the orthogonalization; `None` where there is none.
        least_bytes: that a step must at least read and write.
        products: dtype of its matrix products; `None` where there are none.
        kept: bytes of scratch memory that it keeps from step to step.
    """

    name: str
    step: Callable[[], object]
    about: str = ""
    iterations: int | None = None
    least_bytes: float = 0.0
    products: torch.dtype | None = None
    kept: Callable[[], int] = lambda: 0


@dataclass(frozen=True)
class Times:
    """Seconds of the steps of a contestant.

    Attributes:
        rounds: of each round, the time of each step.
    """

    rounds: tuple[tuple[float, ...], ...]

    @property
    def steps(self) -> list[float]:
        """Of all rounds."""
        return [step for round_ in self.rounds for step in round_]

    @property
    def median(self) -> float:
        """Of all steps."""
        return median(self.steps)

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and the highest."""
        return min(self.steps), max(self.steps)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between which half of the steps lie."""
        if len(self.steps) < 2:
            return self.steps[0], self.steps[0]
        low, _, high = quantiles(self.steps, n=4, method="inclusive")
        return low, high

    def over(self, other: Times) -> Ratio:
        """This one's time as a multiple of another's, who stepped in the same rounds.

        Example:
            >>> Times(((4.0, 4.0), (6.0, 9.0))).over(Times(((2.0, 2.0), (2.0, 3.0))))
            Ratio(value=2.5, lowest=2.0, highest=3.0)
        """
        each = [median(a) / median(b) for a, b in zip(self.rounds, other.rounds, strict=True)]
        return Ratio(value=self.median / other.median, lowest=min(each), highest=max(each))


@dataclass(frozen=True)
class Ratio:
    """How many times as long something takes.

    Attributes:
        value: of the medians of all steps.
        lowest, highest: of the medians of one round.
    """

    value: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"×{self.value:.2f} ({self.lowest:.2f} to {self.highest:.2f})"


@dataclass
class Outcome:
    """What a contest found.

    Attributes:
        times: by contestant.
        failed: what those said who could not go on.
    """

    times: dict[str, Times] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def compete(contestants: Sequence[Contestant], *, rounds: int, steps: int, device: torch.device) -> Outcome:
    """Lets everybody step in turn.

    Args:
        contestants: with names of their own; the first one's error is raised, that of the others is part of the
            outcome.
        rounds: how often everybody has a turn.
        steps: in a turn.
        device: on which they compute.
    """
    outcome, running = Outcome(), list(contestants)
    found: dict[str, list[tuple[float, ...]]] = {contestant.name: [] for contestant in contestants}

    def turn(contestant: Contestant, count: int) -> None:
        try:
            found[contestant.name].append(tuple(timed(contestant.step, device) for _ in range(count)))
        except Exception as error:
            if contestant is contestants[0]:
                raise
            outcome.failed[contestant.name] = short(error)

    for contestant in running:
        turn(contestant, WARM_UP)
        found[contestant.name].clear()
    with _without_collection():
        for number in range(rounds):
            running = [contestant for contestant in running if contestant.name not in outcome.failed]
            first = number % len(running)
            for contestant in [*running[first:], *running[:first]]:
                turn(contestant, steps)
    outcome.times = {name: Times(tuple(times)) for name, times in found.items() if name not in outcome.failed}
    return outcome


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device is done."""
    _wait(device)
    began = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - began


def short(error: BaseException) -> str:
    """An error as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def _without_collection() -> Iterator[None]:
    """No pause of the garbage collector within a step."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
