"""The page of a record: its README."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lit_symopt.profiling.costs import TraceCosts
from lit_symopt.profiling.record import SUMMARY, Record
from lit_symopt.profiling.samples import Samples
from lit_symopt.profiling.stacks import HEAD, stack_costs, stack_rows
from lit_symopt.profiling.table import markdown_table

if TYPE_CHECKING:
    from lit_symopt.profiling.roofline import RooflinePoint


def page(
    record: Record,
    *,
    windows: Mapping[str, Sequence[TraceCosts]],
    points: Mapping[str, Sequence[RooflinePoint]],
    drawn: Mapping[str, Sequence[tuple[str, str]]],
) -> str:
    """The README of a record."""
    lines = [f"# What each update costs: {record.recipe['name']}", "", *_shows(record), "", *_circumstances(record), ""]
    if len(record.stacks) > 1:
        lines += ["## Stacks", "", f"| {' | '.join(HEAD)} |", f"|---{'|---:' * (len(HEAD) - 1)}|"]
        lines += [f"| {' | '.join(row)} |" for row in stack_rows(record)]
        lines += ["", "Medians of all steps. *Against own*: lowest of each window, over those of the recipe's own"]
        lines += ["stack; *rounds*: the same round by round.", ""]
    lines += _shown(drawn.get("", ()))
    for stack in record.stacks:
        lines += [f"## {stack}", "", markdown_table(windows[stack], points.get(stack, ())), ""]
        lines += _shown(drawn.get(stack, ()))
    return "\n".join(lines).rstrip() + "\n"


def _shows(record: Record) -> Iterator[str]:
    """What the record shows, in sentences that follow from its numbers."""
    costs = {row.stack: row for row in stack_costs(record)}
    own, stack = costs[record.own], record.stacks[record.own]
    yield (
        f"The update of `{record.own}` takes {own.update / 1000:,.2f} ms of device time, {own.share:.1%} of a step of "
        f"{own.wall / 1000:,.1f} ms (medians)."
    )
    if stack.blocks:
        whole = sum(map(_sum, stack.blocks.values()))
        shares = sorted(((_sum(samples) / whole, name) for name, samples in stack.blocks.items()), reverse=True)
        parts = ", ".join(f"`{name}` {share:.0%}" for share, name in shares[:3])
        yield f"Most of it: {parts}. {stack.attributed_share:.1%} of it lies in a named phase."
    for name, row in costs.items():
        if name != record.own:
            yield (
                f"The update of `{name}` takes {row.ratio:.2f} times as long (rounds: {row.lowest:.2f} to "
                f"{row.highest:.2f})."
            )


def _circumstances(record: Record) -> Iterator[str]:
    commit = record.commit
    known = "not in a git tree" if commit is None else commit["commit"] + (", with changes" if commit["dirty"] else "")
    device = ", ".join(f"{key} {value}" for key, value in record.device.items() if not isinstance(value, (dict, list)))
    spec = record.spec
    yield f"- command: `{record.command}`"
    yield f"- commit: {known}; {record.date}"
    yield f"- device: {device}; {record.world} process(es)"
    yield f"- versions: {', '.join(f'{name} {version}' for name, version in record.versions.items())}"
    yield (
        f"- {spec['rounds']} round(s) of each stack in turn, {spec['repeat']} window(s) of {spec['active']} steps in "
        f"each; every step's times are in `{SUMMARY}`, every kernel's in `kernels.csv`"
    )


def _shown(pictures: Sequence[tuple[str, str]]) -> list[str]:
    return [line for title, name in pictures for line in (f"![{title}]({name})", "")]


def _sum(samples: Samples) -> float:
    return sum(value for round_ in samples for window in round_ for value in window)
