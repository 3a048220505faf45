"""LogitNorms in a real fit. Oracle: NumPy on the logits that the head returned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from lit_symopt.callbacks import LogitNorms
from lit_symopt.metrics import find_heads
from tests.callbacks.moe import Recorder, fit, olmoe, warned

NAMES = ("rms", "max", "centered_rms", "centered_max", "logsumexp", "entropy", "largest_probability", "shift")


class Head(L.Callback):
    """Keeps the logits of every training batch and the head's weight before it."""

    def __init__(self) -> None:
        self.logits: list[Any] = []
        self.weights: list[Any] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def keep(module: Any, arguments: Any, output: Tensor) -> None:
            if module.training:
                self.logits.append(output.detach().double().numpy().reshape(-1, 32).copy())
                self.weights.append(module.weight.detach().double().numpy().copy())

        pl_module.get_submodule("model.lm_head").register_forward_hook(keep)


def expected(z: Any, weight: Any) -> dict[str, float]:
    c, s = z - z.mean(1, keepdims=True), np.log(np.exp(z).sum(1))
    p = np.exp(z - s[:, None])
    return {
        "rms": np.sqrt((z**2).mean()),
        "max": np.abs(z).max(),
        "centered_rms": np.sqrt((c**2).mean()),
        "centered_max": np.abs(c).max(),
        "logsumexp": s.mean(),
        "entropy": -(p * np.log(p)).sum(1).mean(),
        "largest_probability": p.max(1).mean(),
        "shift": np.linalg.norm(weight.sum(0)) / np.sqrt(32),
    }


def test_with_all_positions_a_logged_step_is_that_of_all_its_micro_batches(tmp_path: Path) -> None:
    head, recorder = Head(), Recorder()
    with warned("LogitNorms draws for TensorBoard; Recorder"):
        fit(
            tmp_path,
            [head, LogitNorms(every_n_steps=2, positions=1000)],
            logger=recorder,
            accumulate_grad_batches=3,
            steps=4,
        )
    logged = recorder.of("logits/")
    assert list(logged) == [0, 1, 3]
    with np.load(tmp_path / "logit_norms.npz") as file:
        assert file["steps"].tolist() == [1, 2, 4]
        assert file["heads"].tolist() == ["model.lm_head"]
        for row, step in enumerate((1, 2, 4)):
            assert set(logged[step - 1]) == {f"logits/{name}" for name in NAMES}
            z = np.concatenate(head.logits[3 * (step - 1) : 3 * step])
            for name, value in expected(z, head.weights[3 * (step - 1)]).items():
                np.testing.assert_allclose(logged[step - 1][f"logits/{name}"], value, rtol=1e-6, err_msg=name)
                np.testing.assert_allclose(file[name][row, 0], value, rtol=1e-6, err_msg=name)
            assert file["positions"][row, 0] == len(z) == 36
            assert file["histogram"][row, 0].sum() == z.size


def test_a_sample_is_of_the_given_size_and_within_the_range_of_all(tmp_path: Path) -> None:
    head = Head()
    fit(tmp_path, [head, LogitNorms(every_n_steps=1, positions=5)], steps=3, accumulate_grad_batches=2)
    with np.load(tmp_path / "logit_norms.npz") as file:
        assert file["positions"][:, 0].tolist() == [10.0] * 3
        for row in range(3):
            z = np.concatenate(head.logits[2 * row : 2 * row + 2])
            each = [expected(z[[position]], head.weights[2 * row])["rms"] for position in range(len(z))]
            assert min(each) < file["rms"][row, 0] < max(each)
            assert file["rms"][row, 0] != pytest.approx(expected(z, head.weights[0])["rms"], rel=1e-6)


def test_a_tied_head_is_found_under_its_own_name_and_not_where_it_is_looked_up() -> None:
    model = olmoe(tie_word_embeddings=True)
    assert [head.path for head in find_heads(model)] == ["model.lm_head"]
    assert [head.path for head in find_heads(olmoe())] == ["model.lm_head"]


def test_the_soft_cap_of_a_configuration_is_found_and_can_be_overridden(tmp_path: Path) -> None:
    model = olmoe()
    model.model.config.final_logit_softcapping = 0.5
    assert [head.softcap for head in find_heads(model)] == [0.5]
    for folder, callback in (
        ("config", LogitNorms(every_n_steps=1)),
        ("given", LogitNorms(every_n_steps=1, softcap=0.25)),
    ):
        fit(tmp_path / folder, [callback], model=model, steps=1)
    with np.load(tmp_path / "config" / "logit_norms.npz") as file:
        assert 0.3 < file["max"][0, 0] <= 0.5
    with np.load(tmp_path / "given" / "logit_norms.npz") as file:
        assert 0.2 < file["max"][0, 0] <= 0.25


def test_gemma_3_caps_its_logits_as_is_measured() -> None:
    # Oracle: the model's own logits, which transformers caps after the head.
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from lit_symopt.metrics import HeadWatch, LogitStatistics

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=2.0,
        initializer_range=0.5,
    )
    model = Gemma3ForCausalLM(config)
    statistics, heads = LogitStatistics(), find_heads(model)
    with (
        HeadWatch(heads, lambda head, z, shift: statistics.update(z, shift=shift, softcap=heads[head].softcap)),
        torch.no_grad(),
    ):
        logits = model(input_ids=torch.arange(12).reshape(1, 12), use_cache=False).logits
    assert logits.abs().max() > 1.5
    torch.testing.assert_close(statistics.compute()["rms"].float(), logits.square().mean().sqrt())
    torch.testing.assert_close(statistics.compute()["max"].float(), logits.abs().max())


@pytest.mark.parametrize("positions", [0, -3])
def test_a_sample_of_no_positions_is_refused(positions: int) -> None:
    with pytest.raises(ValueError, match=f"LogitNorms: positions={positions} must be at least 1"):
        LogitNorms(positions=positions)
