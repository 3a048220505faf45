"""The runs of a profile: ordinary training in processes of their own, with `KernelTime` as the only callback.

A process for each run keeps peak memory clean and stacks alike, and lets Lightning's launchers start the command once
more for each rank, as DDP and DeepSpeed do.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import current_thread, main_thread
from time import perf_counter
from typing import Any, NoReturn

from lit_symopt.errors import ProfileError
from lit_symopt.profiling.run import RunProfile
from lit_symopt.profiling.spec import ProfileSpec

LAST_LINES = 20


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run left behind.

    Attributes:
        ranks: records of the profiled ranks, in their order.
        traces: its trace files.
        seconds: that it took.
    """

    ranks: tuple[RunProfile, ...]
    traces: tuple[Path, ...]
    seconds: float

    def first_windows(self) -> tuple[Path, ...]:
        """The first trace of each rank."""
        found: dict[str, Path] = {}
        for trace in self.traces:  # sorted: their names have the time
            found.setdefault(trace.name.partition(".")[0], trace)
        return tuple(found.values())

    @property
    def kept(self) -> list[Path]:
        """The traces that are still there."""
        return [trace for trace in self.traces if trace.exists()]


def overlay(spec: ProfileSpec, folder: Path, *, stack: str | None = None, ceilings: bool = True) -> dict[str, Any]:
    """What is laid over a recipe: `KernelTime` in place of its callbacks, and nothing else that takes time.

    Loggers, checkpoints, validation, progress bar and another profiler are left out. Everything else is the recipe's.

    Args:
        spec: the schedule.
        folder: where traces and records go.
        stack: another stack than the recipe's, with rates and roles of its own.
        ceilings: measure the machine's.
    """
    schedule = {name: getattr(spec, name) for name in ("skip_first", "wait", "warmup", "active", "repeat")}
    callback = {
        "class_path": "lit_symopt.callbacks.KernelTime",
        "init_args": {
            **schedule,
            "ranks": spec.ranks if isinstance(spec.ranks, str) else list(spec.ranks),
            "record_shapes": spec.record_shapes,
            "memory": spec.memory,
            "ceilings": ceilings,
            "stop_when_done": True,
            "folder": str(folder),
        },
    }
    laid: dict[str, Any] = {
        "trainer": {
            "callbacks": [callback],
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "profiler": None,
            "default_root_dir": str(folder),  # where a run without a logger leaves its config.yaml
        }
    }
    if stack is not None:
        laid["model"] = {"init_args": {"symopt": {"stack": stack, "lr": None, "weight_decay": None, "roles": {}}}}
    return laid


def train(
    arguments: Sequence[str], laid: Mapping[str, Any], folder: Path, *, threads: int | None = None, log: Path
) -> Run:
    """Trains until the last window is closed.

    Args:
        arguments: of `lit-symopt fit`.
        laid: what is laid over them.
        folder: of the run; the one that `laid` names.
        threads: of operators on a CPU; default: as it is here.
        log: where the output of the run goes.

    Raises:
        ProfileError: if it fails, with what it said last.
    """
    folder.mkdir(parents=True)
    (folder / "overlay.yaml").write_text(json.dumps(laid, indent=1), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "lit_symopt", "fit", *arguments, "--config", str(folder / "overlay.yaml")]
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    began = perf_counter()
    with log.open("wb") as output:
        code = _wait(subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True))
    seconds = perf_counter() - began
    if code:
        raise ProfileError(_why(log, f"the run ended with exit code {code}"))
    files = sorted(folder.glob("kernel_time.rank*.json"), key=_rank_of)
    if not files:
        raise ProfileError(_why(log, "the run ended without a record: no window was measured"))
    ranks = tuple(RunProfile.load(path) for path in files)
    return Run(ranks=ranks, traces=tuple(sorted(folder.glob("traces/*.pt.trace.json*"))), seconds=seconds)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The exit code; whatever interrupts the waiting ends the process and those it started."""
    signals = (signal.SIGTERM, signal.SIGHUP) if current_thread() is main_thread() else ()
    before = {name: signal.signal(name, _interrupt) for name in signals}
    code = None
    try:
        code = process.wait()
        return code
    finally:
        if code != 0:
            _end(process)
        for name, handler in before.items():
            signal.signal(name, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its group: ranks may wait for ever for the one that has failed."""
    try:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(10)
    finally:  # also when interrupted again
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _interrupt(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _why(log: Path, what: str) -> str:
    """What a run said of its end: its `error:` line, or the last lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    said = next((line for line in reversed(lines) if line.startswith("error: ")), None)
    if said is not None:
        return said.removeprefix("error: ")
    return "\n".join([f"{what}; its last lines:", *(f"  {line}" for line in lines[-LAST_LINES:])])


def _rank_of(path: Path) -> int:
    return int(re.findall(r"rank(\d+)", path.name)[-1])
