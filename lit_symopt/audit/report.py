"""What an audit found, as rows with numbers and as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "FAIL", "inconclusive", "does not apply"]
_GOOD = ("pass", "does not apply")


@dataclass(frozen=True, kw_only=True)
class LossFinding:
    """One symmetry on one kind of site: the worst over its layers.

    Attributes:
        symmetry: what acted.
        site: kind of site.
        where: the module it was worst in.
        sites: number of sites.
        tried: number of group elements.
        fp32, float64: largest relative change of the loss.
        control: relative change of the loss by the broken element, the smallest over the sites.
        verdict: `pass`, `FAIL`, `inconclusive` (the control did not move the loss, or the loss is no number), or
            `does not apply`.
        reason: why, where it is not plain from the numbers.
    """

    symmetry: str
    site: str
    where: str
    sites: int = 1
    tried: int = 0
    fp32: float | None = None
    float64: float | None = None
    control: float | None = None
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class UpdateFinding:
    """How far the optimizer's updates of equal blocks are from commuting with a group.

    Attributes:
        blocks: names of the blocks.
        role, rule: what they are and what they get.
        group: what acted on units and features.
        tried: number of group elements.
        error: largest ‖U(g G) - g U(G)‖ / ‖U(G)‖ over blocks and elements.
        worst: the block it was largest in.
        verdict: `pass`, `FAIL` or `does not apply`.
        reason: why, where it is not plain from the number.
    """

    blocks: tuple[str, ...]
    role: str
    rule: str
    group: str
    tried: int
    error: float | None
    worst: str
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """The rows of an audit; printing it shows them as tables.

    Attributes:
        loss: one row a symmetry and kind of site.
        updates: one row a role, rule and verdict; empty if only the loss was asked for.
        headline: what was audited.
    """

    loss: tuple[LossFinding, ...]
    updates: tuple[UpdateFinding, ...] = ()
    headline: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing failed and nothing was left open."""
        return not self.failures

    @property
    def failures(self) -> list[LossFinding | UpdateFinding]:
        """The rows that did not pass."""
        rows: list[LossFinding | UpdateFinding] = [*self.loss, *self.updates]
        return [row for row in rows if row.verdict not in _GOOD]

    def __str__(self) -> str:
        text = [self.headline] if self.headline else []
        columns: tuple[str, ...] = (
            "symmetry",
            "site",
            "worst in",
            "sites",
            "elements",
            "fp32",
            "float64",
            "control",
            "verdict",
        )
        text += ["", "Change of the loss, relative", *_table(columns, [_loss_row(row) for row in self.loss])]
        if self.updates:
            columns = ("blocks", "role", "rule", "group", "elements", "error", "verdict")
            text += ["", "Updates, distance from commuting", *_table(columns, [_update_row(u) for u in self.updates])]
        failed = len(self.failures)
        text += ["", "passed" if self.passed else f"FAILED: {failed} row(s)"]
        return "\n".join(text)


def collapsed(names: Sequence[str]) -> str:
    """Names that differ in numbers only, as one.

    >>> collapsed(["layers.0.mlp.3.w", "layers.1.mlp.3.w", "layers.2.mlp.3.w"])
    'layers.{0..2}.mlp.3.w (3)'
    """
    if len(names) == 1:
        return names[0]
    pieces = [re.split(r"(\d+)", name) for name in names]
    if len({tuple(piece[::2]) for piece in pieces}) > 1:
        return f"{names[0]} ({len(names)})"
    text = ""
    for index, column in enumerate(zip(*pieces, strict=True)):
        numbers = sorted({int(value) for value in column}) if index % 2 else []
        text += f"{{{numbers[0]}..{numbers[-1]}}}" if len(numbers) > 1 else column[0]
    return f"{text} ({len(names)})"


def _loss_row(row: LossFinding) -> tuple[tuple[str, ...], str]:
    numbers = (_number(row.fp32), _number(row.float64), _number(row.control))
    tried = str(row.tried) if row.tried else "–"
    return (row.symmetry, row.site, row.where or "–", str(row.sites), tried, *numbers, row.verdict), row.reason


def _update_row(row: UpdateFinding) -> tuple[tuple[str, ...], str]:
    cells = (collapsed(row.blocks), row.role, row.rule, row.group, str(row.tried), _number(row.error), row.verdict)
    return cells, row.reason


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _table(columns: Sequence[str], rows: Sequence[tuple[tuple[str, ...], str]]) -> list[str]:
    """Aligned columns, with the reason after the verdict."""
    lines = [tuple(columns), *(cells for cells, _ in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    reasons = ["", *(reason for _, reason in rows)]
    shown = [
        f"{line.rstrip()}: {reason}" if reason else line.rstrip() for line, reason in zip(padded, reasons, strict=True)
    ]
    return [shown[0], "-" * len(shown[0]), *shown[1:]]
