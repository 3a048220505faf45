"""A study from its first run that is missing to its last, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_symopt.errors import SymOptError
from lit_symopt.study.environment import environment
from lit_symopt.study.plan import Run
from lit_symopt.study.pool import Pool
from lit_symopt.study.process import DISK_FULL, LOG, Task
from lit_symopt.study.result import RESULT, Result
from lit_symopt.study.schedule import Schedule
from lit_symopt.study.stop_request import StopRequest

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_TAIL = 15
"""Lines of a log that are shown."""


class DiskFullError(SymOptError):
    """No room is left for results."""

    def __init__(self, folder: Path, said: str) -> None:
        super().__init__(
            f"the disk of {folder} is full ({said}); finished runs are kept: make room and give the same command again"
        )


@dataclass(kw_only=True)
class Runner:
    """Runs what a schedule says, so many at once.

    Args:
        schedule: of a study.
        jobs: runs at once.
        threads: of each.
        stop: asked between two steps of the work.

    Raises:
        DiskFullError: if a run found no room.
        KeyboardInterrupt: for Ctrl-C, and for a request to terminate; the runs have ended then.
    """

    schedule: Schedule
    jobs: int
    threads: int
    stop: StopRequest
    failed: dict[str, str] = field(default_factory=dict)

    def run_all(self) -> None:
        """Runs all that is missing; what failed is in `failed`, by name with the end of its log."""
        with _bar() as bar, Pool(self.jobs) as pool:
            total = self.schedule.total
            line = bar.add_task(self.schedule.study.name, total=total, completed=len(self.schedule.results), said="")
            if self.schedule.results:
                bar.console.print(f"{len(self.schedule.results)} of {total} runs were there already")
            about = environment(threads=self.threads)
            while True:
                self.stop.raise_if_made()
                while pool.free and (run := self.schedule.next()) is not None:
                    pool.start(self._task(run, about))
                    self._say(bar, line, pool)
                    self.stop.raise_if_made()
                if not pool.running:
                    return
                ended = pool.wait(1.0)
                self.stop.raise_if_made()  # a signal to all of the group has ended the runs, too: they did not fail
                for task, code in ended:
                    self._ended(task, code, bar, total)
                    self._say(bar, line, pool)

    def _task(self, run: Run, about: dict[str, Any]) -> Task:
        folder = run.folder(self.schedule.folder)
        folder.mkdir(parents=True, exist_ok=True)
        return Task(
            run=run,
            study=self.schedule.study,
            folder=folder,
            threads=self.threads,
            environment=about,
            variables=dict(os.environ),
            start_method=multiprocessing.get_start_method(),
        )

    def _ended(self, task: Task, code: int, bar: Progress, total: int) -> None:
        name = task.run.name
        if code == DISK_FULL:
            raise DiskFullError(self.schedule.folder, f"so said the run {name}")
        if code or not (task.folder / RESULT).exists():
            how = f"ended by signal {signal.Signals(-code).name}" if code < 0 else "failed"
            self.failed[name] = f"{how}\n{_tail(task.folder / LOG)}"
            self.schedule.failed(task.run)
            bar.console.print(f"{name}: {how}, see {task.folder / LOG}", soft_wrap=True, highlight=False)
            return
        result = Result.load(task.folder / RESULT)
        self.schedule.done(task.run, result)
        loss = "diverged" if result.loss is None else f"loss {result.loss:.4f}"
        said = f"[{len(self.schedule.results)}/{total}] {name}: {loss}, {result.wall_seconds:.1f} s"
        bar.console.print(said, soft_wrap=True, highlight=False, markup=False)

    def _say(self, bar: Progress, line: TaskID, pool: Pool) -> None:
        diverged = sum(result.status == "diverged" for result in self.schedule.results.values())
        said = f"{len(pool.running)} running, {diverged} diverged, {len(self.failed)} failed"
        bar.update(line, completed=len(self.schedule.results), said=said)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    wide = None if os.isatty(1) else max(120, shutil.get_terminal_size().columns)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
        console=Console(width=wide),
    )


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"(no log: {error.strerror})"
    return "\n".join(lines[-_TAIL:])
