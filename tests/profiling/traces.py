"""Traces made by hand, in the words in which kineto writes them, and traces of real training steps."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule

from lit_symopt.profiling.attribution import attribute
from lit_symopt.profiling.costs import Cost, TraceCosts
from lit_symopt.profiling.events import Trace, read_trace
from lit_symopt.ranges import named

MAIN, AUTOGRAD, STREAM = 4716, 4790, 7
"""Threads of the host, and a stream of the GPU."""

ORIGIN = 4478097459772.675
"""About where kineto's clock stands: the microseconds since its `baseTimeNanoseconds`."""


@dataclass
class Made:
    """A trace made by hand; times are microseconds since `ORIGIN`."""

    events: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, category: str, name: str, start: float, end: float, *, pid: Any = MAIN, tid: Any = MAIN, **args: Any
    ) -> Made:
        where = {"pid": pid, "tid": tid, "ts": round(ORIGIN + start, 3), "dur": round(end - start, 3)}
        self.events.append({"ph": "X", "cat": category, "name": name, **where, "args": args})
        return self

    def note(self, name: str, start: float, end: float, *, tid: int = MAIN, elements: tuple[int, ...] = ()) -> Made:
        """An annotation; with `elements` as `record_shapes=True` shows those of a phase."""
        shown = {"Concrete Inputs": [*map(str, elements), ""], "Input Dims": [*([] for _ in elements), [2, 8, 16]]}
        return self.add(
            "user_annotation", name, start, end, tid=tid, **{"Record function id": 0, **(shown if elements else {})}
        )

    def op(self, name: str, start: float, end: float, *, tid: int = MAIN, external: int | None = None) -> Made:
        args = {"External id": external or len(self.events) + 1, "Record function id": 0, "Ev Idx": len(self.events)}
        return self.add("cpu_op", name, start, end, tid=tid, **args)

    def launch(
        self,
        correlation: int,
        start: float,
        end: float,
        *,
        tid: int = MAIN,
        name: str = "cudaLaunchKernel",
    ) -> Made:
        driver = name.startswith("cuL")
        args = {"External id": 3, "cbid": 307 if driver else 211, "correlation": correlation}
        return self.add("cuda_driver" if driver else "cuda_runtime", name, start, end, tid=tid, **args)

    def kernel(
        self,
        name: str,
        start: float,
        end: float,
        *,
        correlation: int,
        stream: int = STREAM,
        category: str = "kernel",
        external: int = 0,
    ) -> Made:
        args = {
            **({"External id": external} if external else {}),
            "device": 0,
            "context": 1,
            "stream": stream,
            "correlation": correlation,
            **({"bytes": 4096} if category != "kernel" else {"queued": 0, "grid": [4, 106, 1], "block": [128, 1, 1]}),
        }
        return self.add(category, name, start, end, pid=0, tid=stream, **args)

    def document(self) -> dict[str, Any]:
        first = {"ph": "M", "name": "process_name", "ts": ORIGIN, "pid": MAIN, "tid": 0, "args": {"name": "python"}}
        spans = {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "pid": "Spans", "tid": "PyTorch Profiler"}
        arrow = {"id": 5, "pid": MAIN, "tid": MAIN, "ts": ORIGIN, "cat": "ac2g", "name": "ac2g"}
        last = {"ph": "i", "s": "g", "name": "Record Window End", "pid": "", "tid": "", "ts": ORIGIN + 1e6}
        return {
            "schemaVersion": 1,
            "deviceProperties": [],
            "displayTimeUnit": "ms",
            "baseTimeNanoseconds": 1790857026000000000,
            "traceEvents": [
                first,
                *self.events,
                {"ph": "s", **arrow},
                {"ph": "f", **arrow, "bp": "e"},
                {**spans, "ts": ORIGIN, "dur": 1e6, "args": {"Op count": 0}},
                last,
            ],
            "traceName": "/tmp/made.pt.trace.json",
        }

    def trace(self, folder: Path) -> Trace:
        path = folder / "made.pt.trace.json"
        path.write_text(json.dumps(self.document()))
        return read_trace(path)

    def costs(self, folder: Path) -> TraceCosts:
        return attribute(self.trace(folder))


def where(cost: Cost) -> str:
    """The place of a cost as text: `optimizer query/spectral/rule aten::bmm`."""
    place = "/".join((cost.role, cost.rule, cost.phase)).strip("/")
    return " ".join(part for part in (cost.stage, place, cost.kernel) if part)


@dataclass
class Recorded:
    """A real window: where its trace is, and what a stopwatch around `optimizer.step()` said of each of its steps."""

    path: Path
    seconds: list[float]


def record(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor, path: Path, *, active: int = 3) -> Recorded:
    """Trains a few steps in a plain loop under `torch.profiler` with a schedule."""
    seconds = []

    def export(profiler: profile) -> None:
        profiler.export_chrome_trace(str(path))

    with profile(
        activities=[ProfilerActivity.CPU],
        schedule=schedule(wait=1, warmup=1, active=active, repeat=1),
        on_trace_ready=export,
        record_shapes=True,
    ) as profiler:
        for _ in range(2 + active):
            with named("train/forward"):
                loss = model(input_ids=ids, labels=ids).loss
            with named("train/backward"):
                loss.backward()
            start = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
            optimizer.zero_grad()
            profiler.step()
    return Recorded(path, seconds[2:])
