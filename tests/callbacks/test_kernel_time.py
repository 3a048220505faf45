"""KernelTime in real runs: windows, what they say, and what they leave alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_symopt.callbacks import KernelTime, RandomState
from lit_symopt.errors import ConfigError, ProfileError
from lit_symopt.profiling.active import recording
from tests.callbacks.moe import Recorder, Save, equal, fit, loaders, three, warned
from tests.callbacks.profiled import (
    Plain,
    crossings,
    data,
    kernel_time,
    ranges,
    record,
    stages,
    steps,
    traces,
    whole_traces_only,
)
from tests.models.tiny import FAMILIES, Sequences, tiny, trainer


@pytest.fixture(autouse=True)
def _no_profiler_is_left_running() -> Iterator[None]:
    yield
    assert not recording()


def plain(folder: Path, callbacks: list[Any], **options: Any) -> L.LightningModule:
    return fit(folder, callbacks, **{"model": Plain(), "data": data(), **options})


# -- what a run leaves ---------------------------------------------------------------------------------------------


def test_three_windows_are_three_traces_and_three_rows_of_scalars(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board, recorder = TensorBoardLogger(tmp_path, name="run"), Recorder()
    fit(tmp_path, [kernel_time(repeat=3, ceilings=True)], steps=14, logger=[board, recorder])
    folder = Path(board.log_dir)
    assert [steps(path) for path in traces(tmp_path)] == [[3, 4], [7, 8], [11, 12]]
    assert {path.parent for path in traces(tmp_path)} == {folder / "traces"}
    saved = record(folder)
    assert [[step.step for step in window.steps] for window in saved.windows] == [[3, 4], [7, 8], [11, 12]]
    assert (saved.optimizer, saved.rank, saved.world, saved.device["type"]) == ("symmetric", 0, 1, "cpu")
    assert saved.work
    assert saved.ceilings is not None

    logged = recorder.of("profile/")
    assert list(logged) == [3, 7, 11]  # where the Trainer logs the loss of the steps 4, 8 and 12
    for scalars in logged.values():
        stage_ms = sum(
            scalars[f"profile/{stage}_ms"] for stage in ("data", "forward", "backward", "optimizer", "other")
        )
        assert stage_ms == pytest.approx(scalars["profile/step_ms"], rel=0.05)
        roles = sum(value for tag, value in scalars.items() if tag.startswith("profile/share/"))
        assert 0 < roles < scalars["profile/optimizer_share"] < 1
        assert {"profile/ms/router", "profile/ms/lm_head", "profile/ms/unattributed"} <= set(scalars)
    events = EventAccumulator(board.log_dir, size_guidance={"images": 0}).Reload()
    at = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    assert at == {
        "profile/cost": [3, 7, 11],
        "profile/timeline": [3, 7, 11],
        "profile/roofline": [13],
        "profile/memory": [13],
    }
    assert [event.step for event in events.Tensors("profile/table/text_summary")] == [3, 7, 11]
    assert [event.step for event in events.Scalars("profile/step_ms")] == [3, 7, 11]
    printed = capsys.readouterr().out
    assert "KernelTime: symmetric, rank 0 of 1" in printed
    assert f"record in {folder / 'kernel_time.rank0.json'}" in printed


def test_memory_has_gradients_state_and_scratch(tmp_path: Path) -> None:
    model = fit(tmp_path, [kernel_time()], steps=5, val_check_interval=1)  # each validation frees the gradients
    [memory] = record(tmp_path).memory
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert (memory.parameters, memory.gradients) == (size, size)
    assert sum(memory.state.values()) >= size
    assert memory.scratch is not None
    assert memory.peak is not None
    assert 0 < memory.scratch < memory.peak


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_every_family_add_up_and_the_update_is_attributed(tmp_path: Path, family: str) -> None:
    callback = kernel_time(wait=2, active=9)
    run = trainer(tmp_path, max_steps=12, callbacks=[callback], limit_val_batches=0)
    run.fit(tiny(family, hidden_size=64, intermediate_size=96), Sequences(count=40))
    [window] = record(tmp_path).windows
    # The middle one of nine: other programs may take the processor away between two ranges of a step.
    assert median(replace(window, steps=(step,)).attributed_share for step in window.steps) >= 0.95
    for step in window.steps:
        assert step.device_us(lambda cost: cost.stage != "validation") == pytest.approx(step.wall_us, rel=0.05)
        assert step.device_us(lambda cost: cost.in_update) == pytest.approx(step.update_us, rel=0.05)


def test_an_optimizer_of_torch_is_profiled_as_a_whole_and_unattributed(tmp_path: Path) -> None:
    plain(tmp_path, [kernel_time(ceilings=True)], steps=5)
    saved = record(tmp_path)
    assert (saved.optimizer, saved.work, saved.ceilings) == ("AdamW", (), None)
    [window] = saved.windows
    assert window.attributed_share == 0
    assert {(cost.role, cost.rule) for step in window.steps for cost in step.costs if cost.in_update} == {
        ("(all)", "AdamW")
    }


def test_without_a_logger_files_go_to_the_root_folder_or_the_one_that_is_given(tmp_path: Path) -> None:
    plain(tmp_path / "a", [kernel_time()], steps=5)
    plain(tmp_path / "a", [kernel_time(folder=str(tmp_path / "b"))], steps=5)
    for folder in ("a", "b"):
        assert len(traces(tmp_path / folder / "traces")) == 1
        assert (tmp_path / folder / "kernel_time.rank0.json").exists()


def test_the_record_of_an_earlier_run_is_left_alone(tmp_path: Path) -> None:
    callback = kernel_time()
    plain(tmp_path, [callback], steps=5)
    old = (tmp_path / "kernel_time.rank0.json").read_bytes()
    plain(tmp_path, [callback], steps=5)
    assert (tmp_path / "kernel_time.rank0.json").read_bytes() == old
    assert (tmp_path / "kernel_time.rank0-v1.json").exists()
    assert len(traces(tmp_path)) == 2


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fast_dev_run.*")
        plain(tmp_path, [kernel_time(wait=0, warmup=0, active=1)], fast_dev_run=True, logger=True)
    assert not list(tmp_path.rglob("*.json"))


def test_training_can_stop_after_the_last_window(tmp_path: Path) -> None:
    model: Any = plain(tmp_path, [kernel_time(repeat=2, stop_when_done=True)], steps=100)
    assert model.batches == 8
    assert len(traces(tmp_path)) == 2


def test_weights_are_bitwise_those_of_a_run_without_the_callback(tmp_path: Path) -> None:
    # Two epochs with dropout; profiled in both.
    options: dict[str, Any] = {"steps": 14, "val_check_interval": 5}
    alone = fit(tmp_path, [], **options)
    profiled = fit(tmp_path, [kernel_time(wait=2, repeat=2, ceilings=True)], **options)
    assert len(traces(tmp_path)) == 2
    assert equal(alone, profiled)


# -- stages --------------------------------------------------------------------------------------------------------

STEP = ["data", "optimizer", "forward", "backward"]


def test_every_step_has_its_stages_and_none_crosses_another(tmp_path: Path) -> None:
    plain(tmp_path, [kernel_time()], steps=5)
    [path] = traces(tmp_path)
    assert stages(path) == [*STEP, *STEP]
    assert crossings(path) == []


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    plain(tmp_path, [kernel_time()], steps=5, accumulate_grad_batches=2)
    [path] = traces(tmp_path)
    assert steps(path) == [3, 4]
    assert stages(path) == ["data", "forward", "backward", *STEP] * 2


def test_manual_optimization_has_its_stages_inside_the_training_step(tmp_path: Path) -> None:
    plain(tmp_path, [kernel_time()], steps=5, model=Plain(manual=True))
    [path] = traces(tmp_path)
    assert stages(path) == ["data", "forward", "backward", "backward", "optimizer"] * 2
    [window] = record(tmp_path).windows
    for step in window.steps:
        assert step.device_us(lambda cost: cost.in_update) > 0
        assert step.device_us(lambda cost: cost.stage == "backward") > 0


def test_a_validation_in_a_window_is_a_stage_of_its_own(tmp_path: Path) -> None:
    plain(tmp_path, [kernel_time()], steps=5, val_check_interval=3)
    [path] = traces(tmp_path)
    assert stages(path) == [*STEP, "data", "validation", *STEP]
    [third, fourth] = record(tmp_path).windows[0].steps
    assert third.device_us(lambda cost: cost.stage == "validation") == 0
    validation = fourth.device_us(lambda cost: cost.stage == "validation")
    assert validation > 0
    whole = ranges(path, "ProfilerStep#4")[0].duration_us
    assert fourth.wall_us == pytest.approx(whole - validation, rel=0.05)


class TwoOptimizers(Plain):
    """Steps two optimizers in a batch, which Lightning counts as two steps."""

    def __init__(self) -> None:
        super().__init__(manual=True)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        loss = self.net(batch).square().mean()
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(self.net[0].parameters()), torch.optim.SGD(self.net[2].parameters())]


def test_two_optimizers_in_a_batch_are_one_step_of_the_schedule(tmp_path: Path) -> None:
    plain(tmp_path, [kernel_time()], steps=12, model=TwoOptimizers())
    [path] = traces(tmp_path)
    assert steps(path) == [5, 7]  # as the Trainer counts
    assert record(tmp_path).optimizer == "AdamW + SGD"
    assert stages(path) == ["data", "forward", "backward", "optimizer", "optimizer"] * 2


class Methods(L.Callback):
    """What the strategy's instance has besides its attributes of before."""

    def __init__(self) -> None:
        self.found: list[set[str]] = []

    def on_before_zero_grad(self, trainer: L.Trainer, *_: Any) -> None:
        self.found.append({"training_step", "backward", "optimizer_step"} & set(vars(trainer.strategy)))


def test_the_strategy_is_as_it_was_outside_of_windows(tmp_path: Path) -> None:
    methods = Methods()
    plain(tmp_path, [kernel_time(), methods], steps=6)
    assert [len(found) for found in methods.found] == [0, 0, 3, 3, 0, 0]


# -- runs that end early, and that go on ---------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("fail_at", [2, 3, 4, 7])
def test_a_run_that_is_interrupted_in_a_window_keeps_the_earlier_ones_only(
    tmp_path: Path, error: type[BaseException], fail_at: int
) -> None:
    """In the warm-up, in the first step of a window, in its last, and in the next window."""
    stopped = SystemExit if error is KeyboardInterrupt else error
    with pytest.raises(stopped):
        plain(tmp_path, [kernel_time(repeat=2)], model=Plain(fail_at=fail_at, error=error), steps=20)
    assert whole_traces_only(tmp_path)
    assert len(traces(tmp_path)) == (1 if fail_at == 7 else 0)
    if fail_at == 7:
        assert len(record(tmp_path).windows) == 1
    assert not recording()
    plain(tmp_path / "again", [kernel_time()], steps=5)
    assert len(traces(tmp_path / "again")) == 1


def test_a_run_that_ends_in_a_window_keeps_its_whole_steps_and_says_so(tmp_path: Path) -> None:
    with warned("training ended in window 1: it has 2 of 5 steps, and is kept") as messages:
        plain(tmp_path, [kernel_time(active=5)], steps=4)
    numbers = "wait=1 + warmup=1 + active=5 = 7 steps until the first window is whole, and max_steps=4 leaves 4"
    assert any(f"first window is cut short: skip_first=0 + {numbers}" in message for message in messages)
    assert steps(traces(tmp_path)[0]) == [3, 4]
    assert [len(window.steps) for window in record(tmp_path).windows] == [2]


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"steps": 10}, "max_steps=10 leaves 10"),
        ({"steps": -1, "max_epochs": 1, "accumulate_grad_batches": 2}, "max_epochs=1 of 12 batches leaves 6"),
    ],
)
def test_a_schedule_that_never_becomes_active_is_a_warning_with_the_numbers(
    tmp_path: Path, options: dict[str, Any], limit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = "no window becomes active: skip_first=0 .* wait=10 .* warmup=2 .* active=3 = 15 steps"
    with warned(f"KernelTime: {numbers} until the first window is whole, and {limit}"):
        plain(tmp_path, [KernelTime()], **options)
    assert not traces(tmp_path)
    assert "KernelTime: no window was taken" in capsys.readouterr().out


def test_a_resumed_run_takes_windows_of_its_own_and_is_the_uninterrupted_one(tmp_path: Path) -> None:
    path = tmp_path / "step 12.ckpt"
    fit(tmp_path / "first", [RandomState(), kernel_time(), Save(path, step=12)], steps=12, data=loaders(shuffle=False))
    alone = fit(tmp_path / "alone", [RandomState()], steps=16, data=loaders(shuffle=False))
    for name in ("first", "other"):
        resumed = fit(
            tmp_path / name, [RandomState(), kernel_time()], steps=16, data=loaders(shuffle=False), ckpt_path=path
        )
        assert equal(alone, resumed)
    assert [steps(path) for path in traces(tmp_path / "first")] == [[3, 4], [15, 16]]
    assert [steps(path) for path in traces(tmp_path / "other")] == [[15, 16]]


# -- beside others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profiler", [SimpleProfiler, AdvancedProfiler])
def test_a_profiler_of_the_trainer_that_is_not_torchs_works_alongside(tmp_path: Path, profiler: Any) -> None:
    plain(tmp_path, [kernel_time()], steps=5, profiler=profiler(dirpath=tmp_path, filename="own"))
    assert len(traces(tmp_path)) == 1
    assert stages(traces(tmp_path)[0]) == [*STEP, *STEP]
    assert "run_training_batch" in (tmp_path / "fit-own.txt").read_text()


def test_windows_come_after_those_of_the_trainers_own_pytorch_profiler(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="run")
    with warned("KernelTime: window 1 of 1 waits: the Trainer's PyTorchProfiler is in the way") as messages:
        plain(tmp_path, [kernel_time()], steps=12, profiler="pytorch", logger=board, limit_val_batches=0)
    assert not [message for message in messages if "lost" in message]
    [path] = (Path(board.log_dir) / "traces").iterdir()
    first = steps(path)[0]
    assert first > 5
    assert steps(path) == [first, first + 1]  # and no ProfilerStep of the other one, which is idle
    assert stages(path) == [*STEP, *STEP]
    [of_trainer] = [path for path in traces(tmp_path) if path.parent.name != "traces"]
    assert "ProfilerStep#" in of_trainer.read_text()


def test_a_trainers_pytorch_profiler_that_never_ends_is_named_at_the_end(tmp_path: Path) -> None:
    # With fewer than 5 batches Lightning records them all.
    with warned("window 1 of 1 was not taken: the Trainer's PyTorchProfiler was in the way until training ended"):
        plain(tmp_path, [kernel_time()], steps=8, profiler="pytorch", data=data(4), limit_val_batches=0)
    assert not (tmp_path / "kernel_time.rank0.json").exists()


def test_a_window_gives_way_to_a_validation_that_the_trainers_pytorch_profiler_records(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="run")
    with warned("KernelTime: window 1 of 1 gives way to the Trainer's PyTorchProfiler"):
        plain(
            tmp_path,
            [kernel_time(wait=5, active=4)],
            steps=24,
            profiler="pytorch",
            logger=board,
            val_check_interval=8,
            data=data(validation=6),  # fewer than 5 it would record to the end of the run
        )
    [path] = (Path(board.log_dir) / "traces").iterdir()
    assert len(steps(path)) == 4
    of_trainer = "".join(path.read_text() for path in traces(tmp_path) if path.parent.name != "traces")
    assert "validation_step" in of_trainer


class Mine(L.Callback):
    """Somebody's own profiler in a callback, from one step to another."""

    def __init__(self, begin: int, end: int) -> None:
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.begin = begin
        self.end = end

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.begin:
            self.profiler.start()
        if trainer.global_step == self.end:
            self.profiler.stop()


@pytest.mark.parametrize("begin", [0, 2])
def test_somebodys_own_profiler_keeps_its_trace_and_the_window_comes_later(tmp_path: Path, begin: int) -> None:
    mine = Mine(begin, 5)
    with warned("KernelTime: window 1 of 1 (waits|is lost): another profiler of torch"):
        plain(tmp_path, [mine, kernel_time()], steps=10)
    mine.profiler.export_chrome_trace(str(tmp_path / "mine.json"))
    assert (tmp_path / "mine.json").read_text().count('"Optimizer.step#AdamW.step"') == 5 - begin
    [path] = traces(tmp_path)
    assert steps(path)[0] > 6


def test_other_callbacks_work_in_the_same_run_whatever_their_order(tmp_path: Path) -> None:
    for name, callbacks in (("one", [*three(), kernel_time()]), ("other", [kernel_time(), *three()])):
        fit(tmp_path / name, callbacks, steps=6)
        [path] = traces(tmp_path / name)
        assert stages(path) == [*STEP, *STEP]
        assert len(list((tmp_path / name).glob("*.npz"))) == 3


def test_lightnings_monitors_work_in_the_same_run(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import DeviceStatsMonitor, LearningRateMonitor, ThroughputMonitor

    recorder = Recorder()
    monitors = [
        LearningRateMonitor(),
        DeviceStatsMonitor(),
        ThroughputMonitor(batch_size_fn=lambda batch: len(batch["input_ids"]), window_size=2),
    ]
    with warned("flops_per_batch"):
        fit(tmp_path, [*monitors, kernel_time()], steps=6, logger=recorder)
    tags = {tag for _, scalars in recorder.calls for tag in scalars}
    assert {"profile/step_ms", "train/device/samples_per_sec"} <= tags
    assert [tag for tag in tags if tag.startswith("DeviceStatsMonitor.on_train_batch_end")]
    assert [tag for tag in tags if tag.startswith("lr-")]


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [[], [0, 0], [-1], "some", [True], [0.0], 0])
def test_ranks_that_cannot_be_are_refused(ranks: Any) -> None:
    with pytest.raises(ConfigError, match=r"KernelTime: ranks=.* must be 'all' or a list of different ranks"):
        KernelTime(ranks=ranks)


def test_ranks_that_are_not_there_are_refused_before_training(tmp_path: Path) -> None:
    model = Plain()
    with pytest.raises(ConfigError, match=r"ranks=\[0, 2\] names \[2\], and this run has 1 process"):
        plain(tmp_path, [kernel_time(ranks=[0, 2])], model=model)
    assert model.batches == 0


@pytest.mark.parametrize("name", ["wait", "warmup", "skip_first", "active", "repeat"])
def test_a_negative_number_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=-1 of a profile must be a whole number, at least"):
        KernelTime(**{name: -1})  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_written_is_named_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    model = Plain()
    with pytest.raises(ProfileError, match=r"the folder .*file/traces for traces cannot be written"):
        plain(tmp_path, [kernel_time(folder=str(tmp_path / "file"))], model=model)
    assert model.batches == 0


class InTheWay(L.Callback):
    """Puts a folder where the record is to be written."""

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        (Path(trainer.default_root_dir) / "kernel_time.rank0.json").mkdir()


def test_a_record_that_cannot_be_written_costs_no_training_and_no_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with warned("KernelTime: the record .*rank0.json could not be written: Is a directory"):
        model: Any = plain(tmp_path, [InTheWay(), kernel_time()], steps=6)
    assert model.batches == 6
    assert len(traces(tmp_path)) == 1
    assert not list(tmp_path.glob(".*"))
    assert "record in no file: see the warnings" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="NVTX works here")
def test_nvtx_without_cuda_is_refused_before_training(tmp_path: Path) -> None:
    model = Plain()
    with pytest.raises(ConfigError, match="NVTX ranges need a CUDA device"):
        plain(tmp_path, [kernel_time(nvtx=True)], model=model)
    assert model.batches == 0
