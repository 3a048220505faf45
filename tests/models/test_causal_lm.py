"""LitCausalLM: the loss against a computation by hand, evaluation over a set, weights in and out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_symopt.errors import ConfigError
from lit_symopt.models import LitCausalLM, Qwen3
from tests.models.tiny import Sequences, tiny, tokens, trainer


def by_hand(model: LitCausalLM, input_ids: Tensor) -> Tensor:
    """The loss of each target, in float64 from the logits: position t predicts token t + 1."""
    logits = model(input_ids).detach().double()
    losses = [
        -torch.log_softmax(logits[b, t], dim=-1)[input_ids[b, t + 1]]
        for b in range(input_ids.shape[0])
        for t in range(input_ids.shape[1] - 1)
    ]
    return torch.stack(losses)


def test_the_loss_is_the_mean_over_next_tokens_shifted_exactly_once() -> None:
    model, input_ids = tiny(), tokens(3, 9)
    expected = by_hand(model, input_ids)
    assert expected.numel() == 3 * 8
    torch.testing.assert_close(model.loss(input_ids).detach().double(), expected.mean(), rtol=1e-6, atol=0)


def test_the_loss_is_that_of_transformers_and_float64_where_the_model_is() -> None:
    model, input_ids = tiny(), tokens(3, 9)
    theirs = model.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    assert model.loss(input_ids).dtype == torch.float32
    torch.testing.assert_close(model.loss(input_ids), theirs, rtol=1e-7, atol=0)
    model.double()
    assert model.loss(input_ids).dtype == torch.float64
    torch.testing.assert_close(model.loss(input_ids), by_hand(model, input_ids).mean(), rtol=1e-13, atol=0)
    model.bfloat16()
    assert model.loss(input_ids).dtype == torch.float32


@pytest.mark.parametrize("length", [0, 1])
def test_sequences_without_a_next_token_are_refused(length: int) -> None:
    message = rf"shape \(3, {length}\) has sequences of {length} token\(s\).*2 tokens or more"
    with pytest.raises(ConfigError, match=message):
        tiny().training_loss({"input_ids": tokens(3, 9)[:, :length]})


def test_what_training_minimizes_is_the_loss() -> None:
    model, input_ids = tiny(), tokens(3, 9)
    assert torch.equal(model.training_loss({"input_ids": input_ids}), model.loss(input_ids))


def test_a_model_that_knows_the_next_token_has_no_loss() -> None:
    # Token t + 1 is token t plus 1 modulo V: a head that says so is right only if labels are shifted exactly once.
    model = tiny()
    counting = torch.arange(8)[None] % 32

    class Counts(torch.nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return 100.0 * torch.nn.functional.one_hot((counting + 1) % 32, 32).float()

    model.model.lm_head = Counts()
    assert model.loss(counting).item() == pytest.approx(0.0, abs=1e-6)


def test_validation_loss_weights_every_target_equally_and_perplexity_is_its_exponential(tmp_path: Path) -> None:
    model, data = tiny(), Sequences()
    (metrics,) = trainer(tmp_path).validate(model, data, verbose=False)
    expected = float(by_hand(model, data.sequences).mean())
    assert metrics["val/loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_test_logs_under_its_own_name(tmp_path: Path) -> None:
    model, data = tiny(), Sequences()
    (metrics,) = trainer(tmp_path).test(model, data, verbose=False)
    assert metrics["test/loss"] == pytest.approx(float(by_hand(model, data.sequences).mean()), rel=1e-6)
    assert set(metrics) == {"test/loss", "test/perplexity"}


def test_a_loss_that_is_not_a_number_shows(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.lm_head.weight[0, 0] = math.nan
    (metrics,) = trainer(tmp_path).validate(model, Sequences(), verbose=False)
    assert math.isnan(metrics["val/loss"])


def test_tokens_are_counted_over_all_steps_and_speed_is_logged(tmp_path: Path) -> None:
    model = tiny()
    run = trainer(tmp_path, max_steps=3, max_epochs=-1, limit_val_batches=1)
    run.fit(model, Sequences())
    assert model.tokens_seen == 3 * 4 * 8
    assert run.logged_metrics["train/tokens"] == 96
    assert run.logged_metrics["train/tokens_per_second"] > 0
    assert {"train/loss", "val/loss", "val/perplexity"} <= set(run.logged_metrics)


def test_a_vocabulary_larger_than_the_model_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Sequences has 33 token ids .* Qwen3 only 32 rows .*vocab_size=33 or more"):
        trainer(tmp_path, max_steps=1).fit(tiny(), Sequences(vocab_size=33))


@pytest.mark.parametrize("tied", [False, True])
def test_weights_survive_a_pretrained_folder_and_the_folder_is_transformers_own(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "weights")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "weights", local_files_only=True)
    for again in (
        theirs,
        Qwen3(pretrained=str(tmp_path / "weights")).model,
        LitCausalLM.from_pretrained(tmp_path / "weights").model,
    ):
        for (name, saved), (other, loaded) in zip(
            model.model.named_parameters(), again.named_parameters(), strict=True
        ):
            assert name == other
            assert torch.equal(saved, loaded)


def test_weights_saved_in_bfloat16_are_trained_in_float32(tmp_path: Path) -> None:
    model = tiny()
    model.model.bfloat16()
    model.save_pretrained(tmp_path / "weights")
    loaded = Qwen3(pretrained=str(tmp_path / "weights"))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_a_name_that_is_not_a_folder_is_refused_and_nothing_is_tried(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'Qwen/Qwen3-0.6B' is not a folder.*nothing is downloaded"):
        Qwen3(pretrained="Qwen/Qwen3-0.6B")
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        Qwen3(pretrained=str(tmp_path))


def test_a_folder_whose_weights_do_not_fit_is_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "weights")
    config = tmp_path / "weights" / "config.json"
    config.write_text(
        config.read_text()
        .replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
        .replace('"layer_types": [', '"layer_types": ["full_attention", ')
    )
    with pytest.raises(ConfigError, match=r"missing keys: .*layers\.2\."):
        Qwen3(pretrained=str(tmp_path / "weights"))
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Qwen3(pretrained=str(tmp_path / "weights"))


def test_a_folder_that_is_not_empty_is_never_written_to(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty folder"):
        tiny().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()

    def half(folder: str) -> None:
        (Path(folder) / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(model.model, "save_pretrained", half)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path / "weights")
    assert list(tmp_path.iterdir()) == []
