"""What each update costs, kernel by kernel, in windows of a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_symopt.callbacks.looks import _is_trial, logged_step
from lit_symopt.callbacks.profiled_trainer import (
    OF_TRAINER,
    boards_of,
    in_the_way,
    limits_of,
    memory_of,
    name_of,
    records_validation,
    work_of,
)
from lit_symopt.callbacks.ranks import gathered
from lit_symopt.callbacks.stages import Stages
from lit_symopt.errors import ConfigError, ProfileError
from lit_symopt.profiling.attribution import attribute
from lit_symopt.profiling.ceilings import measure_ceilings
from lit_symopt.profiling.device import describe
from lit_symopt.profiling.memory import peak_bytes, scratch_bytes
from lit_symopt.profiling.pictures import cost_bars, memory_bars, roofline_plot, timeline
from lit_symopt.profiling.reduce import scalars_of
from lit_symopt.profiling.roofline import RooflinePoint, roofline
from lit_symopt.profiling.run import Ceilings, MemoryUse, RunProfile
from lit_symopt.profiling.schedule import Schedule
from lit_symopt.profiling.table import format_table, markdown_table
from lit_symopt.profiling.trace_file import writable
from lit_symopt.profiling.windows import Window, Windows
from lit_symopt.ranges import nvtx_ranges


class KernelTime(L.Callback):
    """Profiles windows of the training, and says what each role, rule and phase of the update costs.

    | tag | what | unit |
    |---|---|---|
    | `profile/step_ms` | a training step on the host, without validation | ms |
    | `profile/<stage>_ms` | data, forward, backward, optimizer, validation, other: time of the device | ms a step |
    | `profile/optimizer_share` | of the training step | – |
    | `profile/ms/<role>` | the update of a role | ms a step |
    | `profile/share/<role>` | of the training step | – |
    | `profile/attributed_share` | of the update, what lies in a phase of a rule | – |

    Times are medians over the steps of a window. Scalars go to every logger; TensorBoard also gets the table
    (`profile/table`) and the pictures `profile/cost` and `profile/timeline` of each window, and at the end
    `profile/roofline` and `profile/memory`. Every window is a trace, `traces/rank0.<ns>.pt.trace.json`, which
    TensorBoard's profiler plugin shows; `kernel_time.rank0.json` (`RunProfile`) is written after each. Both go to the
    log folder (`default_root_dir` without a logger). Rank 0 prints the table at the end.

    Steps are optimizer steps of this fit, with all their batches; what other callbacks do in a hook counts as the stage
    it is called in (`lit_symopt.callbacks.stages`). Files are read and drawn between steps. Outside of windows nothing
    runs but a comparison of two numbers a batch, and the weights are those of a run without the callback.

    A window that training ends in is kept with its whole steps; one that is interrupted is thrown away. While another
    profiler of torch is active, the Trainer's own among them, windows wait. With `fast_dev_run` nothing is done.

    Args:
        wait, warmup, active, repeat, skip_first: in optimizer steps; see `Schedule`.
        ranks: which processes profile, or `all`. Only rank 0 has loggers.
        record_shapes: without shapes, the time of a batch with several roles is divided equally.
        memory: keep allocations in the trace, from which the scratch of a step follows.
        ceilings: measure at the end what the machine reaches, for the roofline; takes 1.5 s.
        nvtx: also emit the ranges as NVTX during the whole fit, for Nsight Systems.
        stop_when_done: stop training after the last window.
        folder: in place of the log folder.

    Raises:
        ConfigError: for a schedule or ranks that cannot be, or NVTX without CUDA.
        ProfileError: before training, if the folder cannot be written.

    Example:
        >>> callback = KernelTime(wait=10, warmup=2, active=3, repeat=2)
    """

    def __init__(
        self,
        *,
        wait: int = 10,
        warmup: int = 2,
        active: int = 3,
        repeat: int = 1,
        skip_first: int = 0,
        ranks: list[int] | Literal["all"] = [0],  # noqa: B006  # shown as it is by --help; never changed
        record_shapes: bool = True,
        memory: bool = True,
        ceilings: bool = True,
        nvtx: bool = False,
        stop_when_done: bool = False,
        folder: str | None = None,
    ) -> None:
        self.schedule = Schedule(wait=wait, warmup=warmup, active=active, repeat=repeat, skip_first=skip_first)
        if ranks != "all" and not (_are_ranks(ranks) and len(set(ranks)) == len(ranks)):
            raise ConfigError(f"KernelTime: ranks={ranks!r} must be 'all' or a list of different ranks such as [0]")
        self.ranks = ranks
        self.record_shapes = record_shapes
        self.memory = memory
        self.ceilings = ceilings
        self.nvtx = nvtx
        self.stop_when_done = stop_when_done
        self.folder = folder
        self._nvtx = ExitStack()
        self._reset()

    def _reset(self) -> None:
        self._off = True
        self._windows: Windows | None = None
        self._stages: Stages | None = None
        self._path: Path | None = None
        self._profile: RunProfile | None = None
        self._points: tuple[RooflinePoint, ...] = ()
        self._used: MemoryUse | None = None
        self._scratch: int | None = None
        self._steps = self._before = self._logged = 0

    # -- begin ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses ranks that are not there, and begins to emit NVTX ranges if asked to."""
        if stage != "fit":
            return
        outside = [] if self.ranks == "all" else [rank for rank in self.ranks if rank >= trainer.world_size]
        if outside:
            raise ConfigError(
                f"KernelTime: ranks={self.ranks} names {outside}, and this run has {trainer.world_size} process(es), "
                "counted from 0"
            )
        if self.nvtx:
            self._nvtx.enter_context(nvtx_ranges())

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes the folder, before anything is trained."""
        self._reset()
        self._off = _is_trial(trainer)
        if self._off:
            return
        log_dir = trainer.log_dir  # on every rank: they agree on it
        folder = Path(self.folder or (log_dir if trainer.loggers else None) or trainer.default_root_dir)
        mine = self.ranks == "all" or trainer.global_rank in self.ranks
        error = None
        if mine:
            try:
                writable(folder / "traces")
            except ProfileError as failed:
                error = str(failed)
        for rank, message in enumerate(gathered(trainer, error)):
            if message is not None:  # all raise, or the others would wait for the one that does
                raise ProfileError(message if trainer.world_size == 1 else f"rank {rank}: {message}")
        if not mine:
            return
        self._path = _new(folder / f"kernel_time.rank{trainer.global_rank}.json")
        self._windows = Windows(
            self.schedule,
            folder / "traces",
            worker=f"rank{trainer.global_rank}",
            record_shapes=self.record_shapes,
            memory=self.memory,
            busy=lambda: in_the_way(trainer),
            say=_say,
        )
        self._stages = Stages(trainer.strategy, self._windows.leave)
        if trainer.loggers and self.ranks != "all" and 0 not in self.ranks:
            rank_zero_warn(f"KernelTime: ranks={self.ranks} leaves out rank 0, whose loggers get nothing; see {folder}")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says if the schedule is too long, and begins the first step."""
        self._before = trainer.global_step
        if self._off:
            return
        for steps, limit in limits_of(trainer):
            problem = self.schedule.too_long_for(steps, limit)
            if problem is not None:
                rank_zero_warn(f"KernelTime: {problem}")
                break
        self._begin_step()

    # -- steps ---------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends the stage `data`."""
        if self._stages is not None:
            self._stages.leave()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends a step if the optimizer made one, and publishes a window with its last."""
        if self._off:
            return
        if trainer.global_step == self._before:  # more batches follow
            self._enter("data")
            return
        self._before, self._logged = trainer.global_step, logged_step(trainer)
        self._steps += 1
        if self._windows is not None and not self._windows.done:
            self._end_step(trainer, pl_module)
        if self._used is None and self._steps >= max(1, self.schedule.skip_first + self.schedule.wait):
            self._used = memory_of(trainer, pl_module)  # with gradients, and before a profile adds to the peak
        if self.stop_when_done and self._steps >= self.schedule.steps:
            done = self._windows is None or self._windows.done
            if trainer.strategy.reduce_boolean_decision(done, all=True):
                trainer.should_stop = True
        self._begin_step()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins the stage `validation`."""
        if records_validation(trainer):
            self._give_way("which records validations too")
        self._enter("validation")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends it."""
        self._enter("data")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lets no window go from one epoch to the next beside the Trainer's `PyTorchProfiler`.

        It opens a range around each epoch, and torch crashes when a range is closed in another recording than it was
        opened in.
        """
        if isinstance(trainer.profiler, PyTorchProfiler):  # type: ignore[attr-defined]
            self._give_way("which opens a range at the start of the next epoch")

    def _give_way(self, why: str) -> None:
        if self._windows is not None and self._stages is not None:
            self._stages.end()
            self._windows.give_way(OF_TRAINER, why)

    def _begin_step(self) -> None:
        if self._windows is None or self._windows.done:
            return
        self._windows.before(self._before + 1)
        self._enter("data")

    def _enter(self, stage: Literal["data", "validation"]) -> None:
        if self._stages is not None and self._windows is not None and self._windows.active:
            self._stages.begin()
            self._stages.enter(stage)

    def _end_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._windows is not None
        assert self._stages is not None
        self._stages.end()
        window = self._windows.after()
        if window is not None:
            self._publish(trainer, pl_module, window)

    # -- end -----------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps what is whole of a last window, and gathers the memory of all ranks. Every rank comes here, or none."""
        if self._off:
            return
        if self._windows is not None and self._stages is not None:
            self._stages.end()
            window = self._windows.finish()
            if window is not None:
                self._publish(trainer, pl_module, window)
        used = self._used or memory_of(trainer, pl_module)
        peak = peak_bytes(pl_module.device) if pl_module.device.type == "cuda" else used.peak
        memory = tuple(gathered(trainer, replace(used, scratch=self._scratch, peak=peak)))
        ceilings = self._shared_ceilings(trainer, pl_module)
        if self._profile is None or self._path is None:
            return
        self._profile = replace(self._profile, memory=memory, ceilings=ceilings)
        if ceilings is not None:
            self._points = roofline(self._profile.windows, self._profile.work, ceilings)
            self._draw(trainer, "profile/roofline", lambda: roofline_plot(self._points, ceilings))
        self._draw(trainer, "profile/memory", lambda: memory_bars(memory))
        self._save()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the table."""
        if trainer.is_global_zero and self._windows is not None:
            print("\n" + self.text(), flush=True)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Throws away a window that is not whole; earlier ones are written already."""
        self._stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leaves nothing running."""
        self._stop()

    def text(self) -> str:
        """The table as printed."""
        if self._profile is None or self._path is None:
            return "KernelTime: no window was taken"
        lines = [f"KernelTime: {self._profile.optimizer}, rank {self._profile.rank} of {self._profile.world}"]
        lines.append(format_table(self._profile.windows, self._points))
        record = self._path if self._path.is_file() else "no file: see the warnings"
        lines.append(f"traces in {self._path.parent / 'traces'}, record in {record}")
        return "\n".join(lines)

    def _stop(self) -> None:
        if self._stages is not None:
            self._stages.end()
        if self._windows is not None:
            self._windows.discard()
        self._nvtx.close()

    # -- what a window says --------------------------------------------------------------------------------------

    def _publish(self, trainer: L.Trainer, pl_module: L.LightningModule, window: Window) -> None:
        costs = attribute(window.trace, worker=f"rank{trainer.global_rank}")
        scratch = scratch_bytes(window.trace) if self.memory else None
        self._scratch = scratch if self._scratch is None else max(self._scratch, scratch or 0)
        if self._profile is None:
            self._profile = RunProfile(
                optimizer=name_of(trainer, pl_module),
                rank=trainer.global_rank,
                world=trainer.world_size,
                device=describe(pl_module.device),
                windows=(),
                work=work_of(trainer),
            )
        self._profile = replace(self._profile, windows=(*self._profile.windows, costs))
        self._save()
        scalars = scalars_of(costs)
        for logger in trainer.loggers:
            logger.log_metrics(dict(scalars), step=self._logged)
        for board in boards_of(trainer):
            board.experiment.add_text("profile/table", markdown_table([costs]), self._logged)
        self._draw(trainer, "profile/cost", lambda: cost_bars([costs]))
        self._draw(trainer, "profile/timeline", lambda: timeline(window.trace))

    def _save(self) -> None:
        assert self._profile is not None
        assert self._path is not None
        try:
            self._profile.save(self._path)
        except ProfileError as error:  # training is worth more than its profile
            _say(str(error))

    def _draw(self, trainer: L.Trainer, tag: str, picture: Callable[[], Any]) -> None:
        for board in boards_of(trainer):
            board.experiment.add_image(tag, picture(), self._logged, dataformats="HWC")

    def _shared_ceilings(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Ceilings | None:
        """Measured on the first profiled rank, alone; the others take its word. Every rank must call it."""
        if not self.ceilings:
            return None
        measured = None
        first = 0 if self.ranks == "all" else min(self.ranks)
        if trainer.global_rank == first and self._profile is not None and self._profile.work:
            names = "+".join(work.dtype for work in self._profile.work).split("+")
            dtypes = [getattr(torch, name) for name in dict.fromkeys(names)]
            try:
                measured = measure_ceilings(pl_module.device, dtypes)
            except (ProfileError, RuntimeError) as error:  # out of memory is one of them
                _say(f"there is no roofline, as the machine's ceilings could not be measured: {error}")
        found: Ceilings | None = gathered(trainer, measured)[first]
        return found


def _say(message: str) -> None:
    # On every rank that profiles: what happens to its windows, the others do not know.
    warnings.warn(f"KernelTime: {message}", stacklevel=2)


def _are_ranks(ranks: Any) -> bool:
    return (
        isinstance(ranks, Sequence)
        and not isinstance(ranks, str)
        and len(ranks) > 0
        and all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0 for rank in ranks)
    )


def _new(path: Path) -> Path:
    """The path, or another one where an earlier run has left its file."""
    version, new = 1, path
    while new.exists():
        new = path.with_name(f"{path.stem}-v{version}{path.suffix}")
        version += 1
    return new
