"""How near each update runs to the limits of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_symopt.profiling.pictures.canvas import Image, bare, label, message, new_figure, pixels, role_color
from lit_symopt.profiling.run import Ceilings

if TYPE_CHECKING:
    from lit_symopt.profiling.roofline import RooflinePoint

_MOST = 24  # roles and rules
_NEAR = 0.045  # points nearer than this share of the axes share a label
_STYLES = ("-", "--", "-.", ":")
_MARKERS = {"compute": "o", "memory": "D"}


def roofline_plot(points: Sequence[RooflinePoint], ceilings: Ceilings) -> Image:
    """Operations a second against operations a byte, under the roofs of the machine; and the share that is reached.

    A roof is `min(peak of the dtype, bandwidth × intensity)`. Points are numbered, as one where they lie together; the
    bars below bear the numbers with the names, the farthest from its roof on top.

    Args:
        points: of the roofline.
        ceilings: what the points are held against.

    Returns:
        RGB pixels `[H, W, 3]`.
    """
    drawn = sorted((point for point in points if point.flops > 0), key=lambda point: -point.measured_us)[:_MOST]
    if not drawn:
        return message("Nothing to hold against the roofline: no operations were both expected and measured.")
    drawn.sort(key=lambda point: point.share)
    below = 0.9 + 0.22 * max(len(drawn), 3)
    figure = new_figure(8.8, 4.2 + below)
    roof, bars = figure.subplots(2, 1, height_ratios=[3.8, below])
    _draw_roofs(roof, drawn, ceilings)
    _draw_points(roof, drawn)
    _draw_shares(bars, drawn)
    figure.suptitle(
        f"Roofline: peaks by dtype, copy {_with_prefix(ceilings.bytes_per_second)}B/s, as measured on this machine",
        fontsize="medium",
    )
    return pixels(figure)


def _draw_roofs(axes: Any, points: Sequence[RooflinePoint], ceilings: Ceilings) -> None:
    bandwidth = ceilings.bytes_per_second
    used = {name: ceilings.flops[name] for point in points for name in point.dtype.split("+") if name in ceilings.flops}
    ridges = [peak / bandwidth for peak in used.values()]
    lowest = min([point.intensity for point in points] + ridges) / 3
    highest = max([point.intensity for point in points] + ridges) * 4
    x = np.geomspace(lowest, highest, 200)
    for style, (name, peak) in zip(_STYLES, sorted(used.items(), key=lambda item: -item[1]), strict=False):
        axes.plot(x, np.minimum(peak, bandwidth * x), color="#333333", linewidth=1.4, linestyle=style)
        text = f"{name} {_with_prefix(peak)}FLOP/s"
        axes.annotate(text, (highest, peak), (-4, 3), textcoords="offset points", ha="right", fontsize="small")
    reached = [point.flops_per_second for point in points]
    axes.set(xscale="log", yscale="log", xlim=(lowest, highest))
    top = max([*reached, *used.values()])
    axes.set_ylim(min([*reached, bandwidth * lowest, top / 10]) / 2, top * 8)
    axes.set(xlabel="expected FLOP / byte", ylabel="reached FLOP / s")
    bare(axes, grid="both")


def _draw_points(axes: Any, points: Sequence[RooflinePoint]) -> None:
    clusters: list[tuple[RooflinePoint, list[int]]] = []
    for number, point in enumerate(points, 1):
        near = next((numbers for other, numbers in clusters if _apart(axes, point, other) < _NEAR), None)
        if near is None:
            clusters.append((point, [number]))
        else:
            near.append(number)
        axes.plot(
            point.intensity,
            point.flops_per_second,
            _MARKERS[point.bound],
            color=role_color(point.role),
            markersize=8,
            markeredgecolor="black",
        )
    middle = sum(axes.get_xlim()) / 2
    for point, numbers in clusters:
        left = point.intensity > middle  # there is more room to the left, between the point and the ridge
        axes.annotate(
            ", ".join(map(str, numbers)),
            (point.intensity, point.flops_per_second),
            (-8, 0) if left else (8, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize="small",
        )
    for bound, marker in _MARKERS.items():
        axes.plot([], [], marker, color="white", markeredgecolor="black", markersize=8, label=f"bound by {bound}")
    axes.legend(loc="upper left", fontsize="small")


def _apart(axes: Any, a: RooflinePoint, b: RooflinePoint) -> float:
    """Distance of two points on the picture, in widths or heights of it."""
    (left, right), (bottom, top) = np.log(axes.get_xlim()), np.log(axes.get_ylim())
    along = abs(np.log(a.intensity / b.intensity)) / (right - left)
    across = abs(np.log(a.flops_per_second / b.flops_per_second)) / (top - bottom)
    return float(max(along, across))


def _draw_shares(axes: Any, points: Sequence[RooflinePoint]) -> None:
    for place, point in enumerate(points):
        axes.barh(place, point.share, color=role_color(point.role), height=0.7)
        text = f"{point.share:.1%} of {point.measured_us / 1000:.3g} ms, {point.bound}"
        axes.annotate(text, (point.share, place), (5, 0), textcoords="offset points", va="center", fontsize="small")
    axes.axvline(1.0, color="#333333", linewidth=1.4)
    axes.set_yticks(
        range(len(points)),
        labels=[f"{label(point.role, point.rule)}  {number}" for number, point in enumerate(points, 1)],
    )
    axes.set_ylim(max(len(points), 3) - 0.4, -0.6)
    axes.set_xlim(0.0, max(1.05, 1.6 * max(point.share for point in points)))
    axes.set_xlabel("least time at the roof / measured time")
    bare(axes)


def _with_prefix(value: float) -> str:
    """A number with the prefix of its unit: `12.3 G`."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "
