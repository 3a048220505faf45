"""One run as a process: its output goes to `log.txt`, its result to `result.json`, and its exit code says the rest."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

from lit_symopt.errors import SymOptError
from lit_symopt.study.plan import Run
from lit_symopt.study.spec import Study

LOG = "log.txt"
FAILED, DISK_FULL = 1, 28  # 28 is ENOSPC
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that the process of a run needs.

    Args:
        run: which.
        study: that it is of.
        folder: of the run.
        threads: of torch.
        environment: for its result.
        variables: of the environment, as they are where the study was started.
        start_method: of its own processes, as it is there.
    """

    run: Run
    study: Study
    folder: Path
    threads: int
    environment: Mapping[str, Any]
    variables: Mapping[str, str]
    start_method: str


def execute(task: Task) -> None:
    """Trains, writes the result and exits: 0, or `DISK_FULL`, or `FAILED` with the reason in the log."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the study, which ends its runs
    _end_with_parent()
    multiprocessing.set_start_method(task.start_method, force=True)  # of loaders; it is forkserver here
    os.environ.clear()
    os.environ.update({**task.variables, "OMP_NUM_THREADS": str(task.threads)})
    sys.argv = sys.argv[:1]  # Lightning wonders at the study's own arguments
    code = FAILED
    try:
        _log_to(task.folder / LOG)
        _train(task)
        code = 0
    except BaseException as error:  # noqa: BLE001  whatever it is, the log has it and the study goes on
        code = DISK_FULL if is_disk_full(error) else FAILED
        with suppress(OSError):
            if isinstance(error, SymOptError):
                print(f"error: {error}", file=sys.stderr)
            elif not isinstance(error, SystemExit):
                traceback.print_exc()
    _end_log()
    sys.exit(code)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error comes from a disk without room, also by way of other errors."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def _train(task: Task) -> None:
    import torch

    from lit_symopt.study.train import train

    torch.set_num_threads(task.threads)
    print(shlex.join(["lit-symopt", "fit", *task.run.arguments(task.study, task.folder)]), flush=True)
    result = train(task.run, task.study, task.folder, task.environment)
    result.save(task.folder)


def _log_to(path: Path) -> None:
    """Sends what this process and its children print to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)


def _end_log() -> None:
    """Flushes; what the log has no room for must not be tried again at the exit, and change its code."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _end_with_parent() -> None:
    """Ends this process when the study's is gone, be it killed."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(FAILED)

    Thread(target=watch, daemon=True).start()
