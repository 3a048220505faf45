"""What each update costs, as text: for a terminal, in Markdown, and rows for a CSV file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lit_symopt.profiling.costs import HOST, UNATTRIBUTED, TraceCosts
from lit_symopt.profiling.reduce import Spread, by_kernel, place, samples
from lit_symopt.profiling.rows import CostTable, cost_table

if TYPE_CHECKING:
    from lit_symopt.profiling.roofline import RooflinePoint

_WIDTH = 120  # columns of a terminal
_LEAST = 12  # columns for the names of kernels
_TEXT = ("role", "rule", "stage", "top phase", "top kernels")  # the rest are numbers
_NOTHING = "No whole training step was recorded."

Lines = list[tuple[str, ...]]


def format_table(windows: Sequence[TraceCosts], points: Iterable[RooflinePoint] = ()) -> str:
    """The tables as plain text, at most 120 columns wide; `lit_symopt.profiling.rows` says what is in them."""
    table = cost_table(windows, points)
    if not table.steps:
        return _NOTHING
    lines = _narrowed(_blocks(table))
    return "\n".join([*_heading(table), "", *_aligned(lines), "", *_aligned(_stages(table))])


def markdown_table(windows: Sequence[TraceCosts], points: Iterable[RooflinePoint] = ()) -> str:
    """The tables in Markdown, as TensorBoard and a README show them."""
    table = cost_table(windows, points)
    if not table.steps:
        return _NOTHING
    return "\n\n".join([*_heading(table), _markdown(_blocks(table, quote="`")), _markdown(_stages(table))])


def kernel_rows(windows: Sequence[TraceCosts]) -> list[dict[str, Any]]:
    """Rows for a CSV file: every kernel in every place, the costliest first.

    | column | unit |
    |---|---|
    | `stage`, `role`, `rule`, `phase`, `kernel` | – |
    | `calls` | a step, mean |
    | `ms`, `lowest_ms`, `highest_ms` | of the device, a step: median, lowest, highest |
    | `host_ms` | of the host thread, a step: median |
    | `share` | of the device time of all steps |
    """
    device, host = by_kernel(windows), by_kernel(windows, clock="host")
    calls = samples(windows, place, lambda cost: cost.calls)
    whole = sum(map(sum, device.values()))
    rows = []
    for where, ms in sorted(device.items(), key=lambda item: -sum(item[1])):
        spread = Spread.of(ms)
        rows.append(
            {
                **dict(zip(("stage", "role", "rule", "phase", "kernel"), where, strict=True)),
                "calls": sum(calls[where]) / len(ms),
                "ms": spread.median,
                "lowest_ms": spread.lowest,
                "highest_ms": spread.highest,
                "host_ms": Spread.of(host[where]).median,
                "share": sum(ms) / whole if whole else 0.0,
            }
        )
    return rows


def short_kernel(name: str) -> str:
    """The name of a kernel without namespaces, types and parameters; `host` for what is in no operator.

    Example:
        >>> short_kernel("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float> >(int)")
        'vectorized_elementwise_kernel<CUDAFunctor_add>'
        >>> short_kernel("aten::_foreach_mul_"), short_kernel("sm80_xmma_gemm_f32f32_tn_cublas")
        ('_foreach_mul_', 'sm80_xmma_gemm_f32f32_tn_cublas')
    """
    if name == HOST:
        return "host"
    if not re.search(r"::|<|^void ", name):
        return name
    plain = re.sub(r"\(anonymous namespace\)::|^void ", "", name)
    outer, _, inner = plain.partition("<")
    inside = [found.rpartition("::")[2] for found in re.findall(r"[A-Za-z_][\w:]*", inner.partition("(")[0])]
    inside = [found for found in inside if found not in _TYPES]
    outer = outer.partition("(")[0].rpartition("::")[2]
    # Of what many kernels have in common the functor tells them apart.
    inside.sort(key=lambda found: "Functor" not in found)
    return f"{outer}<{inside[0]}>" if inside else outer


_TYPES = {"bool", "char", "double", "float", "int", "long", "short", "unsigned", "true", "false", "Half", "BFloat16"}


def _heading(table: CostTable) -> list[str]:
    """What was measured, and whether it adds up."""
    steps = f"{table.steps} training step{'s' if table.steps > 1 else ''}"
    windows = f"{table.windows} window{'s' if table.windows > 1 else ''}"
    lines = [f"Cost of the optimizer on {table.device}: {steps} in {windows}; medians over the steps, and the range."]
    if table.parts.highest == 0.0:
        return [*lines, f"No step of SymOpt was recorded. Training step {_spread(table.wall)} ms."]
    return [
        *lines,
        f"Update {_spread(table.parts)} ms, {table.of_step:.1%} of the training step of {_spread(table.wall)} ms. "
        f"Attributed: {table.attributed:.1%}.",
        f"Whole range symopt/step on the host: {_spread(table.update)} ms; its parts add up to {table.of_update:.1%}.",
    ]


def _blocks(table: CostTable, *, quote: str = "") -> Lines:
    """Roles and rules; `quote` stands around the names of kernels."""
    cuda, roofline = table.device == "cuda", any(row.roofline is not None for row in table.blocks)
    head = ["role", "rule", "ms/step", "range", *(["host ms"] if cuda else []), "% update", "% step"]
    lines = [(*head, "top phase", *(["% roof"] if roofline else []), "top kernels")]
    for row in table.blocks:
        reached = ["–" if row.roofline is None else _percent(row.roofline)] if roofline else []
        lines.append(
            (
                row.role,
                row.rule or "–",
                _ms(row.ms.median),
                f"{_ms(row.ms.lowest)}–{_ms(row.ms.highest)}",
                *([_ms(row.host_ms.median)] if cuda else []),
                _percent(row.of_update),
                _percent(row.of_step),
                f"{row.phase} {row.of_phase:.0%}" if row.phase and row.role != UNATTRIBUTED else "–",
                *reached,
                ", ".join(f"{quote}{short_kernel(name)}{quote} {share:.0%}" for name, share in row.kernels) or "–",
            )
        )
    return lines


def _stages(table: CostTable) -> Lines:
    """Stages, and the whole step."""
    cuda = table.device == "cuda"
    lines = [("stage", "ms/step", "range", *(["host ms"] if cuda else []), "% step")]
    for row in table.stages:
        share = "outside" if row.of_step is None else _percent(row.of_step)
        lines.append(_stage(row.stage, row.ms, [row.host_ms] if cuda else [], share))
    lines.append(_stage("training step (wall)", table.wall, [table.wall] if cuda else [], "100.0"))
    return lines


def _stage(name: str, ms: Spread, host: list[Spread], share: str) -> tuple[str, ...]:
    return name, _ms(ms.median), f"{_ms(ms.lowest)}–{_ms(ms.highest)}", *(_ms(own.median) for own in host), share


def _ms(value: float) -> str:
    return f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _spread(spread: Spread) -> str:
    return f"{_ms(spread.median)} ({_ms(spread.lowest)}–{_ms(spread.highest)})"


def _cut(cell: str, room: int) -> str:
    return cell if len(cell) <= room else f"{cell[: room - 1]}…"


def _narrowed(lines: Lines) -> Lines:
    """Words cut to the width of a terminal, numbers never."""
    head, *rows = lines
    for longest in (18, 14, 11):
        cut = [
            tuple(_cut(cell, longest) if name in _TEXT else cell for name, cell in zip(head, row, strict=True))
            for row in rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *cut, strict=True)]
        room = _WIDTH - sum(widths[:-1]) - 2 * (len(head) - 1)
        if room >= _LEAST:
            break
    return [head, *((*short[:-1], _fit(row[-1], room)) for short, row in zip(cut, rows, strict=True))]


def _fit(kernels: str, room: int) -> str:
    """As many kernels as there is room for; the name of the costliest is cut before its share is."""
    while len(kernels) > room and ", " in kernels:
        kernels = kernels.rpartition(", ")[0]
    name, _, share = kernels.rpartition(" ")
    return kernels if len(kernels) <= room else f"{_cut(name, room - len(share) - 1)} {share}"


def _aligned(lines: Lines) -> list[str]:
    """Text to the left, numbers to the right, a rule under the head."""
    head = lines[0]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    padded = [
        "  ".join(
            cell.ljust(width) if name in _TEXT else cell.rjust(width)
            for cell, width, name in zip(line, widths, head, strict=True)
        ).rstrip()
        for line in lines
    ]
    return [padded[0], "-" * max(map(len, padded)), *padded[1:]]


def _markdown(lines: Lines) -> str:
    head = lines[0]
    rule = ["---" if name in _TEXT else "---:" for name in head]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (head, rule, *lines[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
