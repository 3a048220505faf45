"""Real process groups for tests: functions called on W processes at once.

    with Ranks(2) as ranks:                      # about 3 s: every process imports torch and joins a gloo group
        both = ranks(train_on_a_rank, "zero2")   # milliseconds: what each rank returned, by rank
        more = ranks(train_on_a_rank, "zero3")

`run_on_ranks` is one start and one call. A function is given as itself, if it lies at the top of a module that can be
imported, or as "package.module:name". Arguments and results are pickled; a view of a tensor brings its whole storage
along. Inside a call the rank is `dist.get_rank()`.

When a rank raises or dies, the others get a few seconds to end by themselves; then all are killed, and the error shows
the traceback and last output of every rank that failed. The next call starts new processes. No process outlives the
one that started it.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from lit_symopt.sharding.transport import end_process_group

ROOT = Path(__file__).parents[2]
SHOWN = 4000  # characters of a failed rank's output


@dataclass
class Outcome:
    """How a call ended on one rank.

    Attributes:
        result: what the function returned.
        error: the traceback of what it raised, else why there is no result; `None` if there is one.
        returncode: of the process, negative for a signal; `None` if it lived on.
        seconds: from the call to the end.
        output: the last characters that the process has printed.
    """

    result: Any = None
    error: str | None = "still running when the processes were killed"
    returncode: int | None = None
    seconds: float = 0.0
    output: str = ""


class RanksFailed(AssertionError):
    """A call that did not return on every rank; `outcomes` says how it ended on each."""

    def __init__(self, what: str, outcomes: list[Outcome]) -> None:
        self.outcomes = outcomes
        failed = [
            f"--- rank {rank} ({one.seconds:.1f} s): {one.error}\n{one.output[-SHOWN:]}".rstrip()
            for rank, one in enumerate(outcomes)
            if one.error is not None
        ]
        super().__init__("\n".join([f"{what} failed on {len(failed)} of {len(outcomes)} ranks", *failed]))


class Ranks:
    """W processes that wait for calls.

    Args:
        world: number of processes.
        env: added to the environment of every process.
        group: join a default process group (gloo, through a file: no port to collide on). Without it `MASTER_ADDR`,
            `MASTER_PORT`, `RANK`, `LOCAL_RANK` and `WORLD_SIZE` are set all the same, as launchers do: a Lightning
            Trainer or `torch.distributed` finds its place by itself.
        timeout: seconds that a call, and a collective in it, may take.
        patience: seconds for the other ranks to end after the first has failed.
    """

    def __init__(
        self,
        world: int,
        *,
        env: Mapping[str, str] | None = None,
        group: bool = True,
        timeout: float = 240.0,
        patience: float = 3.0,
    ) -> None:
        self.world, self.env, self.group = world, dict(env or {}), group
        self.timeout, self.patience = timeout, patience
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection[Any, Any]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(
        self, function: Callable[..., Any] | str, *args: Any, timeout: float | None = None, **options: Any
    ) -> list[Any]:
        """What the function returns on each rank.

        Raises:
            RanksFailed: if it raised, died or did not return in time on any of them.
        """
        path = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
        limit = self.timeout if timeout is None else timeout
        if not self._processes:
            self._start()
        outcomes = self._collect((path, args, options), limit)
        if any(outcome.error is not None for outcome in outcomes):
            self._kill()
            raise RanksFailed(path, outcomes)
        return [outcome.result for outcome in outcomes]

    def close(self) -> None:
        """End the processes: asked first, killed if they do not listen."""
        for pipe in self._pipes:
            with suppress(OSError):  # it may be gone already
                pipe.send_bytes(pickle.dumps(None))
        deadline = time.monotonic() + 10.0
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        self._kill()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        for rank in range(self.world):
            here, there = Pipe()
            environment = {
                **os.environ,
                # This environment's ninja, whether it is activated or not: another version of it would have DeepSpeed
                # compile its operator anew.
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",  # DeepSpeed would look for one, and compile for what it finds
                "TOKENIZERS_PARALLELISM": "false",
                "TORCHDYNAMO_DISABLE": "1",  # DeepSpeed compiles what we never call, and loads the compiler for that
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.world),
                **self.env,
            }
            store = str(Path(self._folder.name) / "store") if self.group else ""
            with self._log(rank).open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(there.fileno()), store, str(self.timeout), str(os.getpid())],
                    cwd=ROOT,
                    env=environment,
                    pass_fds=[there.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def _collect(self, call: tuple[str, tuple[Any, ...], dict[str, Any]], limit: float) -> list[Outcome]:
        outcomes = [Outcome() for _ in self._pipes]
        begun = time.monotonic()
        deadline = begun + limit
        waiting = dict(zip(self._pipes, outcomes, strict=True))
        for pipe in self._pipes:
            with suppress(OSError):  # it may have died; reading from it says so
                pipe.send_bytes(pickle.dumps(call))
        while waiting and time.monotonic() < deadline:
            for ready in wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
                assert isinstance(ready, Connection)
                outcome, rank = waiting.pop(ready), self._pipes.index(ready)
                outcome.seconds = time.monotonic() - begun
                try:
                    outcome.error, outcome.result = pickle.loads(ready.recv_bytes())
                except (EOFError, OSError):
                    outcome.returncode = self._processes[rank].wait()
                    outcome.error = f"the process ended with {_ending(outcome.returncode)}"
                if outcome.error is not None:
                    deadline = min(deadline, time.monotonic() + self.patience)
        for rank, outcome in enumerate(outcomes):
            outcome.output = self._log(rank).read_text(errors="replace")[-SHOWN:]
            outcome.seconds = outcome.seconds or time.monotonic() - begun
        return outcomes

    def _kill(self) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started: it leads a session of its own
            process.wait()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder = [], [], None

    def _log(self, rank: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{rank}.log"


def run_on_ranks(
    function: Callable[..., Any] | str,
    world: int,
    *args: Any,
    env: Mapping[str, str] | None = None,
    group: bool = True,
    timeout: float = 240.0,
    patience: float = 3.0,
    **options: Any,
) -> list[Any]:
    """What a function returns on each of `world` new processes; see `Ranks`.

    Raises:
        RanksFailed: if it raised, died or did not return in time on any of them.
    """
    with Ranks(world, env=env, group=group, timeout=timeout, patience=patience) as ranks:
        return ranks(function, *args, **options)


def _ending(returncode: int) -> str:
    return f"signal {signal.Signals(-returncode).name}" if returncode < 0 else f"exit status {returncode}"


# -- on a rank ---------------------------------------------------------------------------------------------------


def _serve(pipe: Connection[Any, Any], store: str, timeout: float) -> None:
    import torch
    import torch.distributed as dist

    sys.meta_path.insert(0, _WithoutSharedMemory())
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if store:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
        )
    while (call := pickle.loads(pipe.recv_bytes())) is not None:
        path, args, options = call
        try:
            module, name = path.split(":")
            function: Any = import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            gc.freeze()  # what is imported by now is not looked through again and again
            answer = pickle.dumps((None, function(*args, **options)))
        except BaseException:  # noqa: BLE001  whatever it is, the caller raises it
            answer = pickle.dumps((traceback.format_exc(), None))
        sys.stdout.flush()
        pipe.send_bytes(answer)
    end_process_group()


class _WithoutSharedMemory(MetaPathFinder):
    """Imports DeepSpeed without the operator that it compiles for CPUs when it is first used.

    No training uses that operator. It is loaded under a lock that is a file, and a process that is killed meanwhile
    leaves the lock behind: every later process would wait for ever.
    """

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "deepspeed.comm.torch":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        assert spec is not None
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            assert callable(module.build_shm_op)
            module.build_shm_op = lambda: None

        loader.exec_module = exec_module
        return spec


def _watch(parent: int) -> None:
    """End this process when the one that started it is gone, whatever the main thread waits for."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_watch, args=(int(sys.argv[4]),), daemon=True).start()
    _serve(Connection(int(sys.argv[1])), sys.argv[2], float(sys.argv[3]))
