"""What each update costs, as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_symopt.profiling.costs import TraceCosts
from lit_symopt.profiling.pictures.canvas import (
    PHASES,
    Image,
    bare,
    label,
    legend,
    message,
    new_figure,
    pixels,
    role_color,
)
from lit_symopt.profiling.reduce import by_phase
from lit_symopt.profiling.rows import cost_table

_MOST_BARS = 24  # the rest is one bar
_MOST_ROLES = 16  # with a color of their own
_OTHERS = "others"


def cost_bars(windows: Sequence[TraceCosts]) -> Image:
    """A bar for each role and rule, stacked by phase: ms of the device in a step, the costliest on top.

    A bar is as long as the median over the steps, split like the sum over them; the thin line goes from the lowest to
    the highest.

    Args:
        windows: of one run.

    Returns:
        RGB pixels `[H, W, 3]`.

    Example:
        >>> cost_bars([]).shape[-1]  # says that there is nothing to draw
        3
    """
    table = cost_table(windows)
    rows = [row for row in table.blocks if row.ms.highest > 0]
    if not rows:
        return message("No step of SymOpt was recorded.")
    shown, rest = (rows, []) if len(rows) <= _MOST_BARS else (rows[: _MOST_BARS - 1], rows[_MOST_BARS - 1 :])
    split = _split(windows)
    names = [label(row.role, row.rule) for row in shown] + ([f"{len(rest)} others"] if rest else [])

    figure = new_figure(8.8, 2.2 + 0.34 * len(names))
    axes = figure.add_subplot()
    used: dict[str, None] = {}
    for place, row in enumerate(shown):
        left = 0.0
        parts = split[row.role, row.rule]
        for phase in PHASES:
            length = row.ms.median * parts.get(phase, 0.0)
            if length > 0:
                axes.barh(place, length, left=left, color=PHASES[phase], edgecolor="#555555", linewidth=0.4, height=0.7)
                used[phase] = None
            left += length
        axes.plot([row.ms.lowest, row.ms.highest], [place, place], color="black", linewidth=1.2)
        axes.plot(-0.006, place, "s", color=role_color(row.role), transform=axes.get_yaxis_transform(), clip_on=False)
        _beside(axes, row.ms.highest, place, f"{row.ms.median:.3g} ms, {row.of_step:.1%}")
    longest = max(row.ms.highest for row in rows)
    if rest:
        longest = max(longest, length := sum(row.ms.median for row in rest))
        axes.barh(len(shown), length, color="#DDDDDD", edgecolor="#555555", linewidth=0.4, height=0.7)
        share = sum(row.of_step for row in rest)
        _beside(axes, length, len(shown), f"{length:.3g} ms, {share:.1%}")
    axes.set_yticks(range(len(names)), labels=names)
    axes.tick_params(axis="y", length=0, pad=12)
    axes.set_ylim(max(len(names), 3) - 0.4, -0.6)
    axes.set_xlim(0.0, 1.3 * longest)
    axes.set_xlabel("ms a step, and share of the training step" + (" (GPU time)" if table.device == "cuda" else ""))
    bare(axes)
    legend(axes, {phase or "in no phase": PHASES[phase] for phase in PHASES if phase in used}, title="phase")
    figure.suptitle(
        f"Update {table.parts.median:.3g} ms of a training step of {table.wall.median:.3g} ms ({table.of_step:.1%}), "
        f"{table.attributed:.1%} attributed – {table.device}, {table.steps} step(s)",
        fontsize="medium",
    )
    return pixels(figure)


def compare_bars(stacks: Mapping[str, Sequence[TraceCosts]]) -> Image:
    """A bar for each stack, stacked by role: ms of the device in a step, in the order given.

    Args:
        stacks: windows by name of the stack.

    Returns:
        RGB pixels `[H, W, 3]`.
    """
    tables = {name: cost_table(windows) for name, windows in stacks.items()}
    if not any(table.parts.highest > 0 for table in tables.values()):
        return message("No step of SymOpt was recorded.")
    roles: dict[str, float] = {}
    for table in tables.values():
        for row in table.blocks:
            roles[row.role] = roles.get(row.role, 0.0) + table.parts.median * row.of_update
    named = [role for role in sorted(roles, key=lambda role: -roles[role]) if roles[role] > 0][:_MOST_ROLES]
    colors = {role: role_color(role) for role in named}
    if any(ms > 0 for role, ms in roles.items() if role not in colors):
        colors[_OTHERS] = "#F5F5F5"
    figure = new_figure(8.8, max(2.2 + 0.55 * len(tables), 1.6 + 0.2 * len(colors)))
    axes = figure.add_subplot()
    for place, table in enumerate(tables.values()):
        left = 0.0
        for shown, color in colors.items():
            of_update = sum(
                row.of_update for row in table.blocks if shown == (row.role if row.role in named else _OTHERS)
            )
            length = table.parts.median * of_update
            if length > 0:
                axes.barh(place, length, left=left, color=color, edgecolor="#555555", linewidth=0.4, height=0.7)
            left += length
        axes.plot([table.parts.lowest, table.parts.highest], [place, place], color="black", linewidth=1.2)
        text = f"{table.parts.median:.3g} ms, {table.of_step:.1%} of {table.wall.median:.3g} ms"
        _beside(axes, table.parts.highest, place, text)
    axes.set_yticks(range(len(tables)), labels=list(tables))
    axes.set_ylim(max(len(tables), 2) - 0.4, -0.6)
    axes.set_xlim(0.0, 1.5 * max(table.parts.highest for table in tables.values()))
    devices = "/".join(dict.fromkeys(table.device for table in tables.values()))
    axes.set_xlabel(f"ms a step ({devices}), and share of the training step")
    bare(axes)
    legend(axes, colors, title="role", outside="upper")
    figure.suptitle("Update by stack", fontsize="medium")
    return pixels(figure)


def _beside(axes: Any, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), (6, 0), textcoords="offset points", va="center", fontsize="small")


def _split(windows: Sequence[TraceCosts]) -> dict[tuple[str, str], dict[str, float]]:
    """Shares of the phases of each role and rule."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for (role, rule, phase), ms in by_phase(windows).items():
        found.setdefault((role, rule), {})[phase] = sum(ms)
    return {
        key: {phase: ms / sum(parts.values()) for phase, ms in parts.items()}
        for key, parts in found.items()
        if sum(parts.values())
    }
