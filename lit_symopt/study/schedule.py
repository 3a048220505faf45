"""Which run comes next: the trials of all searches in turn, then the final runs of those that are over."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from lit_symopt.errors import ConfigError
from lit_symopt.study.plan import Names, Run, finals, trial
from lit_symopt.study.result import RESULT, Result, read_results
from lit_symopt.study.search import Searcher, best
from lit_symopt.study.spec import Study


@dataclass
class _Pair:
    """A contender in a family: it has one trial at a time, and final runs once no trial is left."""

    family: str
    contender: str
    searches: bool
    done: int = 0
    open: bool = False
    left: deque[Run] | None = None
    stopped: str = ""


@dataclass
class Schedule:
    """What there is to run, in an order that depends on nothing but the results so far.

    Args:
        study: that is run.
        folder: with its results.
        searcher: that proposes rates.

    Raises:
        ConfigError: if two runs would have the same name, or a result cannot be read.
    """

    study: Study
    folder: Path
    searcher: Searcher
    results: dict[str, Result] = field(init=False)

    def __post_init__(self) -> None:
        self.results = {result.run: result for result in read_results(self.folder)}
        self._names = Names(self.study)
        self._pairs = [
            _Pair(family.name, contender.name, bool(contender.axes(family.name)))
            for family, contender in self.study.pairs()
        ]
        for pair in self._pairs:
            if pair.searches:
                trials = [one for one in self.results.values() if one.purpose == "trial"]
                pair.done = sum((one.family, one.contender) == (pair.family, pair.contender) for one in trials)

    @property
    def total(self) -> int:
        """Runs of the whole study."""
        return sum(self._size(pair) for pair in self._pairs)

    def next(self) -> Run | None:
        """A run to start now; `None` if there is none, or none before another one has ended."""
        for pair in sorted((pair for pair in self._pairs if pair.searches), key=lambda pair: pair.done):
            if pair.open or pair.stopped or pair.left is not None:
                continue
            rates = self.searcher.next(pair.family, pair.contender)
            if rates is not None:
                pair.open = True
                return self._named(trial(self.study, family=pair.family, contender=pair.contender, rates=rates))
        for pair in self._pairs:
            if pair.left is None and not pair.open and not pair.stopped:
                pair.left = deque(self._finals(pair))
            if pair.left:
                return pair.left.popleft()
        return None

    def done(self, run: Run, result: Result) -> None:
        """A run has ended with a result."""
        self.results[run.name] = result
        if run.purpose == "trial":
            pair = self._pair(run)
            self.searcher.tell(run.family, run.contender, run.rates, result.loss)
            pair.open, pair.done = False, pair.done + 1

    def failed(self, run: Run) -> None:
        """A run has ended without one: what depends on it does not come."""
        if run.purpose == "trial":
            pair = self._pair(run)
            pair.open, pair.stopped = False, f"{run.name} failed"

    @property
    def stopped(self) -> dict[str, str]:
        """Searches that could not go on, and why."""
        return {f"{pair.contender} in {pair.family}": pair.stopped for pair in self._pairs if pair.stopped}

    def _finals(self, pair: _Pair) -> list[Run]:
        """Those that are not done; a result of other rates, before there were more trials, is taken away."""
        rates: dict[str, float] = {}
        if pair.searches:
            try:
                rates = best(self.results.values(), pair.family, pair.contender)
            except ConfigError as error:
                pair.stopped = str(error)
                return []
        missing = []
        for run in finals(self.study, family=pair.family, contender=pair.contender, rates=rates):
            self._named(run)
            found = self.results.get(run.name)
            if found is not None and _same(found.options, run.options(self.study)):
                continue
            if found is not None:
                del self.results[run.name]
                (run.folder(self.folder) / RESULT).unlink(missing_ok=True)
            missing.append(run)
        return missing

    def _named(self, run: Run) -> Run:
        self._names.add(run)
        return run

    def _pair(self, run: Run) -> _Pair:
        return next(pair for pair in self._pairs if (pair.family, pair.contender) == (run.family, run.contender))

    def _size(self, pair: _Pair) -> int:
        contender = self.study.contender(pair.contender)
        last = len(contender.lengths) * len(self.study.seeds)
        if not pair.searches or self.study.search is None:
            return last
        grid = prod(len(axis.values or ()) for axis in contender.axes(pair.family))
        return last + (self.study.search.trials or grid)


def _same(one: object, other: object) -> bool:
    """Whether two sets of options are equal once written."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
