"""Whether somebody else is profiling this process: `torch` has one profiler at a time, and never says that it is taken.

A profiler that begins while another one is in its warm-up or recording ends it without a word. The process crashes
(torch 2.13: a segmentation fault, at once or when memory is next looked through) if one is stopped that has been ended
so, or if a range closes while another profiler records than the one it was opened under.
"""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch.autograd import profiler as _torch
from torch.autograd.profiler import profile as Session

_left_open: list[AbstractContextManager[Any]] = []


def recording() -> bool:
    """Whether any profiler of torch records on this thread; one in its warm-up does not."""
    return bool(torch.autograd._profiler_enabled())  # type: ignore[no-untyped-call, attr-defined, unused-ignore]


class Others:
    """Profilers of torch that are active.

    Finding one means a look at every object of Python, some 0.1 s; once one is found, it is asked until it ends.

    Example:
        >>> others = Others()
        >>> others.active()
        False
        >>> with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        ...     others.active()
        True
    """

    def __init__(self) -> None:
        self._found: list[ReferenceType[Session]] = []

    def active(self, *, own: torch.profiler.profile | None = None) -> bool:
        """Whether one is recording or in its warm-up.

        Args:
            own: one's own, which is in its warm-up and does not count.
        """
        if any(session is not None and _unfinished(session) for session in (found() for found in self._found)):
            return True
        mine = None if own is None else own.profiler
        # By their type, not with isinstance: some objects run code when they are asked for their class.
        sessions = [thing for thing in gc.get_objects() if type(thing) is Session and thing is not mine]
        self._found = [ref(session) for session in sessions if _unfinished(session)]
        return bool(self._found) or recording()


class Claim:
    """That the profiler which has begun last is one's own; made when it has been prepared.

    Example:
        >>> profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        >>> profiler.prepare_trace()
        >>> claim = Claim()
        >>> profiler.start_trace()
        >>> claim.record()
        >>> claim.holds()
        True
        >>> profiler.stop_trace()
        >>> claim.holds()
        False
    """

    def __init__(self) -> None:
        self._records = False
        # Whoever starts a profiler sets this flag of torch to true, and whoever stops one to false.
        _torch._is_profiler_enabled = self  # type: ignore[assignment]

    def __bool__(self) -> bool:
        """What the flag says: whether a profiler records."""
        return self._records

    def record(self) -> None:
        """To be called when the profiler has been started."""
        self._records = True
        _torch._is_profiler_enabled = self  # type: ignore[assignment]

    def holds(self) -> bool:
        """Whether nobody else has started one since, and it has not been stopped."""
        flag: object = _torch._is_profiler_enabled
        return flag is self and recording() == self._records

    def leave(self, range_: AbstractContextManager[Any]) -> None:
        """Closes a range that was opened while the claim held; one that torch must not be told of stays open."""
        if self.holds() or not recording():
            range_.__exit__(None, None, None)
        else:
            _left_open.append(range_)  # it would be closed when nothing refers to it any more


def _unfinished(session: Session) -> bool:
    return bool(session.entered) and session.kineto_results is None
