"""`lit-symopt profile-compare`: what became slower or faster between two records, beyond their noise.

Of each block's time T (`lit_symopt.profiling.noise`) in records A and B:

    ratio = T_B / T_A        σ = √(s_A² + s_B²), at least 2 %

A machine that is slower in B is so for everything. How much, two things say: forward and backward, which no optimizer
touches, and the rules, most of which have not changed. Programs that interrupt meet what takes long more often, so
these may differ, and what explains less is believed:

    rules    = median over rules of the median ratio of their blocks
    machine  = max(1, min(ratio of forward + backward, rules))        for a ratio above 1
    machine  = min(1, max(ratio of forward + backward, rules))        for one below
    relative = ratio / machine

A block is *slower* if `log relative` is above both `log(1 + threshold) + σ` and 3 σ; *faster* is the same in the other
direction. So a machine that was slower that day is no regression; it is said. A block of less than 1 % of the update or
50 μs in both records is listed and decides nothing; nor does a block that only one record has, but the whole update is
a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, hypot, log
from statistics import median
from typing import Literal

from lit_symopt.errors import ConfigError, ProfileError
from lit_symopt.profiling.alike import unlike
from lit_symopt.profiling.noise import Windows, estimate, speed_of
from lit_symopt.profiling.record import Record, StackRecord
from lit_symopt.profiling.samples import Samples
from lit_symopt.profiling.stacks import aligned, update_of

THRESHOLD = 0.1
CERTAIN = 3.0  # standard errors
LEAST_ERROR = 0.02  # machines that are busy in different ways differ by as much from block to block
MINOR_SHARE, MINOR_US = 0.01, 50.0
UPDATE = "whole update"
CONTROL = "forward + backward"

Verdict = Literal["slower", "faster", "same", "new", "gone"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One row.

    Attributes:
        stack: of it.
        name: `role/rule`, `UPDATE` or `CONTROL`.
        before, after: times of a step in μs; 0 in the record that lacks it.
        ratio: after over before.
        relative: what is left of it when the machine was slower or faster as a whole.
        noise: three standard errors of the ratio, as a share: a change below it may be chance.
        verdict: what is said of it.
        decides: whether a regression in it is one of the record: it is no control, and costs enough.
    """

    stack: str
    name: str
    before: float
    after: float
    ratio: float
    relative: float
    noise: float
    verdict: Verdict
    decides: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two records, held against each other.

    Attributes:
        threshold: of the verdicts.
        changes: by stack: the control, the whole update, then its blocks, the costliest first.
        warnings: what should be known before the table is read.
    """

    threshold: float
    changes: tuple[Change, ...]
    warnings: tuple[str, ...] = ()

    @property
    def regressions(self) -> list[Change]:
        """What became slower and decides."""
        return [change for change in self.changes if change.verdict == "slower" and change.decides]

    def __str__(self) -> str:
        head = ("stack", "update of", "A ms", "B ms", "B / A", "relative", "noise", "verdict")
        rows = [
            (
                change.stack,
                change.name,
                _ms(change.before),
                _ms(change.after),
                _times(change.ratio) if change.before and change.after else "",
                _times(change.relative) if change.before and change.after and change.name != CONTROL else "",
                f"±{change.noise:.0%}" if change.before and change.after else "",
                change.verdict + (" (minor)" if _is_minor(change) else ""),
            )
            for change in self.changes
        ]
        found = self.regressions
        faster = [change for change in self.changes if change.verdict == "faster" and change.decides]
        names = ", ".join(f"{change.stack} {change.name} ({_times(change.ratio)})" for change in found)
        last = f"{len(found)} regression(s) above {self.threshold:.0%}: {names}" if found else "no regression"
        if faster:
            last += f"; faster: {', '.join(f'{one.stack} {one.name} ({_times(one.ratio)})' for one in faster)}"
        return "\n".join([*self.warnings, aligned(head, rows, left=(0, 1, 7)), "", last])


def compare(before: Record, after: Record, *, threshold: float = THRESHOLD, anyway: bool = False) -> Comparison:
    """What became slower or faster.

    Args:
        before, after: records A and B.
        threshold: a change up to this share is none.
        anyway: compare records of different devices or recipes, too, and say so.

    Raises:
        ConfigError: for a threshold that is not positive.
        ProfileError: if the records are of different devices, recipes, strategies or versions of torch, or have no
            stack in common.
    """
    if not threshold > 0:
        raise ConfigError(f"threshold={threshold} must be above 0; 0.1 is 10 %")
    shared = [stack for stack in before.stacks if stack in after.stacks]
    if not shared:
        raise ProfileError(
            f"the records have no stack in common: A has {', '.join(before.stacks)}, B has {', '.join(after.stacks)}"
        )
    warnings = unlike(before, after, shared)
    if warnings and not anyway:
        raise ProfileError(
            f"these records cannot be compared: {'; '.join(warnings)}. Profile the same recipe on the same machine, or "
            "give --anyway"
        )
    if warnings:
        warnings = ["NOT ALIKE, compared anyway:", *(f"  {warning}" for warning in warnings), ""]
    for name, record in (("A", before), ("B", after)):
        if (record.commit or {}).get("dirty"):
            warnings.append(f"{name} was measured with uncommitted changes")
        if record.spec.get("rounds") == 1:
            warnings.append(f"{name} has one run of each stack: how runs differ is not known, and noise is understated")
    changes = []
    for stack in shared:
        found = _of_stack(stack, before.stacks[stack], after.stacks[stack], threshold)
        control = found[0]
        if control.verdict in ("slower", "faster"):
            warnings.append(
                f"{stack}: {CONTROL}, which no optimizer touches, is {control.verdict} in B ({_times(control.ratio)}): "
                "the machine, or the model, was not as in A. See the column `relative`"
            )
        changes += found
    for name, one, other in (("A", before, after), ("B", after, before)):
        only = [stack for stack in one.stacks if stack not in other.stacks]
        if only:
            warnings.append(f"only {name} has {', '.join(only)}")
    return Comparison(threshold=threshold, changes=tuple(changes), warnings=tuple(warnings))


def _of_stack(stack: str, before: StackRecord, after: StackRecord, threshold: float) -> list[Change]:
    """The control, the whole update, then the blocks, the costliest first."""
    speeds = _speed(before), _speed(after)
    control = _change(stack, CONTROL, (list(before.control.values()), list(after.control.values())), speeds, threshold)
    update = _change(stack, UPDATE, (update_of(before), update_of(after)), speeds, threshold)
    names = dict.fromkeys([*before.blocks, *after.blocks])
    blocks = [
        _change(stack, name.removesuffix("/"), (_block(before, name), _block(after, name)), speeds, threshold)
        for name in names  # what is not attributed has no rule
    ]
    blocks = [
        replace(
            row, decides=row.decides and not (_minor(row.before, update.before) and _minor(row.after, update.after))
        )
        for row in sorted(blocks, key=lambda row: -max(row.before, row.after))
    ]
    explained = control.ratio, _of_rules(blocks) or update.ratio
    return [
        replace(control, decides=False),
        *(_relative(row, min(explained), max(explained), threshold) for row in (update, *blocks)),
    ]


def _is_minor(change: Change) -> bool:
    return bool(change.before and change.after and change.name != CONTROL and not change.decides)


def _minor(us: float, update: float) -> bool:
    return us < max(MINOR_US, MINOR_SHARE * update)


def _of_rules(blocks: Sequence[Change]) -> float | None:
    """The median over the rules of the median ratio of their blocks."""
    ratios: dict[str, list[float]] = {}
    for row in blocks:
        if row.decides:
            ratios.setdefault(row.name.rpartition("/")[2], []).append(row.ratio)
    return median(median(of_rule) for of_rule in ratios.values()) if ratios else None


def _speed(stack: StackRecord) -> Windows:
    rules: dict[str, list[Samples]] = {}
    for name, samples in stack.blocks.items():
        rules.setdefault(name.rpartition("/")[2], []).append(samples)
    return speed_of([list(stack.control.values()), *rules.values()])


def _block(stack: StackRecord, name: str) -> list[Samples]:
    return [stack.blocks[name]] if name in stack.blocks else []


def _change(
    stack: str,
    name: str,
    parts: tuple[list[Samples], list[Samples]],
    speeds: tuple[Windows, Windows],
    threshold: float,
) -> Change:
    """A row as if the machine had not changed."""
    before, after = (estimate(*own, speed=speed if own else None) for own, speed in zip(parts, speeds, strict=True))
    both = bool(before.value and after.value)
    row = Change(
        stack=stack,
        name=name,
        before=before.value,
        after=after.value,
        ratio=after.value / before.value if both else 1.0,
        relative=1.0,
        noise=exp(CERTAIN * max(hypot(before.error, after.error), LEAST_ERROR)) - 1 if both else 0.0,
        verdict="same" if before.value == after.value or both else "gone" if before.value else "new",
        decides=both,
    )
    return _relative(row, 1.0, 1.0, threshold)


def _relative(row: Change, lowest: float, highest: float, threshold: float) -> Change:
    """The row, if the machine became slower by a ratio between `lowest` and `highest`."""
    if not (row.before and row.after):
        return row
    relative = row.ratio / (max(1.0, lowest) if row.ratio > 1 else min(1.0, highest))
    verdict: Verdict = "same"
    error = log(1 + row.noise) / CERTAIN
    if abs(log(relative)) > max(log(1 + threshold) + error, CERTAIN * error):
        verdict = "slower" if relative > 1 else "faster"
    if (relative > 1) != (row.ratio > 1):
        verdict = "same"  # the machine explains more than all of it
    return replace(row, relative=relative, verdict=verdict)


def _ms(us: float) -> str:
    return f"{us / 1000:,.3f}" if us else "–"


def _times(ratio: float) -> str:
    return f"×{ratio:.2f}"
