"""Processes of runs, so many at once, forked from one that has imported what all of them need."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from types import TracebackType

from lit_symopt.study.process import Task, execute

_PRELOAD = (
    "lightning.pytorch.callbacks",
    "lightning.pytorch.cli",
    "lightning.pytorch.loggers",
    "transformers.masking_utils",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.gpt_oss.modeling_gpt_oss",
    "transformers.models.olmoe.modeling_olmoe",
    "transformers.models.qwen3.modeling_qwen3",
    "lit_symopt.callbacks",
    "lit_symopt.data",
    "lit_symopt.models.gemma3",
    "lit_symopt.models.gpt_oss",
    "lit_symopt.models.olmoe",
    "lit_symopt.models.qwen3",
    "lit_symopt.study.train",
)
"""What runs are forked from has imported this. It must not compute: threads do not survive a fork."""

_PATIENCE = 5.0
"""Seconds from asking a process to end to ending it."""


class Pool:
    """At most `jobs` runs at once. Leaving the context ends those that still run.

    Args:
        jobs: how many.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_PRELOAD))
        self._running: dict[BaseProcess, Task] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def free(self) -> int:
        """How many more may be started."""
        return self.jobs - len(self._running)

    @property
    def running(self) -> list[Task]:
        """What runs, the oldest first."""
        return list(self._running.values())

    def start(self, task: Task) -> None:
        """Starts a run."""
        process = self._context.Process(target=execute, args=(task,), name=task.run.name)
        process.start()
        self._running[process] = task

    def wait(self, seconds: float) -> list[tuple[Task, int]]:
        """The runs that ended, with their exit codes; empty if none has after some seconds."""
        ended = set(connection.wait([process.sentinel for process in self._running], timeout=seconds))
        done = [process for process in self._running if process.sentinel in ended]
        return [(self._running.pop(process), _code(process)) for process in done]

    def end(self) -> None:
        """Ends all runs and waits for that."""
        processes, self._running = list(self._running), {}
        for process in processes:
            process.terminate()
        _join(processes, _PATIENCE)
        for process in processes:
            if process.is_alive():
                process.kill()
        _join(processes, None)


def _join(processes: Iterable[BaseProcess], seconds: float | None) -> None:
    for process in processes:
        process.join(seconds)


def _code(process: BaseProcess) -> int:
    process.join()
    code = process.exitcode
    with suppress(ValueError):
        process.close()
    return 255 if code is None else code
