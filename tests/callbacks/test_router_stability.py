"""RouterStability in a real fit. Oracle: the model run again on the same validation batch, and NumPy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_symopt import Block, BlockTaxonomy, Role
from lit_symopt.callbacks import LoadImbalance, RandomState, RouterStability
from tests.callbacks.moe import Recorder, Save, equal, fit, loaders, warned

LAYERS = ("layer_0", "layer_1")
NAMES = ("changed", "token_entropy", "logit_rms", "logit_max", "logsumexp", "z_loss", "shift")


class Snapshots(L.Callback):
    """Copies of the model before the first step and after each."""

    def __init__(self) -> None:
        self.models: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.models[0] = copy.deepcopy(pl_module.model)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.models[trainer.global_step] = copy.deepcopy(pl_module.model)


def routing(model: nn.Module, ids: Tensor) -> list[tuple[Any, Any, Any]]:
    """Logits, selections and weight of each router in eval mode."""
    found: list[tuple[Any, Any, Any]] = []

    def keep(module: Any, arguments: Any, output: Any) -> None:
        found.append((output[0].double().numpy(), output[2].numpy(), module.weight.double().numpy()))

    for child in model.modules():
        if type(child).__name__ == "OlmoeTopKRouter":
            child.register_forward_hook(keep)
    with torch.no_grad():
        model.eval()(input_ids=ids, use_cache=False)
    return found


def test_every_number_is_that_of_the_model_run_again_on_the_first_validation_batch(tmp_path: Path) -> None:
    recorder, snapshots = Recorder(), Snapshots()
    with warned("RouterStability draws for TensorBoard; Recorder"):
        fit(tmp_path, [RouterStability(every_n_steps=2), snapshots], logger=recorder, steps=5)
    ids = loaders()[1].dataset.ids[:2]  # type: ignore[attr-defined]
    logged = recorder.of("router/probe")
    assert list(logged) == [0, 1, 3]  # before the first step, and after the steps 2 and 4
    before: list[Any] | None = None
    with np.load(tmp_path / "router_stability.npz") as file:
        assert file["steps"].tolist() == [0, 2, 4]
        changes = []
        for row, step in enumerate((0, 2, 4)):
            now = routing(snapshots.models[step], ids)
            for layer, label in enumerate(LAYERS):
                z, chosen, weight = now[layer]
                s = np.log(np.exp(z).sum(1))
                p = np.exp(z - s[:, None])
                right = {
                    "token_entropy": -(p * np.log(p)).sum(1).mean(),
                    "logit_rms": np.sqrt((z**2).mean()),
                    "logit_max": np.abs(z).max(),
                    "logsumexp": s.mean(),
                    "z_loss": (s**2).mean(),
                    "shift": np.linalg.norm(weight.sum(0)) / 2,
                }
                if before is not None:
                    kept = [
                        len(set(a) & set(b)) for a, b in zip(chosen.tolist(), before[layer][1].tolist(), strict=True)
                    ]
                    right["changed"] = 1 - np.mean(kept) / 2
                    changes.append(right["changed"])
                else:
                    assert np.isnan(file["changed"][row, layer])
                for name, value in right.items():
                    np.testing.assert_allclose(file[name][row, layer], value, rtol=1e-5, err_msg=name)
                    np.testing.assert_allclose(logged[(0, 1, 3)[row]][f"router/probe/{name}/{label}"], value, rtol=1e-5)
                np.testing.assert_array_equal(
                    file["assignments"][row, layer], [(chosen == expert).sum() for expert in range(4)]
                )
                assert file["histogram"][row, layer].sum() == z.size
            before = now
        assert max(changes) > 0  # the weights move enough for the test to see something


def test_the_tags_are_those_of_the_table_without_change_at_the_first_look(tmp_path: Path) -> None:
    recorder = Recorder()
    with warned("Recorder"):
        fit(tmp_path, [RouterStability(every_n_steps=2)], logger=recorder, steps=2)
    first, second = recorder.of("router/").values()
    tables = {f"router/probe/{name}" for name in NAMES}
    assert set(second) == tables | {f"{tag}/{layer}" for tag in tables for layer in LAYERS}
    assert set(first) == {tag for tag in second if "changed" not in tag}
    pairs = {name: [second[f"router/probe/{name}/{layer}"] for layer in LAYERS] for name in NAMES}
    for name, (a, b) in pairs.items():
        root = np.sqrt((a**2 + b**2) / 2)
        over = {"logit_max": max(a, b), "logit_rms": root, "shift": root}.get(name, (a + b) / 2)
        np.testing.assert_allclose(second[f"router/probe/{name}"], over, rtol=1e-12)


class Modes(L.Callback):
    """Puts one submodule in eval mode, as for a frozen part, and looks whether it stays so and the rest trains."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._model(pl_module).lm_head.eval()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        model = self._model(pl_module)
        self.seen.append((model.lm_head.training, model.model.training))

    @staticmethod
    def _model(pl_module: Any) -> Any:
        return pl_module.model


def test_the_mode_of_every_module_is_put_back(tmp_path: Path) -> None:
    modes = Modes()
    fit(tmp_path, [RouterStability(every_n_steps=1), modes], steps=3)
    assert modes.seen == [(False, True)] * 3


def test_a_resumed_run_compares_with_the_look_before_the_checkpoint(tmp_path: Path) -> None:
    # Saved at step 12, looked at 10 and 15: the change at 15 is since 10, as without the stop.
    path = tmp_path / "saved.ckpt"
    whole, resumed = Recorder(), Recorder()
    with warned("Recorder"):
        fit(
            tmp_path / "whole",
            [RandomState(), RouterStability(every_n_steps=5), Save(path, step=12)],
            steps=16,
            logger=whole,
            data=loaders(shuffle=False),
        )
        fit(
            tmp_path / "resumed",
            [RandomState(), RouterStability(every_n_steps=5)],
            steps=16,
            logger=resumed,
            data=loaders(shuffle=False),
            ckpt_path=path,
        )
    assert list(resumed.of("router/probe")) == [14]
    assert resumed.of("router/probe")[14] == whole.of("router/probe")[14]
    assert "router/probe/changed" in resumed.of("router/probe")[14]


def test_another_validation_set_on_resume_is_noticed_and_compared_with_nothing(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    train, val = loaders(shuffle=False)
    callbacks = [RandomState(), RouterStability(every_n_steps=5)]
    fit(tmp_path / "whole", [*callbacks, Save(path, step=12)], steps=12, data=(train, val))
    other = DataLoader(torch.utils.data.Subset(val.dataset, [3, 4]), batch_size=2)
    with warned("the validation set is another than that of the checkpoint"):
        fit(
            tmp_path / "other",
            [RandomState(), RouterStability(every_n_steps=5)],
            steps=16,
            data=(train, other),
            ckpt_path=path,
        )
    with np.load(tmp_path / "other" / "router_stability.npz") as file:
        assert file["steps"].tolist() == [0, 5, 10, 12, 15]
        assert np.isnan(file["changed"][:, 0]).tolist() == [True, False, False, True, False]


class ByHand(L.LightningModule):
    """Manual optimization, batches as tuples, a linear router selected from by the module around it."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.drop = nn.Linear(4, 3), nn.Dropout(0.5)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            weight, chosen = self.router(x).softmax(-1).topk(1)
            output = torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                rows, _ = torch.where(chosen == index)
                output = output.index_add(0, rows, expert(x[rows]) * weight[rows])
            dropped: Tensor = self.drop(output)
            return dropped

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.mixture = self.Mixture()
        self.automatic_optimization = False

    def block_taxonomy(self) -> BlockTaxonomy:
        blocks = [Block("mixture.router.weight", role=Role.ROUTER), Block("*experts.*.weight", role=Role.LINEAR)]
        return BlockTaxonomy([*blocks, Block("*.bias", role=Role.VECTOR)])

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.mixture(x)
        return output

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self(batch[0]) - batch[1]).square().mean())
        optimizer.step()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Nothing."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def pairs() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    both = torch.utils.data.TensorDataset(*torch.randn(2, 16, 4, generator=generator))
    return DataLoader(both, batch_size=2, shuffle=True), DataLoader(both, batch_size=4)


def test_a_module_of_another_kind_is_watched_and_not_changed(tmp_path: Path) -> None:
    plain = fit(tmp_path, [], model=ByHand(), data=pairs(), steps=6)
    watched = fit(tmp_path, [RouterStability(every_n_steps=2)], model=ByHand(), data=pairs(), steps=6)
    assert equal(plain, watched)
    with np.load(tmp_path / "router_stability.npz") as file:
        assert file["steps"].tolist() == [0, 2, 4, 6]
        assert file["layers"].tolist() == ["mixture.router"]
        assert file["assignments"].sum(-1).tolist() == [[4]] * 4


def test_a_probe_of_more_batches_and_of_one_token(tmp_path: Path) -> None:
    data = (loaders()[0], loaders(batch_size=1, tokens=1)[1])
    fit(tmp_path, [RouterStability(every_n_steps=1, probe_batches=2)], steps=1, data=data)
    with np.load(tmp_path / "router_stability.npz") as file:
        assert file["assignments"].sum(-1).tolist() == [[4, 4]] * 2  # two batches × one token × two experts


def test_the_probe_is_there_from_the_start_where_validation_comes_epochs_later(tmp_path: Path) -> None:
    plain = fit(tmp_path, [], steps=30, check_val_every_n_epoch=2)
    watched = fit(tmp_path, [RouterStability(every_n_steps=15)], steps=30, check_val_every_n_epoch=2)
    assert equal(plain, watched)
    with np.load(tmp_path / "router_stability.npz") as file:
        assert file["steps"].tolist() == [0, 15, 30]


class StepOnly(L.LightningModule):
    """No forward, no declared blocks: only a training step, which counts its calls and logs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.mixture, self.steps = ByHand.Mixture(), 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.steps += 1
        loss: Tensor = (self.mixture(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Nothing."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_a_module_that_declares_nothing_is_inferred_and_run_by_its_training_step_without_a_trace(
    tmp_path: Path,
) -> None:
    plain, watched = StepOnly(), StepOnly()
    fit(tmp_path, [], model=plain, data=pairs(), steps=6)
    callbacks = [RouterStability(every_n_steps=2), LoadImbalance(every_n_steps=2)]
    fit(tmp_path, callbacks, model=watched, data=pairs(), steps=6)
    assert equal(plain, watched)
    assert watched.steps == 6
    with np.load(tmp_path / "router_stability.npz") as file:
        assert file["layers"].tolist() == ["mixture.router"]
        assert file["steps"].tolist() == [0, 2, 4, 6]
    with np.load(tmp_path / "load_imbalance.npz") as file:
        assert file["assignments"].sum(-1).tolist() == [[2]] * 4


@pytest.mark.parametrize("batches", [0, -1])
def test_a_probe_of_no_batches_is_refused(batches: int) -> None:
    with pytest.raises(ValueError, match=f"RouterStability: probe_batches={batches} must be at least 1"):
        RouterStability(probe_batches=batches)
