"""LoadImbalance in a real fit. Oracle: NumPy on what the routers returned, kept by hooks of the test's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor, nn

from lit_symopt.callbacks import LoadImbalance
from tests.callbacks.moe import Recorder, fit, loaders, olmoe, warned

LAYERS = ("layer_0", "layer_1")


class Routers(L.Callback):
    """Keeps logits and indices of every training batch, by router."""

    def __init__(self) -> None:
        self.logits: list[list[Any]] = [[], []]
        self.chosen: list[list[Any]] = [[], []]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        routers = [child for child in pl_module.modules() if type(child).__name__ == "OlmoeTopKRouter"]
        for layer, router in enumerate(routers):
            router.register_forward_hook(self._keep(pl_module, layer))

    def _keep(self, pl_module: nn.Module, layer: int) -> Any:
        def keep(module: nn.Module, arguments: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            if pl_module.training:
                self.logits[layer].append(output[0].detach().double().numpy().copy())
                self.chosen[layer].append(output[2].numpy().copy())

        return keep


def expected(routers: Routers, layer: int, batches: slice) -> dict[str, Any]:
    z, chosen = np.concatenate(routers.logits[layer][batches]), np.concatenate(routers.chosen[layer][batches])
    p = (np.exp(z) / np.exp(z).sum(1, keepdims=True)).mean(0)
    counts = np.array([(chosen == expert).sum() for expert in range(4)])
    f = counts / counts.sum()
    return {
        "counts": counts,
        "mass": p,
        "assignments/cv": f.std() / f.mean(),
        "assignments/entropy": -(f[f > 0] * np.log(f[f > 0])).sum() / np.log(4),
        "assignments/largest_share": f.max(),
        "assignments/dead_experts": (f == 0).sum(),
        "mass/cv": p.std() / p.mean(),
        "mass/entropy": -(p * np.log(p)).sum() / np.log(4),
        "mass/largest_share": p.max(),
        "mass/dead_experts": (p < 0.0025).sum(),
        "balance_loss": 4 * (f * p).sum(),
    }


def test_a_logged_step_covers_all_its_micro_batches_and_no_others(tmp_path: Path) -> None:
    routers, recorder = Routers(), Recorder()
    with warned("LoadImbalance draws for TensorBoard; Recorder"):
        fit(
            tmp_path,
            [routers, LoadImbalance(every_n_steps=2)],
            logger=recorder,
            accumulate_grad_batches=3,
            steps=4,
            val_check_interval=5,  # a validation in the middle of a step
        )
    logged = recorder.of("router/")
    assert list(logged) == [0, 1, 3]  # of the steps 1, 2 and 4, counted as the Trainer counts them
    with np.load(tmp_path / "load_imbalance.npz") as file:
        assert file["steps"].tolist() == [1, 2, 4]
        assert file["layers"].tolist() == list(LAYERS)
        assert file["experts"].tolist() == [4, 4]
        for row, step in enumerate(file["steps"]):
            tags = logged[int(step) - 1]
            for layer, label in enumerate(LAYERS):
                right = expected(routers, layer, slice(3 * (step - 1), 3 * step))
                np.testing.assert_array_equal(file["assignments"][row, layer], right.pop("counts"))
                np.testing.assert_allclose(file["mass"][row, layer], right.pop("mass"), rtol=1e-6)
                assert file["tokens"][row, layer] == 3 * 2 * 6  # micro-batches × sequences × tokens
                for name, value in right.items():
                    np.testing.assert_allclose(tags[f"router/{name}/{label}"], value, rtol=1e-6, atol=1e-9)
                    np.testing.assert_allclose(file[name][row, layer], value, rtol=1e-6, atol=1e-9)


def test_the_tags_are_those_of_the_table_global_and_by_layer(tmp_path: Path) -> None:
    recorder = Recorder()
    with warned("Recorder"):
        fit(tmp_path, [LoadImbalance(every_n_steps=2)], logger=recorder, steps=2)
    names = ("cv", "entropy", "largest_share", "dead_experts")
    tables = {f"router/{group}/{name}" for group in ("assignments", "mass") for name in names} | {"router/balance_loss"}
    for tags in recorder.of("router/").values():
        assert set(tags) == tables | {f"{tag}/{layer}" for tag in tables for layer in LAYERS}
        for tag in tables:
            each = [tags[f"{tag}/{layer}"] for layer in LAYERS]
            over = sum(each) if "dead" in tag else max(each) if "largest" in tag else sum(each) / 2
            np.testing.assert_allclose(tags[tag], over, rtol=1e-12)


def test_gradient_checkpointing_does_not_count_twice(tmp_path: Path) -> None:
    for name, options in (("plain", {}), ("checkpointing", {"gradient_checkpointing": True})):
        fit(tmp_path / name, [LoadImbalance(every_n_steps=1)], model=olmoe(dropout=0.0, **options), steps=2)
    with (
        np.load(tmp_path / "plain" / "load_imbalance.npz") as plain,
        np.load(tmp_path / "checkpointing" / "load_imbalance.npz") as repeated,
    ):
        np.testing.assert_array_equal(plain["assignments"], repeated["assignments"])
        assert repeated["tokens"].tolist() == [[12.0, 12.0]] * 2


def test_a_batch_of_one_sequence_of_two_tokens(tmp_path: Path) -> None:
    fit(tmp_path, [LoadImbalance(every_n_steps=1)], data=loaders(batch_size=1, tokens=2), steps=1)
    with np.load(tmp_path / "load_imbalance.npz") as file:
        assert file["assignments"].sum(-1).tolist() == [[4, 4]]
