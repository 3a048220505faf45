"""The report of a study, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from lit_symopt.errors import ConfigError
from lit_symopt.study.plots import RECORD
from lit_symopt.study.result import Result
from lit_symopt.study.search import best
from lit_symopt.study.spec import Axis, Contender, Family, Study, short_name
from lit_symopt.study.table import last_tenth

_EDGE = 1.01  # a rate nearer than this factor to the end of its range is at the end
_CAPTIONS = {
    "finals": "Final losses",
    "tokens": "Loss against tokens",
    "seconds": "Loss against seconds of training",
    "basin": "Losses of the trials",
    "lengths": "Final loss against the length of the run",
}


def report(study: Study, results: Sequence[Result], plots: Mapping[str, Path] | None = None) -> str:
    """All that a study found, as Markdown; the same text for the same results.

    Args:
        study: what was asked for.
        results: of its runs so far; what is missing is said.
        plots: paths by what they show, as `write_plots` gives them; linked by their file names.

    Example:
        >>> study = Study(name="s", families=(Family(name="f", config="f.yaml"),), contenders=(Contender(name="a"),),
        ...               steps=10, seeds=(1, 2))
        >>> print(report(study, []).splitlines()[0])
        # Study s
    """
    lines = [f"# Study {study.name}", "", *_header(study, results)]
    for family in study.families:
        lines += ["", f"## {family.name}", "", f"Recipe: `{family.config}`", *_family(study, results, family)]
    for name, path in (plots or {}).items():
        caption = _CAPTIONS.get(name) or name.removeprefix(RECORD)
        lines += ["", f"![{caption}]({path.name})"]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Spread:
    """Values of several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    def text(self, form: str) -> str:
        if not self.values:
            return "–"
        if len(self.values) == 1:
            return format(self.mean, form)
        return f"{self.mean:{form}} ({min(self.values):{form}} to {max(self.values):{form}})"


def _header(study: Study, results: Sequence[Result]) -> Iterator[str]:
    seeds = ", ".join(map(str, study.seeds))
    yield (
        "Losses are nats a token over the whole validation set after the last step. Seconds are training alone: no "
        f"start-up, no validation. Final runs have the seeds {seeds}; what is in brackets goes from the lowest to the "
        "highest of them, in which each seed draws other weights and another order of the data."
    )
    yield ""
    yield f"- command: `lit-symopt study` with the study {study.name}: {study.steps} steps, warm-up {study.warmup:.0%}"
    if study.search is not None:
        grid = study.search.sampler == "grid"
        how = "all combinations of the values" if grid else f"{study.search.trials} trials a contender and family"
        yield (
            f"- search: sampler {study.search.sampler}, {how}, with seed {study.search.seed}, which no final run has; "
            '"inside" says whether the best rates lie strictly inside the range of the search'
        )
    if study.reference is not None:
        yield f"- differences and times are against {study.reference} in the same family"
    for where in dict.fromkeys(map(_environment, results)):
        yield f"- {where}"


def _environment(one: Result) -> str:
    known = one.environment
    parts = [
        f"{known.get('machine', 'unknown machine')}",
        f"{known['cores']} cores" if known.get("cores") else "",
        f"{known['threads']} thread(s) a run" if known.get("threads") else "",
        f"torch {known.get('torch', 'unknown')}",
        f"Python {known.get('python', 'unknown')}",
        f"commit {known.get('commit') or 'unknown'}",
    ]
    return ", ".join(part for part in parts if part)


def _family(study: Study, results: Sequence[Result], family: Family) -> Iterator[str]:
    contenders = [one for other, one in study.pairs() if other.name == family.name]
    own = [one for one in results if one.family == family.name]
    reference = _finals(own, study.reference or "", 1.0)
    yield ""
    yield "| contender | trials | best rates | inside | loss: mean (min to max) | difference | seconds | final runs |"
    yield "|---|---|---|---|---|---|---|---|"
    for contender in contenders:
        yield _row(study, own, family, contender, reference)
    notes = [note for contender in contenders for note in _notes(study, own, family, contender)]
    if notes:
        yield ""
        yield from (f"- {note}" for note in notes)
    shorter = [(one, length) for one in contenders for length in sorted(one.lengths, reverse=True) if length != 1.0]
    if shorter:
        yield from _shorter(study, own, shorter, reference)
    yield from _tags(study, own, contenders)


def _row(study: Study, own: Sequence[Result], family: Family, contender: Contender, reference: Sequence[Result]) -> str:
    axes = contender.axes(family.name)
    trials = [one for one in own if one.contender == contender.name and one.purpose == "trial"]
    rates = _best(own, family, contender)
    full = _finals(own, contender.name, 1.0)
    losses, base = _losses(full), _losses(reference)
    if contender.name == study.reference:
        difference = "reference"
    elif losses.values and base.values:
        difference = f"{losses.mean - base.mean:+.3f}"
    else:
        difference = "–"
    cells = (
        contender.name,
        str(len(trials)) if axes else "–",
        ", ".join(f"{short_name(axis.option)} {rates[axis.option]:.4g}" for axis in axes) if rates else "–",
        _inside(axes, rates) if rates else "–",
        losses.text(".3f"),
        difference,
        _seconds(full).text(".1f"),
        _count(study, full) if 1.0 in contender.lengths else "no run of length 1",
    )
    return f"| {' | '.join(cells)} |"


def _notes(study: Study, own: Sequence[Result], family: Family, contender: Contender) -> Iterator[str]:
    """What the table should be read with."""
    mine = [one for one in own if one.contender == contender.name]
    trials = [one for one in mine if one.purpose == "trial"]
    diverged = sum(one.status == "diverged" for one in trials)
    if diverged:
        yield f"{contender.name}: {diverged} of {len(trials)} trials diverged"
    planned = _planned(study, contender.axes(family.name))
    if len(trials) < planned:
        yield f"{contender.name}: {planned - len(trials)} of {planned} trials are missing"
    for length in sorted(contender.lengths, reverse=True):
        runs = _finals(own, contender.name, length)
        seeds = [str(one.seed) for one in runs if one.status == "diverged"]
        if seeds:
            yield f"{contender.name}: length {length:g} diverged with seed {', '.join(seeds)}, which means leave out"
        absent = [str(seed) for seed in study.seeds if seed not in {one.seed for one in runs}]
        if absent:
            yield f"{contender.name}: length {length:g} has no run yet with seed {', '.join(absent)}"
    rates = _best(own, family, contender)
    if rates and any(dict(one.rates) != rates for one in mine if one.purpose == "final"):
        yield f"{contender.name}: final runs have other rates than the best of the trials; run the study again"


def _shorter(
    study: Study, own: Sequence[Result], rows: Sequence[tuple[Contender, float]], reference: Sequence[Result]
) -> Iterator[str]:
    base, time = _losses(reference), _seconds(reference)
    yield ""
    named = study.reference or "a reference (the study has none)"
    yield f"Runs of other lengths, against {named} at length 1, whose final loss is {base.text('.3f')}:"
    yield ""
    yield "| contender | length | loss: mean (min to max) | reaches it? | seconds | share of its time | final runs |"
    yield "|---|---|---|---|---|---|---|"
    for contender, length in rows:
        runs = _finals(own, contender.name, length)
        losses, seconds = _losses(runs), _seconds(runs)
        whole = losses.values and all(one.status == "finished" for one in runs)
        share = f"{seconds.mean / time.mean:.0%}" if seconds.values and time.values and time.mean > 0 else "–"
        reaches = _reaches(losses, base) if whole and base.values else "no: diverged" if runs and not whole else "–"
        cells = (contender.name, f"{length:g}", losses.text(".3f"), reaches, seconds.text(".1f"), share)
        yield f"| {' | '.join((*cells, _count(study, runs)))} |"


def _tags(study: Study, own: Sequence[Result], contenders: Sequence[Contender]) -> Iterator[str]:
    tags = sorted({tag for one in own if one.purpose == "final" for tag in one.records})
    if not tags:
        return
    yield ""
    yield "Recorded, mean over the last tenth of the final runs of length 1 (min to max of the seeds):"
    yield ""
    yield f"| contender | {' | '.join(f'`{tag}`' for tag in tags)} |"
    yield f"|---|{'---|' * len(tags)}"
    for contender in contenders:
        runs = [one for one in _finals(own, contender.name, 1.0) if one.status == "finished"]
        found = [[last_tenth(one, tag) for one in runs] for tag in tags]
        cells = [_Spread(tuple(value for value in values if value is not None)).text(".4g") for values in found]
        yield f"| {contender.name} | {' | '.join(cells)} |"


def _reaches(shorter: _Spread, reference: _Spread) -> str:
    if max(shorter.values) <= min(reference.values):
        return "yes, without overlap"
    return "on average" if shorter.mean <= reference.mean else "no"


def _inside(axes: Sequence[Axis], rates: Mapping[str, float]) -> str:
    at = []
    for axis in axes:
        if axis.low == axis.high:
            continue  # one value has no inside
        rate = rates[axis.option]
        low, high = (axis.low, axis.high) if axis.values else (axis.low * _EDGE, axis.high / _EDGE)
        if not low < rate < high:
            at.append(f"{short_name(axis.option)} {'lowest' if rate <= low else 'highest'}")
    return f"no: {', '.join(at)}" if at else "yes"


def _best(own: Sequence[Result], family: Family, contender: Contender) -> dict[str, float]:
    """The best rates so far; none without a search, or a trial that finished."""
    axes = contender.axes(family.name)
    try:
        found = best(own, family.name, contender.name) if axes else {}
    except ConfigError:
        return {}
    return found if all(axis.option in found for axis in axes) else {}


def _planned(study: Study, axes: Sequence[Axis]) -> int:
    """Trials of a search."""
    if not axes or study.search is None:
        return 0
    if study.search.sampler != "grid":
        return study.search.trials or 0
    count = 1
    for axis in axes:
        count *= len(axis.values or ())
    return count


def _finals(own: Sequence[Result], contender: str, length: float) -> list[Result]:
    return [one for one in own if (one.contender, one.purpose, one.length) == (contender, "final", length)]


def _losses(runs: Sequence[Result]) -> _Spread:
    return _Spread(tuple(one.loss for one in runs if one.loss is not None))


def _seconds(runs: Sequence[Result]) -> _Spread:
    return _Spread(tuple(one.seconds for one in runs if one.status == "finished"))


def _count(study: Study, runs: Sequence[Result]) -> str:
    finished = sum(one.status == "finished" for one in runs)
    return f"{finished} of {len(study.seeds)}"
