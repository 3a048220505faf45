"""Windows of `torch.profiler` in a loop of steps, each a trace file that TensorBoard's profiler plugin finds.

    skip_first │ wait │ warmup │ active │ wait │ warmup │ active │ ...            (steps; `repeat` windows)

Nothing is profiled while steps are skipped and waited for. In the warm-up the profiler is prepared, which slows a GPU
down at first, and records nothing. The active steps of a window make one file. Around each stands the range
`ProfilerStep#N`, N being the number of the step.

While somebody else profiles, a window waits; one that is taken over is given up, and begun anew when the other has
finished. Nobody else's profile is ended. `lit_symopt.profiling.active` says why this takes care.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as Profile

from lit_symopt.errors import ProfileError
from lit_symopt.profiling.active import Claim, Others
from lit_symopt.profiling.events import STEP_PREFIX, Trace
from lit_symopt.profiling.schedule import Schedule
from lit_symopt.profiling.trace_file import write_trace


@dataclass(frozen=True, kw_only=True)
class Window:
    """What was recorded.

    Attributes:
        trace: as it was read from its file.
        first, last: numbers of the recorded steps.
    """

    trace: Trace
    first: int
    last: int


class Windows:
    """Takes windows: `before` and `after` are called around every step.

    Args:
        schedule: when.
        folder: where the files go; it is there; see `lit_symopt.profiling.trace_file.writable`.
        worker: whose they are, as `rank0`.
        record_shapes: keep shapes of operators, and arguments of ranges.
        memory: keep allocations.
        busy: says who else is going to profile soon, by name, if anybody is.
        say: gets what is to be known of windows that are late, cut short or lost.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     windows = Windows(Schedule(wait=0, warmup=0, active=1), Path(folder), worker="rank0")
        ...     windows.before(1)
        ...     _ = torch.ones(3) + 1
        ...     window = windows.after()
        ...     name = window.trace.path.name
        >>> name.startswith("rank0."), name.endswith(".pt.trace.json"), windows.done
        (True, True, True)
    """

    def __init__(
        self,
        schedule: Schedule,
        folder: Path,
        *,
        worker: str,
        record_shapes: bool = True,
        memory: bool = True,
        busy: Callable[[], str | None] = lambda: None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.schedule = schedule
        self.folder = folder
        self.worker = worker
        self.taken = 0
        self._record_shapes = record_shapes
        self._memory = memory
        self._busy = busy
        self._say = say
        self._others = Others()
        self._left = schedule.skip_first + schedule.wait  # steps before the next warm-up
        self._profile: Profile | None = None
        self._claim: Claim | None = None
        self._warm = 0  # steps of the warm-up that are left
        self._numbers: list[int] = []  # of the steps that are recorded, or being recorded
        self._whole = 0
        self._step: record_function | None = None
        self._in_the_way: str | None = None

    @property
    def done(self) -> bool:
        """Whether all windows are taken."""
        return self.taken == self.schedule.repeat

    @property
    def active(self) -> bool:
        """Whether a step of a window is being recorded."""
        return self._step is not None

    def before(self, step: int) -> None:
        """Begins a step, given its number."""
        if self.done or self._left > 0:
            return
        if self._profile is None:
            if self._is_taken():
                return
            self._warm, self._whole, self._in_the_way = self.schedule.warmup, 0, None
            self._prepare()
        elif self._warm == 0 and self._whole == 0 and self._is_lost():
            return
        if self._warm == 0:
            if self._whole == 0:
                self._start()
                self._numbers = []
            self._numbers.append(step)
            self._step = record_function(f"{STEP_PREFIX}{step}")
            self._step.__enter__()

    def after(self) -> Window | None:
        """Ends a step; gives a window with its last one."""
        if self._profile is None:
            self._left = max(0, self._left - 1)
            return None
        if self._step is None:
            self._warm -= 1
            return None
        self._leave()
        self._whole += 1
        if self._is_lost() or self._whole < self.schedule.active:
            return None
        return self._export()

    def finish(self) -> Window | None:
        """Ends the loop: gives what is whole of a window that it ends in."""
        if self._profile is None:
            if self._in_the_way is not None:
                self._say(
                    f"window {self.taken + 1} of {self.schedule.repeat} was not taken: {self._in_the_way} was in the "
                    "way until training ended"
                )
            return None
        self._leave()
        if not self._whole:
            self._say(f"training ended before window {self.taken + 1} had a whole step; it is discarded")
            self.discard()
            return None
        if self._is_lost():
            return None
        self._say(
            f"training ended in window {self.taken + 1}: it has {self._whole} of {self.schedule.active} steps, "
            "and is kept"
        )
        return self._export()

    def discard(self) -> None:
        """Stops to profile, and throws away a window that is not whole."""
        self._leave()
        if self._profile is None:
            return
        if not self._is_gone():
            if not self._claim:
                self._start()
            self._profile.stop_trace()
        self._forget()

    def give_way(self, name: str, why: str) -> None:
        """Throws away a window, or its warm-up, for somebody else who profiles; it is begun again later."""
        if self._profile is None:
            return
        self.discard()
        self._in_the_way = name
        self._say(
            f"window {self.taken + 1} of {self.schedule.repeat} gives way to {name}, {why}. It is begun again later"
        )

    def leave(self, range_: AbstractContextManager[Any]) -> None:
        """Closes a range that was opened in a step of a window."""
        if self._claim is None:
            range_.__exit__(None, None, None)
        else:
            self._claim.leave(range_)

    # -- the profiler --------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        # A new one for each window: used again, torch's warns that it forgets the window before.
        self._profile = Profile(activities=activities, record_shapes=self._record_shapes, profile_memory=self._memory)
        self._profile.prepare_trace()
        self._claim = Claim()

    def _start(self) -> None:
        assert self._profile is not None
        assert self._claim is not None
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels of the step before do not belong here
        self._profile.start_trace()
        self._claim.record()

    def _forget(self) -> None:
        assert self._profile is not None
        _release(self._profile)
        self._profile, self._whole = None, 0

    def _leave(self) -> None:
        """Closes the range of the step."""
        if self._step is not None:
            step, self._step = self._step, None
            self.leave(step)

    def _is_taken(self) -> bool:
        """Whether somebody else is profiling; says so once for each window."""
        name = self._busy()
        if name is None and self._others.active():
            name = "another profiler of torch"
        if name is not None and self._in_the_way is None:
            self._say(
                f"window {self.taken + 1} of {self.schedule.repeat} waits: {name} is in the way, and torch profiles "
                "for one at a time"
            )
        self._in_the_way = name or self._in_the_way
        return name is not None

    def _is_gone(self) -> bool:
        """Whether somebody else has begun to profile, which has ended the window or is going to."""
        assert self._claim is not None
        return not self._claim.holds() or (not self._claim and self._others.active(own=self._profile))

    def _is_lost(self) -> bool:
        """The same; says so, and then the window waits for its turn again."""
        if not self._is_gone():
            return False
        self._forget()  # not stopped: what would be stopped is the other one's
        self._in_the_way = self._busy() or "another profiler of torch"
        self._say(
            f"window {self.taken + 1} of {self.schedule.repeat} is lost: {self._in_the_way} was started in it, and "
            "torch profiles for one at a time. It is begun again when the other has finished"
        )
        return True

    # -- the file ------------------------------------------------------------------------------------------------

    def _export(self) -> Window | None:
        """Writes the file, and reads it; says so if that fails."""
        assert self._profile is not None
        profile, numbers = self._profile, self._numbers[: self._whole]
        self._profile = None  # whatever fails from here on, the next window is begun with a profiler of its own
        self.taken += 1
        self._left = self.schedule.wait
        try:
            profile.stop_trace()
            trace = write_trace(profile, self.folder, worker=self.worker, steps=numbers)
        except (OSError, RuntimeError, ValueError, ProfileError) as error:
            steps = f"{numbers[0]} to {numbers[-1]}"
            self._say(f"the window of the steps {steps} could not be written to {self.folder}: {error}")
            return None
        finally:
            _release(profile)
        return Window(trace=trace, first=numbers[0], last=numbers[-1])


def _release(profile: Profile) -> None:
    """Drops a profiler's session and all its events now; torch's profiler holds itself in a cycle.

    Until that is collected, a session that was not stopped would pass for somebody else's.
    """
    profile.profiler = None
