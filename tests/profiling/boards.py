"""A TensorBoard process on a log folder, asked through its own HTTP interface."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

PLUGIN = "pytorch_profiler"
_OPEN = build_opener(ProxyHandler({})).open  # whatever proxy there is, this machine is not behind it


@dataclass(frozen=True)
class Board:
    """Where it listens."""

    url: str

    def get(self, route: str, **query: str) -> bytes:
        """The body of what is at `/data/<route>`."""
        suffix = f"?{urlencode(query)}" if query else ""
        with _OPEN(f"{self.url}/data/{route}{suffix}", timeout=60) as answer:
            return bytes(answer.read())

    def json(self, route: str, **query: str) -> Any:
        """The same, read."""
        return json.loads(self.get(route, **query))

    def profiler(self, route: str, **query: str) -> Any:
        """What torch's plugin answers."""
        return self.json(f"plugin/{PLUGIN}/{route}", **query)

    def until(self, what: Callable[[], Any], *, seconds: float = 60.0) -> Any:
        """The first answer that says anything: TensorBoard and its plugin read in the background."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = what()
            if found:
                return found
            time.sleep(0.2)
        raise AssertionError(f"TensorBoard has not read its folder within {seconds:.0f} s")


@contextmanager
def tensorboard(folder: Path) -> Iterator[Board]:
    """Runs `tensorboard --logdir folder`; ended and waited for afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--load_fast=false"]
    log = folder / "tensorboard.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--reload_interval", "1"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,
        )
    board = Board(f"http://127.0.0.1:{port}")
    try:
        board.until(lambda: _listens(board, process, log))
        yield board
    finally:
        end(process)


def end(process: subprocess.Popen[Any]) -> None:
    """Ends a process and the group it leads."""
    for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 30.0)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except (subprocess.TimeoutExpired, ProcessLookupError):
            continue
    process.wait(1.0)


def _listens(board: Board, process: subprocess.Popen[Any], log: Path) -> bool:
    if process.poll() is not None:
        raise AssertionError(f"TensorBoard ended:\n{log.read_text()}")
    try:
        return bool(board.get("environment"))
    except (URLError, OSError):
        return False
