"""The search of rates: what each contender tries next in each family, and which of its trials was best.

The losses of the runs on disk are what a search knows; Optuna's journal in the folder of the study keeps the trials in
their order, also the open one. A proposal depends on nothing but the earlier trials of its search, the names and the
seed: a study that was killed goes on as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from zlib import crc32

from lit_symopt.errors import ConfigError
from lit_symopt.study.proposal import Point, distribution, propose
from lit_symopt.study.result import Result, read_results
from lit_symopt.study.spec import Axis, Search, Study

if TYPE_CHECKING:
    from optuna import Study as OptunaStudy
    from optuna.storages import BaseStorage

JOURNAL = "optuna.journal"


class Searcher:
    """All searches of a study, one for each family and contender.

    Rates of a range are rounded to three significant digits; the first trial is the start of every range. A trial is
    open from `next` to `tell`, also over the end of the process.

    Args:
        study: what is searched.
        folder: of the study, which exists; holds the journal, and below `runs` the results that are told.

    Raises:
        ConfigError: if Optuna is missing, or what lies in the folder is not of this search.
    """

    def __init__(self, study: Study, folder: Path) -> None:
        self._searches: dict[tuple[str, str], _Trials] = {}
        settings = study.search
        if settings is None:
            return
        results = read_results(folder)
        storage = None
        for family, contender in study.pairs():
            axes = contender.axes(family.name)
            if not axes:
                continue
            names = family.name, contender.name
            told = _told(results, axes, *names)
            if settings.sampler == "grid":
                self._searches[names] = _Grid(axes, told)
            else:
                storage = storage or _journal(folder / JOURNAL, settings)
                self._searches[names] = _Model(axes, settings, names, storage, told)

    def next(self, family: str, contender: str) -> dict[str, float] | None:
        """Rates to try, by option: the same until they are told; `None` when there is nothing left to try."""
        search = self._searches.get((family, contender))
        point = None if search is None else search.next()
        return None if search is None or point is None else search.rates(point)

    def tell(self, family: str, contender: str, rates: Mapping[str, float], loss: float | None) -> None:
        """The final loss of a trial.

        Args:
            family, contender: whose.
            rates: that `next` gave.
            loss: `None`, or not finite: the run diverged, which counts as a trial.

        Raises:
            ConfigError: for rates that were not asked for.
        """
        search = self._searches.get((family, contender))
        if search is None:
            raise ConfigError(f"{contender} searches nothing in {family}; only runs of a search can be told")
        point = search.point(rates)
        if point not in search.asked():
            raise ConfigError(f"{contender} in {family} did not ask for {dict(rates)}; tell the rates that next() gave")
        search.tell(point, loss if loss is not None and math.isfinite(loss) else None)


def best(results: Iterable[Result], family: str, contender: str) -> dict[str, float]:
    """The rates of the finished trial with the lowest loss; of equal ones that of the first name.

    Raises:
        ConfigError: if no trial finished.
    """
    trials = [one for one in results if (one.family, one.contender, one.purpose) == (family, contender, "trial")]
    finished = [(one.loss, one.run, one) for one in trials if one.status == "finished" and one.loss is not None]
    if not finished:
        raise ConfigError(
            f"none of the {len(trials)} trials of {contender} in {family} finished; start the search at lower rates"
        )
    return dict(min(finished, key=lambda entry: entry[:2])[2].rates)


class _Trials(Protocol):
    """What `_Grid` and `_Model` share."""

    def next(self) -> Point | None: ...

    def tell(self, point: Point, loss: float | None) -> None: ...

    def asked(self) -> Sequence[Point]: ...

    def point(self, rates: Mapping[str, float]) -> Point: ...

    def rates(self, point: Point) -> dict[str, float]: ...


class _Axes:
    def __init__(self, axes: Sequence[Axis], told: Mapping[Point, float | None]) -> None:
        self.axes = axes
        self.told = dict(told)

    def point(self, rates: Mapping[str, float]) -> Point:
        return _point(rates, self.axes)

    def rates(self, point: Point) -> dict[str, float]:
        return {axis.option: rate for axis, rate in zip(self.axes, point, strict=True)}


class _Grid(_Axes):
    """All combinations of the values, the last axis fastest. Needs no journal: it follows from what is told."""

    def next(self) -> Point | None:
        return next((point for point in self.asked() if point not in self.told), None)

    def asked(self) -> Sequence[Point]:
        return list(product(*(axis.values or () for axis in self.axes)))

    def tell(self, point: Point, loss: float | None) -> None:
        self.told[point] = loss


class _Model(_Axes):
    """Trials by one of Optuna's samplers, kept in its journal."""

    def __init__(
        self,
        axes: Sequence[Axis],
        settings: Search,
        names: tuple[str, str],
        storage: BaseStorage,
        told: Mapping[Point, float | None],
    ) -> None:
        import optuna

        super().__init__(axes, told)
        self.settings, self.names = settings, names
        self.distributions = {axis.option: distribution(axis) for axis in axes}
        self.study: OptunaStudy = optuna.create_study(
            storage=storage, study_name="/".join(names), direction="minimize", load_if_exists=True
        )
        for point, loss in told.items():
            if point in self.asked():
                self.tell(point, loss)
            else:
                self._add(point, complete=True)

    def next(self) -> Point | None:
        asked = self.asked()
        open_ = next((point for point in asked if point not in self.told), None)
        if open_ is not None or len(asked) >= (self.settings.trials or 0):
            return open_
        label = f"{self.settings.seed}/{'/'.join(self.names)}/{len(asked)}"
        point = propose([(point, self.told[point]) for point in asked], self.axes, self.settings, seed=_seed(label))
        if point is not None:
            self._add(point, complete=False)
        return point

    def asked(self) -> Sequence[Point]:
        return [self.point(trial.params) for trial in self.study.get_trials(deepcopy=False)]

    def tell(self, point: Point, loss: float | None) -> None:
        self.told[point] = loss
        # The journal of a run that was repeated, because its folder was removed, keeps the first loss.
        self.study.tell(self.asked().index(point), _value(loss), skip_if_finished=True)

    def _add(self, point: Point, *, complete: bool) -> None:
        import optuna

        states = optuna.trial.TrialState
        trial = optuna.create_trial(
            state=states.COMPLETE if complete else states.RUNNING,
            params=self.rates(point),
            distributions=dict(self.distributions),
            value=_value(self.told[point]) if complete else None,
        )
        self.study.add_trial(trial)


def _journal(path: Path, settings: Search) -> BaseStorage:
    """Optuna's journal; what a killed process wrote in part of its last line is taken away."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        if settings.sampler == "gp":
            import scipy  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"a search with the sampler {settings.sampler} needs Optuna and SciPy ({error}): "
            'pip install "lit-symopt[study]", or take the sampler grid'
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if path.exists():
        written = path.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        if whole != written:
            with path.open("r+b") as file:
                file.truncate(len(whole))
    try:
        return JournalStorage(JournalFileBackend(str(path.resolve())))
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"{path} is no journal of Optuna ({error}); remove it: the finished runs are kept, and told again"
        ) from error


def _told(results: Iterable[Result], axes: Sequence[Axis], family: str, contender: str) -> dict[Point, float | None]:
    """The losses of the trials on disk."""
    found = {}
    for one in results:
        if (one.family, one.contender, one.purpose) == (family, contender, "trial"):
            if one.rates.keys() != {axis.option for axis in axes}:
                raise ConfigError(
                    f"the run {one.run} tried {', '.join(one.rates)}, but the search is over "
                    f"{', '.join(axis.option for axis in axes)}; remove its folder, or choose another one with --out"
                )
            found[_point(one.rates, axes)] = one.loss if one.status == "finished" else None
    return found


def _point(rates: Mapping[str, float], axes: Sequence[Axis]) -> Point:
    return tuple(float(rates.get(axis.option, math.nan)) for axis in axes)


def _value(loss: float | None) -> float:
    return math.inf if loss is None else loss


def _seed(label: str) -> int:
    return crc32(label.encode())
