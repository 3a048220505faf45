"""The stacks of a record beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from lit_symopt.profiling.noise import estimate, over_rounds
from lit_symopt.profiling.record import Record, StackRecord
from lit_symopt.profiling.samples import Samples, added

HEAD = ("stack", "update ms", "share of step", "step ms", "against own", "rounds")


@dataclass(frozen=True, kw_only=True)
class StackCost:
    """One row.

    Attributes:
        stack: its name.
        update: device time of the update in a step, median, in μs.
        share: of all time of the steps.
        wall: duration of a step, median, in μs.
        ratio: of the update's time to that of the recipe's own stack, as of `lit_symopt.profiling.noise`.
        lowest, highest: of the same, round by round.
    """

    stack: str
    update: float
    share: float
    wall: float
    ratio: float
    lowest: float
    highest: float


def update_of(stack: StackRecord) -> list[Samples]:
    """Samples of the parts of the update; of an optimizer without ranges, of the stage of the optimizer."""
    return list(stack.blocks.values()) or [stack.stages["optimizer"]]


def stack_costs(record: Record) -> list[StackCost]:
    """The rows, the recipe's own stack first."""
    own = update_of(record.stacks[record.own])
    rows = []
    for name in sorted(record.stacks, key=lambda name: name != record.own):
        parts, wall = update_of(record.stacks[name]), record.stacks[name].wall
        update = added(parts)
        by_round = [a / b for a, b in zip(over_rounds(*parts), over_rounds(*own), strict=False) if b]
        base = estimate(*own).value
        rows.append(
            StackCost(
                stack=name,
                update=median(_flat(update)),
                share=sum(_flat(update)) / sum(_flat(wall)),
                wall=median(_flat(wall)),
                ratio=estimate(*parts).value / base if base else 0.0,
                lowest=min(by_round, default=0.0),
                highest=max(by_round, default=0.0),
            )
        )
    return rows


def stack_rows(record: Record) -> list[tuple[str, ...]]:
    """The rows as text, below `HEAD`."""
    return [
        (
            row.stack,
            f"{row.update / 1000:,.3f}",
            f"{row.share:.1%}",
            f"{row.wall / 1000:,.2f}",
            f"×{row.ratio:.2f}",
            f"×{row.lowest:.2f} to ×{row.highest:.2f}",
        )
        for row in stack_costs(record)
    ]


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """A table as plain text: numbers to the right.

    Example:
        >>> print(aligned(("stack", "ms"), [("muon", "1.5"), ("adamw", "10.0")]))
        stack    ms
        -----------
        muon    1.5
        adamw  10.0
    """
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    padded = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([padded[0], "-" * max(map(len, padded)), *padded[1:]])


def _flat(samples: Samples) -> list[float]:
    return [value for round_ in samples for window in round_ for value in window]
