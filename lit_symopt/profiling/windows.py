"""Windows of `torch.profiler` in a loop of steps, each a trace file that TensorBoard's profiler plugin finds.

    skip_first │ wait │ warmup │ active │ wait │ warmup │ active │ ...            (steps; `repeat` windows)

Nothing is profiled while steps are skipped and waited for. In the warm-up the profiler is prepared, which slows a GPU
down at first, and records nothing. The active steps of a window make one file. Around each stands the range
`ProfilerStep#N`, N being the number of the step.

A file gets its name, `<worker>.<nanoseconds>.pt.trace.json`, when it has been written and read as a whole: a process
that is killed leaves a hidden `.half` file at most, which the plugin does not look at.

While somebody else profiles, a window waits; one that is taken over is given up, and begun anew when the other has
finished. Nobody else's profile is ended. `lit_symopt.profiling.active` says why this takes care.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as Profile

from lit_symopt.errors import ConfigError, ProfileError
from lit_symopt.profiling.active import Claim, Others
from lit_symopt.profiling.events import ANNOTATION, STEP_PREFIX, Trace, read_trace

_AT_LEAST = {"skip_first": 0, "wait": 0, "warmup": 0, "active": 1, "repeat": 1}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When windows are taken, in steps.

    Args:
        skip_first: before everything else, once.
        wait: before each window, without a profiler.
        warmup: before each window, with a profiler that records nothing.
        active: of a window.
        repeat: windows; between two of them there is a step without a recording at least.

    Raises:
        ConfigError: for a number that cannot be.

    Example:
        >>> Schedule(wait=10, warmup=2, active=3, repeat=2).steps
        30
    """

    skip_first: int = 0
    wait: int = 10
    warmup: int = 2
    active: int = 3
    repeat: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), _AT_LEAST[field.name]
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{field.name}={value!r} of a profile must be a whole number, at least {least}")
        if self.repeat > 1 and self.wait + self.warmup == 0:
            # A range that is open when one recording ends and the next begins would crash torch.
            raise ConfigError(
                f"repeat={self.repeat} windows of a profile need a step between them: set warmup or wait to 1, or "
                "repeat to 1 and active higher"
            )

    @property
    def steps(self) -> int:
        """Steps until the last window is whole."""
        return self.skip_first + self.repeat * (self.wait + self.warmup + self.active)

    def too_long_for(self, steps: float, limit: str) -> str | None:
        """What `steps` are too few for, in words; `None` if every window is whole by then.

        Args:
            steps: how many there will be.
            limit: what says so, such as `max_steps=20`.

        Example:
            >>> Schedule(wait=10, warmup=2, active=3).too_long_for(12, "max_steps=12")[:63]
            'no window becomes active: skip_first=0 + wait=10 + warmup=2 + a'
        """
        if steps >= self.steps:
            return None
        before, window = self.skip_first + self.wait + self.warmup, self.wait + self.warmup + self.active
        whole = max(0, int(steps) - self.skip_first) // window
        sum_ = (
            f"skip_first={self.skip_first} + wait={self.wait} + warmup={self.warmup} + active={self.active} = "
            f"{before + self.active} steps until the first window is whole, and {limit} leaves {int(steps)}"
        )
        if steps <= before:
            return f"no window becomes active: {sum_}. Lower wait, warmup or skip_first"
        if not whole:
            return f"the first window is cut short: {sum_}. Lower wait, warmup or active"
        return (
            f"{whole} of repeat={self.repeat} windows will be whole: all of them take {self.steps} steps, and {limit} "
            f"leaves {int(steps)}"
        )


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


def writable(folder: Path) -> Path:
    """Makes a folder for traces.

    Raises:
        ProfileError: if it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".half"):
            pass
    except OSError as error:
        raise ProfileError(
            f"the folder {folder} for traces cannot be written: {error.strerror or error}. Choose another one "
            "(KernelTime's folder, or the logger's), or make room"
        ) from error
    return folder


class Windows:
    """Takes windows: `before` and `after` are called around every step.

    Args:
        schedule: when.
        folder: where the files go; see `writable`.
        worker: whose they are, as `rank0`.
        record_shapes: keep shapes of operators, and arguments of ranges.
        memory: keep allocations.
        busy: says who else is going to profile soon, by name, if anybody is.
        say: gets what is to be known of windows that are late, cut short or lost.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
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
            self._stop()
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

    def _stop(self) -> None:
        assert self._profile is not None
        self._profile.stop_trace()

    def _forget(self) -> None:
        assert self._profile is not None
        # torch's profiler holds itself in a cycle; its session would pass for somebody else's until that is collected.
        self._profile.profiler = None
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
        names = [f"{STEP_PREFIX}{step}" for step in numbers]
        path = self.folder / f"{self.worker}.{time.time_ns()}.pt.trace.json"
        half = path.with_name(f".{path.name}.half")
        try:
            self._stop()
            self._profile = None
            self.taken += 1
            self._left = self.schedule.wait
            profile.export_chrome_trace(str(half))
            trace = read_trace(half)
            if sorted(event.name for event in trace.events if event.is_step) != sorted(names):
                _keep_steps(half, names)
                trace = read_trace(half)
            os.replace(half, path)
            return Window(trace=replace(trace, path=path), first=numbers[0], last=numbers[-1])
        except (OSError, RuntimeError, ValueError, ProfileError) as error:
            steps = f"{numbers[0]} to {numbers[-1]}"
            self._say(f"the window of the steps {steps} could not be written to {self.folder}: {error}")
            return None
        finally:
            with suppress(OSError):
                half.unlink(missing_ok=True)


def _keep_steps(path: Path, names: list[str]) -> None:
    """Takes other ranges of steps out of a trace: of one that was not finished, and of a profiler that is idle."""
    trace = json.loads(path.read_text(encoding="utf-8", errors="replace"), strict=False)
    found = [event for event in trace["traceEvents"] if str(event.get("name")).startswith(STEP_PREFIX)]
    ranges = [event for event in found if event.get("cat") == ANNOTATION]
    kept = [max((e for e in ranges if e["name"] == name), key=lambda e: e["dur"], default=None) for name in names]
    dropped = {id(event) for event in ranges if event not in kept}
    dropped |= {id(event) for event in found if event["name"] not in names}
    trace["traceEvents"] = [event for event in trace["traceEvents"] if id(event) not in dropped]
    path.write_text(json.dumps(trace), encoding="utf-8")
