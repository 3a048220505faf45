"""What all pictures share: a figure without a window, and colors that color-blind people tell apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from lit_symopt.profiling.costs import UNATTRIBUTED
from lit_symopt.profiling.places import EVERY_ROLE
from lit_symopt.ranges import ALL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Image = NDArray[np.uint8]
"""RGB pixels `[H, W, 3]`."""

# One hue a kind of block, after Paul Tol's muted scheme; names stand beside the colors wherever they are used.
_ROLES = {
    "embedding": "#882255",
    "lm_head": "#CC6677",
    "tied_embedding": "#AA4499",
    "position": "#D4A6C8",
    "query": "#332288",
    "key": "#4477AA",
    "value": "#88CCEE",
    "attention_out": "#0099BB",
    "qkv": "#6688DD",
    "gate": "#117733",
    "up": "#55AA66",
    "gate_up": "#44AA99",
    "down": "#999933",
    "expert_gate_up": "#EE7733",
    "expert_down": "#DDCC77",
    "router": "#CC3311",
    "linear": "#226666",
    "conv": "#AA7744",
    "vector": "#777777",
    ALL: "#333333",
    EVERY_ROLE: "#333333",
    UNATTRIBUTED: "#DDDDDD",
}
_OTHERS = ("#661100", "#6699CC", "#AA4466", "#4B6113", "#B58900", "#2AA198", "#6C71C4", "#A0522D")

# Okabe and Ito's scheme; a phase is never shown without its name either.
PHASES = {
    "rule": "#0072B2",
    "momentum": "#56B4E9",
    "pack": "#E69F00",
    "scale": "#009E73",
    "write": "#D55E00",
    "communication": "#CC79A7",
    "check": "#999999",
    "prepare": "#F0E442",
    "": "#FFFFFF",
}
STAGES = {
    "data": "#BBCC33",
    "forward": "#77AADD",
    "backward": "#4466AA",
    "optimizer": "#EE8866",
    "other": "#DDDDDD",
    "validation": "#99DDFF",
}


def role_color(role: str) -> str:
    """The color of a role, the same in every picture and every run."""
    return _ROLES.get(role) or _OTHERS[crc32(role.encode()) % len(_OTHERS)]


def label(role: str, rule: str) -> str:
    """How a role and rule are written in pictures."""
    return f"{role} · {rule}" if rule else role


def new_figure(width: float, height: float) -> Figure:
    """A figure of at most 14 × 9 inches, 100 pixels each."""
    # The object-oriented interface: pyplot would keep global figures and choose a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(width, 14.0), min(height, 9.0)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def pixels(figure: Figure) -> Image:
    """The figure, drawn."""
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def message(text: str) -> Image:
    """A picture that says why there is nothing to see."""
    figure = new_figure(8.0, 2.0)
    figure.text(0.5, 0.5, text, ha="center", va="center", wrap=True)
    return pixels(figure)


def bare(axes: Any, *, grid: str = "x") -> None:
    """Axes without a box, with a faint grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)


def legend(axes: Any, colors: Mapping[str, str], *, title: str, outside: str = "") -> None:
    """Names beside colors; `outside` the axes, `upper` or `lower` on the right, where the data need all the room."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=color, edgecolor="#555555", linewidth=0.4, label=name) for name, color in colors.items()]
    where, parent = (f"outside right {outside}", axes.figure) if outside else ("lower right", axes)
    parent.legend(handles=handles, title=title, fontsize="small", loc=where)
