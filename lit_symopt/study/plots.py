"""Plots of a study, as PNG files: losses on the way, losses of the trials, final losses, recorded tags."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from lit_symopt.profiling.pictures.canvas import bare, new_figure
from lit_symopt.study.result import Result
from lit_symopt.study.spec import Contender, Study, short_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's scheme without its yellow; where it begins anew, lines are dashed and markers change too.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "D", "s", "^")
RECORD = "record/"
"""Before a tag, in the names of plots."""
_LOSS = "validation loss (nats/token)"
_FAR = 3.0  # times what the median trial is worse than the best: above, a trial is drawn at the top
_CURVE_FROM = 0.25  # of the looks: the first are so high that the rest would be flat

Series = tuple[list[float], list[float], list[float], list[float]]
"""x, mean, lowest and highest y."""


def write_plots(study: Study, results: Sequence[Result], folder: Path) -> dict[str, Path]:
    """Draws what the results hold, and writes it.

    A color is a contender, a panel a family. Lines are means over the seeds of final runs of length 1, bands go from
    the lowest to the highest seed.

    Args:
        study: whose families and contenders they are, in its order.
        results: of its runs.
        folder: for the files; it exists.

    Returns:
        Paths by what they show: `tokens`, `seconds`, `basin` (of options that had several values), `lengths`,
        `finals`, and the recorded tags as `record/<tag>`. What there are no runs for is missing.

    Raises:
        OSError: if a file cannot be written.
    """
    drawn = {
        "tokens": _curves(study, results, "tokens"),
        "seconds": _curves(study, results, "seconds"),
        "basin": _basin(study, results),
        "lengths": _lengths(study, results),
        "finals": _finals(study, results),
        **{
            f"{RECORD}{tag}": _tag(study, results, tag)
            for tag in sorted({tag for one in results for tag in one.records})
        },
    }
    paths = {}
    for name, figure in drawn.items():
        if figure is not None:
            paths[name] = folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.png"
            figure.savefig(paths[name], metadata={"Software": None})  # the same bytes for the same results
    return paths


def _curves(study: Study, results: Sequence[Result], over: str) -> Figure | None:
    place, unit = {"tokens": (1, "tokens trained on"), "seconds": (2, "seconds of training")}[over]
    series = _by_pair(study, results, lambda runs: _band([[(p[place], p[3]) for p in one.curve] for one in runs]))
    if not series:
        return None
    figure, panels = _panels(study, [family for family, _ in series], xlabel=unit, ylabel=_LOSS)
    for family, axes in panels.items():
        own = [found for (other, _), found in series.items() if other == family]
        for contender in study.contenders:
            if (family, contender.name) in series:
                _draw_band(axes, series[family, contender.name], study, contender.name)
        firsts = [round(_CURVE_FROM * (len(found[0]) - 1)) for found in own]
        highest = max(found[3][first] for found, first in zip(own, firsts, strict=True))
        lowest = min(min(found[2]) for found in own)
        room = 0.05 * (highest - lowest) or 0.01
        axes.set_ylim(lowest - room, highest + room)
        axes.set_xlim(left=0.9 * min(found[0][first] for found, first in zip(own, firsts, strict=True)))
        axes.xaxis.set_major_formatter(_thousands)
    looks = f"{study.look_batches} validation batches" if study.look_batches > 1 else "one validation batch"
    return _finished(figure, study, series, f"Loss against {over}, on {looks}: mean and range of the seeds")


def _tag(study: Study, results: Sequence[Result], tag: str) -> Figure | None:
    def of(runs: list[Result]) -> Series | None:
        return _band([[(s * one.tokens / one.steps, v) for s, v in one.records.get(tag, ())] for one in runs])

    series = _by_pair(study, results, of)
    if not series:
        return None
    figure, panels = _panels(study, [family for family, _ in series], xlabel="tokens trained on", ylabel=tag)
    for family, axes in panels.items():
        for contender in study.contenders:
            if (family, contender.name) in series:
                _draw_band(axes, series[family, contender.name], study, contender.name)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(_thousands)
    return _finished(figure, study, series, f"{tag}: mean and range of the seeds")


def _basin(study: Study, results: Sequence[Result]) -> Figure | None:
    trials = [one for one in results if one.purpose == "trial"]
    families = [one.name for one in study.families if any(trial.family == one.name for trial in trials)]
    options = list(dict.fromkeys(axis.option for one in study.contenders for axis in one.search))
    options = [option for option in options if _tried(trials, option) > 1]
    if not families or not options:
        return None
    alone = len(options) == 1
    panels: Any
    if alone:
        figure, by_family = _panels(study, families, xlabel=_named(options[0]), ylabel="")
        panels = [[by_family[family]] for family in families]
    else:
        figure = new_figure(1.2 + 4.2 * len(options), 1.2 + 3.0 * len(families))
        panels = figure.subplots(len(families), len(options), squeeze=False, sharex="col", sharey="row")
    used: set[str] = set()
    for row, family in zip(panels, families, strict=True):
        own = [trial for trial in trials if trial.family == family]
        bottom, top = _heights([trial.loss for trial in own if trial.loss is not None])
        for axes, option in zip(row, options, strict=True):
            for contender in study.contenders:
                shown = [trial for trial in own if trial.contender == contender.name and option in trial.rates]
                if shown:
                    used.add(contender.name)
                    _draw_trials(axes, shown, option, study, contender, family, top=top, joined=alone)
            if not any(option in trial.rates for trial in own):
                axes.text(0.5, 0.5, "not searched here", transform=axes.transAxes, ha="center", color="#777777")
            bare(axes, grid="both")
        row[0].set_title(family, fontsize="medium", loc="left")
        row[0].set_ylabel("final loss (nats/token)")
        row[0].set_ylim(bottom - 0.08 * (top - bottom), top + 0.16 * (top - bottom))  # room for those at the top
    for row in panels if alone else panels[-1:]:
        for axes, option in zip(row, options, strict=True):
            _scale(axes, [trial.rates[option] for trial in trials if option in trial.rates])
            axes.set_xlabel(_named(option))
    title = "Final loss of each trial. Star: the best; triangle: above the scale; cross: diverged; dotted: the range"
    return _finished(figure, study, [("", name) for name in used], title, lines=False)


def _named(option: str) -> str:
    return short_name(option) + (" (× lr)" if option.endswith(".lr_multiplier") else "")


def _tried(trials: Sequence[Result], option: str) -> int:
    """The most values of an option that one contender tried in a family."""
    found: dict[tuple[str, str], set[float]] = {}
    for trial in trials:
        if option in trial.rates:
            found.setdefault((trial.family, trial.contender), set()).add(trial.rates[option])
    return max(map(len, found.values()), default=0)


def _scale(axes: Any, rates: Sequence[float]) -> None:
    """A logarithmic axis with 1, 2 and 5 of each decade, if all rates allow it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if min(rates) <= 0:
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_trials(
    axes: Any,
    trials: list[Result],
    option: str,
    study: Study,
    contender: Contender,
    family: str,
    *,
    top: float,
    joined: bool,
) -> None:
    look = _look(study, contender.name)
    within = [one for one in trials if one.loss is not None and one.loss <= top]
    above = [one for one in trials if one.loss is not None and one.loss > top]
    diverged = [one for one in trials if one.loss is None]
    dots = {"color": look["color"], "linestyle": "", "alpha": 0.75}
    axes.plot(
        [one.rates[option] for one in within], [_loss(one) for one in within], marker=look["marker"], ms=5, **dots
    )
    if joined:  # one option was searched, and nothing else moves the loss
        ordered = sorted(within, key=lambda one: one.rates[option])
        x, y = [one.rates[option] for one in ordered], [_loss(one) for one in ordered]
        axes.plot(x, y, color=look["color"], linewidth=1.2, alpha=0.6)
    edge = axes.get_xaxis_transform()
    for marker, shown, height in (("^", above, 0.955), ("x", diverged, 0.985)):
        axes.plot(
            [one.rates[option] for one in shown], [height] * len(shown), marker=marker, ms=6, transform=edge, **dots
        )
    if within:
        lowest = min(within, key=lambda one: (_loss(one), one.run))
        star = {"marker": "*", "ms": 15, "markeredgecolor": "black", "markeredgewidth": 0.8, "zorder": 5}
        axes.plot(lowest.rates[option], _loss(lowest), color=look["color"], linestyle="", **star)
    for axis in contender.axes(family):
        if axis.option == option:
            for bound in (axis.low, axis.high):
                axes.axvline(bound, color=look["color"], linestyle=":", linewidth=1.0, alpha=0.6)


def _lengths(study: Study, results: Sequence[Result]) -> Figure | None:
    finals = _finals_by_row(study, results)
    if not any(length != 1.0 for _, _, length in finals):
        return None
    families = list(dict.fromkeys(family for family, _, _ in finals))
    label = "length of the run (share of the study's steps)"
    figure, panels = _panels(study, families, xlabel=label, ylabel="final " + _LOSS)
    for family, axes in panels.items():
        reference = finals.get((family, study.reference or "", 1.0), [])
        losses = [_loss(one) for one in reference if one.loss is not None]
        if losses:
            axes.axhspan(min(losses), max(losses), color="#888888", alpha=0.25, linewidth=0)
            axes.axhline(mean(losses), color="#888888", linewidth=1.0)
        for place, contender in enumerate(study.contenders):
            points = []
            for length in sorted(contender.lengths):
                losses = [
                    _loss(one) for one in finals.get((family, contender.name, length), []) if one.loss is not None
                ]
                if losses:
                    points.append((length, mean(losses), min(losses), max(losses)))
            if not points:
                continue
            look = _look(study, contender.name)
            aside = 0.004 * (place - (len(study.contenders) - 1) / 2)  # so that ranges do not hide each other
            x, middle = [point[0] + aside for point in points], [point[1] for point in points]
            reach = [[point[1] - point[2] for point in points], [point[3] - point[1] for point in points]]
            axes.errorbar(x, middle, yerr=reach, capsize=4, ms=6, linewidth=1.4, **look)
    title = "Final loss against the length of the run: mean and range of the seeds"
    if study.reference:
        title += f"; gray: the range of {study.reference} at length 1"
    return _finished(figure, study, [(family, name) for family, name, _ in finals], title)


def _finals(study: Study, results: Sequence[Result]) -> Figure | None:
    finals = _finals_by_row(study, results)
    if not finals:
        return None
    families = list(dict.fromkeys(family for family, _, _ in finals))
    most = max(sum(row[0] == family for row in finals) for family in families)
    figure, panels = _panels(study, families, xlabel="final " + _LOSS, ylabel="", height=max(2.2, 1.2 + 0.36 * most))
    for family, axes in panels.items():
        rows = [row for row in finals if row[0] == family]
        for place, row in enumerate(rows):
            look = _look(study, row[1])
            losses = [_loss(one) for one in finals[row] if one.loss is not None]
            axes.plot(
                losses,
                [place] * len(losses),
                linestyle="",
                marker=look["marker"],
                ms=7,
                alpha=0.65,
                color=look["color"],
            )
            if losses:
                axes.plot([mean(losses)] * 2, [place - 0.3, place + 0.3], color="black", linewidth=1.6)
            lost = len(finals[row]) - len(losses)
            if lost:
                where = axes.get_yaxis_transform()
                axes.text(0.99, place, f"{lost} diverged", transform=where, ha="right", va="center", fontsize="small")
        names = [name if length == 1.0 else f"{name}, ×{length:g} steps" for _, name, length in rows]
        axes.set_yticks(range(len(rows)), labels=names)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=6)
    figure.suptitle("Final loss of every seed; the bar is the mean", fontsize="medium")
    return figure


def _panels(
    study: Study, families: Sequence[str], *, xlabel: str, ylabel: str, height: float = 3.7
) -> tuple[Figure, dict[str, Any]]:
    """Axes by family, in the order of the study."""
    names = [one.name for one in study.families if one.name in families]
    columns = 1 if len(names) == 1 else 2 if len(names) <= 4 else 3
    rows = -(-len(names) // columns)
    figure = new_figure(8.8 if columns == 1 else 6.0 * columns, 1.0 + height * rows)
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    flat = [axes for row in grid for axes in row]
    for place, axes in enumerate(flat):
        if place >= len(names):
            axes.set_visible(False)
            continue
        axes.set_title(names[place], fontsize="medium", loc="left")
        axes.set_xlabel(xlabel)
        if place % columns == 0:
            axes.set_ylabel(ylabel)
        bare(axes, grid="both")
    return figure, dict(zip(names, flat, strict=False))


def _finished(
    figure: Figure, study: Study, shown: Iterable[tuple[str, str]], title: str, *, lines: bool = True
) -> Figure:
    """With a legend of the contenders among these `(family, contender)`, and a title."""
    from matplotlib.lines import Line2D

    used = {name for _, name in shown}
    names = [one.name for one in study.contenders if one.name in used]
    line = {} if lines else {"linestyle": ""}
    handles = [Line2D([], [], label=name, linewidth=1.8, ms=6, **{**_look(study, name), **line}) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 6), frameon=False)
    figure.suptitle(title, fontsize="medium")
    return figure


def _look(study: Study, contender: str) -> dict[str, Any]:
    place = [one.name for one in study.contenders].index(contender)
    turn = place // len(_COLORS) % len(_DASHES)
    return {"color": _COLORS[place % len(_COLORS)], "linestyle": _DASHES[turn], "marker": _MARKERS[turn]}


def _draw_band(axes: Any, series: Series, study: Study, contender: str) -> None:
    x, middle, low, high = series
    look = _look(study, contender)
    few = len(x) <= 20
    axes.plot(x, middle, linewidth=1.6, ms=3.5, **(look if few else {**look, "marker": ""}))
    axes.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)


def _band(runs: list[list[tuple[float, float]]]) -> Series | None:
    """Mean and range over runs, place by place as far as all of them go."""
    points = list(zip(*[run for run in runs if run], strict=False))
    if not points:
        return None
    x = [mean(float(one[0]) for one in column) for column in points]
    y = [[one[1] for one in column] for column in points]
    return x, [mean(column) for column in y], [min(column) for column in y], [max(column) for column in y]


def _by_pair(
    study: Study, results: Sequence[Result], of: Callable[[list[Result]], Series | None]
) -> dict[tuple[str, str], Series]:
    """What final runs of length 1 that finished give, by family and contender."""
    found = {}
    for (family, contender, length), runs in _finals_by_row(study, results).items():
        finished = [one for one in runs if one.status == "finished"]
        series = of(finished) if length == 1.0 and finished else None
        if series is not None:
            found[family, contender] = series
    return found


def _finals_by_row(study: Study, results: Sequence[Result]) -> dict[tuple[str, str, float], list[Result]]:
    """Final runs by family, contender and length, in the order of the study, the longest first."""
    found = {}
    for family, contender in study.pairs():
        for length in sorted(contender.lengths, reverse=True):
            key = family.name, contender.name, length
            runs = [one for one in results if one.purpose == "final" and (one.family, one.contender, one.length) == key]
            if runs:
                found[key] = runs
    return found


def _heights(losses: Sequence[float]) -> tuple[float, float]:
    """What the axis of the losses of trials shows: from the best to what is not far above it."""
    if not losses:
        return 0.0, 1.0
    lowest = min(losses)
    return lowest, min(max(losses), lowest + _FAR * (median(losses) - lowest)) + 1e-3


def _loss(result: Result) -> float:
    assert result.loss is not None
    return result.loss


def _thousands(value: float, _: int) -> str:
    """`1500000` as `1.5M`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
