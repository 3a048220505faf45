"""One training step over time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lit_symopt.profiling.events import Trace
from lit_symopt.profiling.moments import Moment, moments
from lit_symopt.profiling.pictures.canvas import (
    PHASES,
    STAGES,
    Image,
    bare,
    label,
    legend,
    new_figure,
    pixels,
    role_color,
)
from lit_symopt.profiling.places import Place

_MOST_ROLES = 12  # in the legend

Lane = tuple[str, Sequence[Moment], Callable[[Place], str], Callable[[Place], str]]
"""Its name, what is in it, and the text and the color of a place."""


def timeline(trace: Trace) -> Image:
    """One step of a window: its stages, and below the optimizer's step by role, rule and phase.

    The step is the one whose duration is in the middle. On a GPU kernels have lanes of their own, in the colors of
    where they were launched. What is too narrow for its name has only its color.

    Args:
        trace: as `lit_symopt.profiling.events.read_trace` gives it.

    Returns:
        RGB pixels `[H, W, 3]`.
    """
    step = moments(trace)
    update = [moment for moment in step.host if moment.place.in_update]
    kernels = [moment for moment in step.gpu if moment.place.in_update]
    above: list[Lane] = [("stage", step.host, _stage, lambda place: STAGES[place.stage])]
    below: list[Lane] = [("role · rule", update, _roles, _role_color), ("phase", update, _phase, _phase_color)]
    if step.gpu:
        above.append(("GPU", step.gpu, lambda place: "", lambda place: STAGES[place.stage]))
        below.append(("GPU", kernels, lambda place: "", _role_color))

    figure = new_figure(8.8, 5.4 if step.gpu else 4.8)
    whole, *zoomed = figure.subplots(
        2 if update else 1, 1, squeeze=False, height_ratios=[1.0, 1.9][: 2 if update else 1]
    )[:, 0]
    _draw(whole, above, (0.0, max([step.ms, *(moment.end_ms for moment in step.gpu)])))
    whole.set_xlabel("ms since the step began")
    for axes in zoomed:
        both = [*update, *kernels]
        limits = min(moment.start_ms for moment in both), max(moment.end_ms for moment in both)
        whole.axvspan(*limits, ymin=-0.02, ymax=1.02, fill=False, edgecolor="black", linewidth=1.2, clip_on=False)
        _draw(axes, below, limits)
        axes.set_xlabel("the optimizer's step, enlarged: ms since the training step began")
        _legend(axes, update)
    took = sum(moment.ms for moment in update)
    figure.suptitle(
        f"{step.name}: {step.ms:.3g} ms on the host, {took:.3g} ms of them in the optimizer's step", fontsize="medium"
    )
    return pixels(figure)


def _draw(axes: Any, lanes: Sequence[Lane], limits: tuple[float, float]) -> None:
    span = limits[1] - limits[0]
    for row, (_, found, text, color) in enumerate(lanes):
        for name, (spans, own) in _grouped(_joined(found, text, color), color).items():
            axes.broken_barh(spans, (row - 0.4, 0.8), facecolor=name, edgecolor="#555555", linewidth=0.2)
            for moment in own:
                words = text(moment.place)
                if moment.ms / span > 0.011 * len(words) > 0:
                    axes.annotate(
                        words,
                        ((moment.start_ms + moment.end_ms) / 2, row),
                        ha="center",
                        va="center",
                        fontsize="small",
                        color=_readable(name),
                    )
    axes.set_yticks(range(len(lanes)), labels=[name for name, *_ in lanes])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_xlim(*limits)
    bare(axes)


def _joined(found: Iterable[Moment], text: Callable[[Place], str], color: Callable[[Place], str]) -> list[Moment]:
    """Neighbors that look alike as one."""
    joined: list[Moment] = []
    for moment in found:
        last = joined[-1] if joined else None
        alike = last is not None and (text(last.place), color(last.place)) == (text(moment.place), color(moment.place))
        if last is not None and alike and not moment.kernel and moment.start_ms <= last.end_ms:
            joined[-1] = Moment(last.place, last.start_ms, moment.end_ms)
        else:
            joined.append(moment)
    return joined


def _grouped(
    found: Iterable[Moment], color: Callable[[Place], str]
) -> dict[str, tuple[list[tuple[float, float]], list[Moment]]]:
    """By color, so that thousands are drawn at once."""
    groups: dict[str, tuple[list[tuple[float, float]], list[Moment]]] = {}
    for moment in found:
        spans, own = groups.setdefault(color(moment.place), ([], []))
        spans.append((moment.start_ms, moment.ms))
        own.append(moment)
    return groups


def _legend(axes: Any, update: Iterable[Moment]) -> None:
    took: dict[str, float] = {}
    for moment in update:
        for role, share in moment.place.roles:
            took[role] = took.get(role, 0.0) + moment.ms * share
    named = sorted(took, key=lambda role: -took[role])[:_MOST_ROLES]
    legend(axes, {role: role_color(role) for role in named}, title="role", outside="upper")
    phases = {moment.place.phase for moment in update}
    legend(
        axes, {phase: PHASES[phase] for phase in PHASES if phase in phases and phase}, title="phase", outside="lower"
    )


def _stage(place: Place) -> str:
    return place.stage


def _roles(place: Place) -> str:
    return label("+".join(role for role, _ in place.roles), place.rule)


def _role_color(place: Place) -> str:
    """That of the role with the largest part of the batch."""
    return role_color(max(place.roles, key=lambda role: role[1])[0])


def _phase(place: Place) -> str:
    return place.phase


def _phase_color(place: Place) -> str:
    return PHASES.get(place.phase, "#FFFFFF")


def _readable(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 140 else "white"
