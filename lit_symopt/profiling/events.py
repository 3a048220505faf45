"""The events of a trace file, as `torch.profiler` exports it: Chrome's JSON, plain or compressed with gzip.

Kept are the events that have a duration (operators, annotations, launches, kernels, copies, fills) and the
`[memory]` events of `profile_memory=True`; arrows and names of threads are not. Times are microseconds since the
origin that the trace has chosen, with nanoseconds behind the point.
"""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from lit_symopt.errors import ProfileError

STEP_PREFIX = "ProfilerStep#"
"""What the name of torch's own range around a step begins with."""

OPERATOR, ANNOTATION, MEMORY = "cpu_op", "user_annotation", "[memory]"
LAUNCHES = frozenset({"cuda_runtime", "cuda_driver"})
"""Categories of calls on the host that may start something on the GPU; Triton launches through the driver."""

ON_GPU = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
"""Categories of what runs on the GPU."""

Thread = tuple[int | str, int | str]
"""Process and thread."""

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_AGAIN = "Delete it and record the window again: `lit-symopt profile`, or a run with the callback KernelTime."


class Event(NamedTuple):
    """One event.

    Attributes:
        name: of the operator, annotation, call or kernel; `[memory]` for an allocation or a release.
        category: `cpu_op`, `user_annotation`, `cuda_runtime`, `kernel`, ...
        start_us: its start.
        duration_us: zero for an instant.
        pid, tid: process and thread; device and stream of what runs on a GPU.
        external_id: of the operator itself, or of the operator that launched a kernel; 0 if there is none.
        args: whatever else the trace says; empty for operators, of which there are too many.
    """

    name: str
    category: str
    start_us: float
    duration_us: float
    pid: int | str
    tid: int | str
    external_id: int
    args: Mapping[str, Any]

    @property
    def end_us(self) -> float:
        """Its end."""
        return self.start_us + self.duration_us

    @property
    def thread(self) -> Thread:
        """Process and thread; device and stream on a GPU."""
        return self.pid, self.tid

    @property
    def is_step(self) -> bool:
        """Whether it is the profiler's own range around one step."""
        name = self.name
        return self.category == ANNOTATION and name.startswith(STEP_PREFIX) and name[len(STEP_PREFIX) :].isdecimal()


@dataclass(frozen=True)
class Trace:
    """A trace that holds at least one `ProfilerStep#`.

    Attributes:
        path: where it was read.
        events: in the order of the file.
    """

    path: Path
    events: tuple[Event, ...]


def read_trace(path: Path) -> Trace:
    """Reads a trace; 520,000 events (259 MB, uncompressed) took 2.2 s and 500 MB on one core, and time grows with them.

    Raises:
        ProfileError: if the file is missing, cut off, no trace of `torch.profiler`, or one without steps.
    """
    found = _parse(path, _text(path))
    if isinstance(found, dict):
        found = found.get("traceEvents")
    if not isinstance(found, list):
        raise ProfileError(
            f"{path} is JSON, but no trace: it has no list 'traceEvents'. Give the *.pt.trace.json that torch.profiler "
            "wrote."
        )
    events = tuple(event for event in found if isinstance(event, Event))
    if not any(event.category in (OPERATOR, ANNOTATION) for event in events):
        raise ProfileError(
            f"{path} is a trace of {len(found)} entries, but none of them is an operator or annotation of "
            "torch.profiler. Give the *.pt.trace.json that torch.profiler wrote."
        )
    if not any(event.is_step for event in events):
        raise ProfileError(
            f"{path} has {len(events)} events but no {STEP_PREFIX}N, so nothing says where a training step begins. "
            "Record it with a schedule and call the profiler's step() after each one; the callback KernelTime does."
        )
    return Trace(path, events)


def _text(path: Path) -> str:
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8", errors="replace") as file:
            return str(file.read())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ProfileError(f"{path} is no whole gzip file ({error}). {_AGAIN}") from error
    except OSError as error:
        raise ProfileError(f"the trace {path} cannot be read: {error.strerror or error}. Look at the path.") from error


def _parse(path: Path, text: str) -> Any:
    try:
        # Made small while it is read: as dictionaries the events of a large model take gigabytes.
        return json.loads(text, object_hook=_distilled, strict=False)
    except json.JSONDecodeError as error:
        raise ProfileError(
            f"{path} is no whole JSON: {error.msg} at character {error.pos:,} of {len(text):,}. A trace is cut off "
            f"when its process ends while writing it. {_AGAIN}"
        ) from error


def _distilled(entry: dict[str, Any]) -> Any:
    """An event for the entry of one; `None` for an entry that is not kept; other objects, such as args, as they are."""
    kind = entry.get("ph")
    if kind is None:
        return entry
    if kind != "X" and not (kind == "i" and entry.get("name") == MEMORY):
        return None
    try:
        name, category = sys.intern(entry["name"]), sys.intern(entry.get("cat", ""))
        start, duration = float(entry["ts"]), max(float(entry.get("dur", 0.0)), 0.0)
    except (KeyError, TypeError, ValueError):
        return None  # not written by torch.profiler; `read_trace` says so if nothing else was
    if not isfinite(start + duration):
        return None
    args = entry.get("args")
    args = args if isinstance(args, dict) else _NOTHING
    external = args.get("External id", 0)
    return Event(
        name,
        category,
        start,
        duration,
        entry.get("pid", 0),
        entry.get("tid", 0),
        external if isinstance(external, int) else 0,
        _NOTHING if category == OPERATOR else args,
    )
