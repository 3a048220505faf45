"""The file of a window, which TensorBoard's profiler plugin finds.

A file gets its name, `<worker>.<nanoseconds>.pt.trace.json`, when it has been written and read as a whole: a process
that is killed leaves a hidden `.half` file at most, which the plugin does not look at.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from torch.profiler import profile as Profile

from lit_symopt.errors import ProfileError
from lit_symopt.profiling.events import ANNOTATION, STEP_PREFIX, Trace, read_trace


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


def write_trace(profile: Profile, folder: Path, *, worker: str, steps: Sequence[int]) -> Trace:
    """Writes what a profiler has recorded, and reads it.

    Args:
        profile: that has been stopped.
        folder: to write to.
        worker: as `rank0`.
        steps: numbers of the whole steps in it.

    Raises:
        ProfileError, OSError: if it cannot be written as a whole; nothing is left in the folder then.
    """
    names = [f"{STEP_PREFIX}{step}" for step in steps]
    path = folder / f"{worker}.{time.time_ns()}.pt.trace.json"
    half = path.with_name(f".{path.name}.half")
    of_torch = half.with_name(f"{half.name}.tmp")  # where torch writes before it renames
    try:
        profile.export_chrome_trace(str(half))
        if not half.exists():  # torch does not raise
            raise ProfileError(_why_not_written(folder))
        trace = read_trace(half)
        if sorted(event.name for event in trace.events if event.is_step) != sorted(names):
            _keep_steps(half, names)
            trace = read_trace(half)
        os.replace(half, path)
        return replace(trace, path=path)
    finally:
        for left in (half, of_torch):
            with suppress(OSError):
                left.unlink(missing_ok=True)


def _why_not_written(folder: Path) -> str:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"the folder is gone ({error.strerror})"
    return f"torch wrote no whole file, and its disk has {free / 1e6:.1f} MB left"


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
