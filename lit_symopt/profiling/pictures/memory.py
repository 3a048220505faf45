"""What fills the memory of each rank."""

from __future__ import annotations

from collections.abc import Sequence

from lit_symopt.profiling.pictures.canvas import Image, bare, legend, message, new_figure, pixels, role_color
from lit_symopt.profiling.run import MemoryUse

_SHARED = {"parameters": "#BBBBBB", "gradients": "#F0E442", "masters": "#66CCEE", "scratch of the step": "#FFFFFF"}
_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_FAR = 2.5  # times the longest bar
_MOST_RANKS = 32
_MOST_ROLES = 16
_OTHERS = "state: others"


def memory_bars(memory: Sequence[MemoryUse]) -> Image:
    """A bar for each rank: parameters, gradients, masters, state of the optimizer by role, scratch; the peak as a mark.

    Args:
        memory: of the ranks, in any order; of more than 32 those with the most are drawn.

    Returns:
        RGB pixels `[H, W, 3]`.
    """
    bars = sorted(memory, key=lambda use: -sum(_parts(use).values()))[:_MOST_RANKS]
    bars.sort(key=lambda use: use.rank)
    longest = max((sum(_parts(use).values()) for use in bars), default=0)
    peak = max((use.peak or 0 for use in bars), default=0)
    # The peak of a process on a CPU has the interpreter and all libraries in it: the bars would be lost beside it.
    largest = max(longest, peak) if peak < _FAR * longest else longest
    if not largest:
        return message("No memory was measured.")
    size, unit = next(((size, unit) for size, unit in _UNITS if largest >= size), (1, "bytes"))
    colors = _colors(bars)
    figure = new_figure(8.8, max(2.2 + 0.4 * len(bars), 1.6 + 0.2 * (len(colors) + 1)))
    axes = figure.add_subplot()
    for place, use in enumerate(bars):
        left = 0.0
        parts = _parts(use)
        for name, color in colors.items():
            own = {name} if name != _OTHERS else parts.keys() - colors.keys()
            length = sum(parts.get(part, 0) for part in own) / size
            if length > 0:
                hatch = "////" if name == "scratch of the step" else None
                axes.barh(
                    place, length, left=left, color=color, edgecolor="#555555", linewidth=0.4, height=0.7, hatch=hatch
                )
            left += length
        right, text = left, f"{left:.3g} {unit}"
        if use.peak is not None:
            text = f"{text}, peak {use.peak / size:.3g} {unit}"
            if use.peak <= largest:
                axes.plot(use.peak / size, place, marker="|", color="black", markersize=18, markeredgewidth=2.0)
                right = max(left, use.peak / size)
        axes.annotate(text, (right, place), (8, 0), textcoords="offset points", va="center", fontsize="small")
    axes.set_yticks(range(len(bars)), labels=[f"rank {use.rank}" for use in bars])
    axes.set_ylim(max(len(bars), 2) - 0.4, -0.6)
    axes.set_xlim(0.0, 1.45 * largest / size)
    axes.set_xlabel(f"{unit}; the peak, where it is not far outside, is a black mark")
    bare(axes)
    legend(axes, colors, title="memory", outside="upper")
    more = f", {len(bars)} of {len(memory)} ranks" if len(bars) < len(memory) else ""
    figure.suptitle(f"Memory by rank{more}", fontsize="medium")
    return pixels(figure)


def _parts(use: MemoryUse) -> dict[str, int]:
    """Bytes by name, in the order of the bars."""
    parts = {"parameters": use.parameters, "gradients": use.gradients, "masters": use.masters}
    parts |= {f"state: {role}": bytes_ for role, bytes_ in use.state.items()}
    return parts | {"scratch of the step": use.scratch or 0}


def _colors(bars: Sequence[MemoryUse]) -> dict[str, str]:
    """Colors of what is there, in the order of the bars; of many roles the largest."""
    state: dict[str, int] = {}
    for use in bars:
        for role, bytes_ in use.state.items():
            state[role] = state.get(role, 0) + bytes_
    roles = sorted((role for role in state if state[role] > 0), key=lambda role: -state[role])
    shared = [name for name in _SHARED if any(_parts(use)[name] > 0 for use in bars)]
    colors = {name: _SHARED[name] for name in shared if name != "scratch of the step"}
    colors |= {f"state: {role}": role_color(role) for role in roles[:_MOST_ROLES]}
    colors |= {_OTHERS: "#F5F5F5"} if len(roles) > _MOST_ROLES else {}
    return colors | {name: _SHARED[name] for name in shared if name == "scratch of the step"}
