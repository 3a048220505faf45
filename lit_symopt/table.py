"""The block table: what every parameter gets, printed once."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_symopt.optim import SymOpt

_COLUMNS = ("parameter", "shape", "role", "symmetry", "rule", "centered", "lr")


@dataclass
class _Row:
    names: list[str]
    cells: tuple[str, ...]


def block_rows(optimizer: SymOpt, frozen: list[tuple[str, tuple[int, ...]]] | None = None) -> list[tuple[str, ...]]:
    """Rows of the block table; equal layers that differ in a number of their name share a row.

    Args:
        optimizer: built by `SymOpt.for_module`.
        frozen: name and shape of parameters that are not trained.
    """
    rows: dict[tuple[str, tuple[str, ...]], _Row] = {}
    for group in optimizer.param_groups:
        described = (group["role"], group["symmetry"] or "–", group["rule"], "yes" if group["centered"] else "no")
        for name, shape in zip(group["param_names"], group["shapes"], strict=True):
            cells = (_shape(tuple(shape)), *described, f"{group['lr']:.3g}")
            _add(rows, name, cells)
    for name, shape in frozen or []:
        _add(rows, name, (_shape(shape), "frozen", "–", "–", "–", "–"))
    return [(_collapsed(row.names), *row.cells) for row in rows.values()]


def format_table(optimizer: SymOpt, frozen: list[tuple[str, tuple[int, ...]]] | None = None) -> str:
    """The block table as plain text."""
    lines = [_COLUMNS, *block_rows(optimizer, frozen)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([padded[0], "-" * len(padded[0]), *padded[1:]])


def print_table(optimizer: SymOpt, frozen: list[tuple[str, tuple[int, ...]]] | None = None) -> None:
    """Print the block table: with rich in a terminal, plainly into a log."""
    if not sys.stdout.isatty():
        print(format_table(optimizer, frozen), flush=True)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*_COLUMNS, title="SymOpt blocks")
    for row in block_rows(optimizer, frozen):
        table.add_row(*row)
    Console().print(table)


def _add(rows: dict[tuple[str, tuple[str, ...]], _Row], name: str, cells: tuple[str, ...]) -> None:
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
    rows.setdefault((pattern, cells), _Row([], cells)).names.append(name)


def _collapsed(names: list[str]) -> str:
    """`layers.0.w, layers.1.w, layers.2.w` as `layers.{0..2}.w (3)`."""
    if len(names) == 1:
        return names[0]
    pieces = [re.split(r"(?<=\.)(\d+)(?=\.)", name) for name in names]
    first, last = pieces[0], pieces[-1]
    text = "".join(a if a == b else f"{{{a}..{b}}}" for a, b in zip(first, last, strict=True))
    return f"{text} ({len(names)})"


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) if shape else "scalar"
