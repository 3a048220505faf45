"""What the three callbacks share: they change nothing, cost nothing in between, and work with whatever is there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from lit_symopt import Block, BlockTaxonomy, Role
from lit_symopt.callbacks import LoadImbalance, LogitNorms, RandomState, RouterStability
from lit_symopt.errors import ConfigError
from lit_symopt.models import Qwen3
from tests.callbacks.moe import Recorder, Save, equal, fit, hooks, loaders, olmoe, three, warned

FILES = ("load_imbalance.npz", "logit_norms.npz", "router_stability.npz")


def test_weights_are_bitwise_equal_with_and_without_callbacks_dropout_on(tmp_path: Path) -> None:
    # Two epochs: the order of each is drawn from the global generator when it begins.
    plain = fit(tmp_path, [], steps=14, val_check_interval=5)
    watched = fit(tmp_path, three(every=1), steps=14, val_check_interval=5)
    assert equal(plain, watched)
    assert not equal(plain, fit(tmp_path, [], steps=13, val_check_interval=5))  # the comparison sees one step


def test_weights_and_order_of_a_resumed_run_are_those_of_the_uninterrupted_one_without_callbacks(
    tmp_path: Path,
) -> None:
    # One epoch is 12 batches: the run ends in the second epoch, resumed at the end of the first.
    plain = fit(tmp_path, [RandomState()], steps=16, data=loaders(shuffle=False))
    path = tmp_path / "step 12.ckpt"
    first = fit(
        tmp_path / "first", [RandomState(), *three(), Save(path, step=12)], steps=14, data=loaders(shuffle=False)
    )
    assert not equal(plain, first)
    resumed = fit(
        tmp_path / "resumed", [RandomState(), *three()], steps=16, data=loaders(shuffle=False), ckpt_path=path
    )
    assert equal(plain, resumed)


def test_raw_arrays_continue_after_a_resume_in_another_folder_and_in_the_same(tmp_path: Path) -> None:
    fit(tmp_path / "whole", [RandomState(), *three()], steps=16, data=loaders(shuffle=False))
    path = tmp_path / "step 12.ckpt"
    fit(tmp_path / "same", [RandomState(), *three(), Save(path, step=12)], steps=15, data=loaders(shuffle=False))
    for name in ("same", "other"):
        fit(tmp_path / name, [RandomState(), *three()], steps=16, data=loaders(shuffle=False), ckpt_path=path)
        for file in FILES:
            with np.load(tmp_path / "whole" / file) as whole, np.load(tmp_path / name / file) as resumed:
                assert whole.files == resumed.files
                for array in whole.files:
                    np.testing.assert_array_equal(whole[array], resumed[array], err_msg=f"{name}/{file}: {array}")
        assert len(list((tmp_path / name).glob("*.npz"))) == 3


def test_a_callback_added_on_resume_continues_the_file_it_finds(tmp_path: Path) -> None:
    path = tmp_path / "step 12.ckpt"
    fit(tmp_path, [RandomState(), Save(path, step=12)], steps=12, data=loaders(shuffle=False))
    fit(tmp_path, [LoadImbalance(every_n_steps=5)], steps=12, data=loaders(shuffle=False))
    fit(
        tmp_path, [RandomState(), LoadImbalance(every_n_steps=5)], steps=16, data=loaders(shuffle=False), ckpt_path=path
    )
    with np.load(tmp_path / "load_imbalance.npz") as file:
        assert file["steps"].tolist() == [1, 5, 10, 15]


def test_a_new_run_leaves_the_file_of_an_older_one_alone(tmp_path: Path) -> None:
    fit(tmp_path, [LoadImbalance(every_n_steps=2)], steps=2)
    old = (tmp_path / "load_imbalance.npz").read_bytes()
    fit(tmp_path, [LoadImbalance(every_n_steps=1)], steps=2)
    assert (tmp_path / "load_imbalance.npz").read_bytes() == old
    with np.load(tmp_path / "load_imbalance-v1.npz") as file:
        assert file["steps"].tolist() == [1, 2]


def test_a_callback_used_for_a_second_run_begins_a_second_file(tmp_path: Path) -> None:
    callback = LoadImbalance(every_n_steps=2)
    fit(tmp_path, [callback], steps=4)
    old = (tmp_path / "load_imbalance.npz").read_bytes()
    fit(tmp_path, [callback], steps=2)
    assert (tmp_path / "load_imbalance.npz").read_bytes() == old
    with np.load(tmp_path / "load_imbalance-v1.npz") as file:
        assert file["steps"].tolist() == [1, 2]


def test_the_order_of_the_callbacks_does_not_matter(tmp_path: Path) -> None:
    # RouterStability runs the model at the end of a batch, while a callback after it may still be watching.
    for name, callbacks in (("one", three()), ("other", three()[::-1]), ("third", [three()[1], *three()[::2]])):
        fit(tmp_path / name, callbacks)
    for file in FILES:
        with np.load(tmp_path / "one" / file) as one:
            for name in ("other", "third"):
                with np.load(tmp_path / name / file) as other:
                    for array in one.files:
                        np.testing.assert_array_equal(one[array], other[array], err_msg=f"{name}/{file}: {array}")


class Spy(L.Callback):
    """Counts hooks while batches run (callbacks before it have begun) and afterwards."""

    def __init__(self) -> None:
        self.during: list[int] = []
        self.after: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.during.append(hooks(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.after.append(hooks(pl_module))


def test_hooks_are_there_only_in_the_batches_of_a_look(tmp_path: Path) -> None:
    spy = Spy()
    fit(tmp_path, [*three(every=3), spy], steps=7)
    none = spy.during[1]
    assert [number > none for number in spy.during] == [True, False, True, False, False, True, False]
    assert spy.after == [none] * 7


class Fail(L.Callback):
    def on_before_backward(self, *_: Any) -> None:
        raise RuntimeError("in the middle of a look")


def test_an_error_in_a_look_removes_the_hooks_and_keeps_the_file_of_earlier_looks(tmp_path: Path) -> None:
    model, before = olmoe(), hooks(olmoe())
    with pytest.raises(RuntimeError, match="in the middle of a look"):
        fit(tmp_path, [*three(), Fail()], model=model)
    assert hooks(model) == before
    with np.load(tmp_path / "router_stability.npz") as file:
        assert file["steps"].tolist() == [0]


# -- loggers -----------------------------------------------------------------------------------------------------


def test_tensorboard_holds_scalars_heat_maps_and_histograms(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(tmp_path, three(), logger=logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "histograms": 0}).Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {"router/assignments/heat_map", "router/mass/heat_map", "router/probe/heat_map"}
    assert set(tags["histograms"]) == {
        "router/assignments/histogram",
        "router/mass/histogram",
        "router/probe/histogram/layer_0",
        "router/probe/histogram/layer_1",
        "logits/histogram",
    }
    steps = {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}
    assert steps["router/assignments/heat_map"] == [0, 1, 3]  # of the steps 1, 2 and 4, as the Trainer counts
    picture = events.Images("router/assignments/heat_map")[0]
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    assert picture.width > 200 < picture.height + 100
    [*_, last] = events.Histograms("router/probe/histogram/layer_0")
    assert last.histogram_value.num == 2 * 6 * 4  # sequences × tokens × experts of the probe set
    assert {"router/assignments/cv", "router/probe/changed/layer_1", "logits/shift"} <= set(tags["scalars"])
    assert sorted(path.name for path in Path(logger.log_dir).glob("*.npz")) == sorted(FILES)


def test_several_loggers_get_the_same_scalars_and_one_without_pictures_is_named_once(tmp_path: Path) -> None:
    one, other = Recorder(), Recorder()
    with warned(r"LoadImbalance draws for TensorBoard; CSVLogger, Recorder get") as messages:
        fit(
            tmp_path,
            [LoadImbalance(every_n_steps=1)],
            logger=[one, CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb"), other],
        )
    assert len([message for message in messages if "LoadImbalance" in message]) == 1
    assert list(one.of("router/")) == [0, 1, 2, 3]
    assert one.of("router/") == other.of("router/")
    assert "router/balance_loss" in next(tmp_path.rglob("metrics.csv")).read_text()
    assert list((tmp_path / "tb").rglob("events*"))


def test_without_a_logger_there_are_the_file_and_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, three(), logger=False)
    printed = capsys.readouterr().out
    assert "LoadImbalance: 3 look(s) at layer_0, layer_1." in printed
    assert "router/assignments/cv" in printed
    assert "router/probe/changed" in printed
    assert "logits/centered_rms" in printed
    assert f"arrays in {tmp_path / 'router_stability.npz'}" in printed
    assert sorted(path.name for path in tmp_path.glob("*.npz")) == sorted(FILES)


def test_fast_dev_run_writes_nothing_and_looks_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fast_dev_run.*")
        fit(tmp_path, three(), fast_dev_run=True, logger=True)
    assert not list(tmp_path.rglob("*.npz"))
    assert "LoadImbalance: 1 look(s)" in capsys.readouterr().out


def test_the_folder_can_be_chosen(tmp_path: Path) -> None:
    fit(tmp_path, [LoadImbalance(folder=str(tmp_path / "here"))], steps=1)
    assert (tmp_path / "here" / "load_imbalance.npz").exists()


# -- models and input --------------------------------------------------------------------------------------------


def dense() -> Qwen3:
    torch.manual_seed(0)
    return Qwen3(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )


@pytest.mark.parametrize("callback", [LoadImbalance(), RouterStability()])
def test_a_model_without_experts_gets_a_warning_that_names_the_callback(tmp_path: Path, callback: L.Callback) -> None:
    name = type(callback).__name__
    with warned(f"{name} does nothing: Qwen3 has no router"):
        fit(tmp_path, [callback], model=dense(), steps=2)
    assert not list(tmp_path.glob("*.npz"))


def test_a_run_without_validation_has_no_probe_set_and_says_so(tmp_path: Path) -> None:
    with warned("RouterStability does nothing: there is no validation batch"):
        fit(tmp_path, [RouterStability()], data=(loaders()[0], None), limit_val_batches=0)


class Headless(L.LightningModule):
    """Declares a router and a head that never run."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head, self.used = (torch.nn.Linear(4, 2) for _ in range(3))

    def block_taxonomy(self) -> BlockTaxonomy:
        blocks = [Block("router.weight", role=Role.ROUTER), Block("head.weight", role=Role.LM_HEAD)]
        return BlockTaxonomy([*blocks, Block("used.weight", role=Role.LINEAR), Block("*.bias", role=Role.VECTOR)])

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.used(x)
        return output

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch).square().mean()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Nothing."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.used.parameters(), lr=0.1)


@pytest.mark.parametrize("callback", [LoadImbalance(), RouterStability(), LogitNorms()])
def test_what_never_runs_is_not_taken_for_silence(tmp_path: Path, callback: L.Callback) -> None:
    ones: Any = torch.ones(4, 4)
    data = (DataLoader(ones), DataLoader(ones))
    with warned(f"{type(callback).__name__} does nothing: no.* (ran|router of)"):
        fit(tmp_path, [callback], model=Headless(), data=data)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (3, 3)])
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_one_expert_and_top_k_equal_to_the_experts(tmp_path: Path, experts: int, top_k: int) -> None:
    recorder = Recorder()
    with warned("Recorder"):
        fit(tmp_path, three(every=1), model=olmoe(experts=experts, top_k=top_k), steps=2, logger=recorder)
    load, probe = recorder.of("router/assignments"), recorder.of("router/probe")
    assert load[1]["router/assignments/cv"] < 1e-9
    assert load[1]["router/assignments/dead_experts"] == 0.0
    assert probe[1]["router/probe/changed"] == 0.0


@pytest.mark.parametrize("make", [LoadImbalance, RouterStability, LogitNorms])
def test_a_cadence_below_one_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match=f"{make.__name__}: every_n_steps=0 must be at least 1"):
        make(every_n_steps=0)
