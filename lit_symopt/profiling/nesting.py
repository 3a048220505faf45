"""Intervals on one thread: which lies in which, and how much of its time each has for itself.

Every instant belongs to the interval that began last among those open. For properly nested intervals that is the
innermost one; for intervals that cross (rounded time stamps, contexts that are closed in another order than they were
opened) it is still exactly one, so the times for themselves always add up to the time that any interval covers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

NONE = -1
"""The index of no interval."""


@dataclass(frozen=True)
class Nesting:
    """What lies in what.

    Attributes:
        parents: index of the interval that an interval began in; `NONE` for an outermost one.
        own: time that no interval inside has.
        times: when the innermost interval changes, ascending; of several changes at one time the last holds.
        owners: index of the innermost interval from that time on; `NONE` where there is none.
    """

    parents: list[int]
    own: list[int]
    times: list[int]
    owners: list[int]

    def at(self, time: int) -> int:
        """Index of the innermost interval at a time; an interval holds its start, not its end."""
        place = bisect_right(self.times, time) - 1
        return self.owners[place] if place >= 0 else NONE


def nest(starts: Sequence[int], ends: Sequence[int]) -> Nesting:
    """Nests intervals, in one pass.

    Args:
        starts: ascending; of intervals that begin together the outer one comes first.
        ends: no end lies before its start.

    Example:
        >>> nest([0, 2, 3, 8], [10, 6, 4, 12]).own  # the last crosses the end of the first
        [4, 3, 1, 4]
    """
    nesting = Nesting([], [0] * len(starts), [], [])
    stack: list[int] = []
    now = 0
    for index, start in enumerate(starts):
        now = _close(nesting, stack, ends, now, until=start)
        nesting.parents.append(stack[-1] if stack else NONE)
        stack.append(index)
        _turn(nesting, start, index)
        now = start
    if ends:
        _close(nesting, stack, ends, now, until=max(ends))
    return nesting


def _close(nesting: Nesting, stack: list[int], ends: Sequence[int], now: int, *, until: int) -> int:
    """Gives the time from `now` to `until` to its owners, and takes away intervals that end in it."""
    while stack and ends[stack[-1]] <= until:
        end = ends[stack[-1]]
        if end > now:  # else it ended under one that began later
            nesting.own[stack[-1]] += end - now
            now = end
        stack.pop()
        _turn(nesting, now, stack[-1] if stack else NONE)
    if stack:
        nesting.own[stack[-1]] += until - now
    return until


def _turn(nesting: Nesting, time: int, owner: int) -> None:
    nesting.times.append(time)
    nesting.owners.append(owner)
