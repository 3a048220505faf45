"""How modules of every kind are called, what their loss is, and that a pass leaves no trace."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric

from lit_symopt.errors import ConfigError
from lit_symopt.objective import Objective


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=19, n_embd=8, n_layer=1, n_head=2, n_positions=16))


class Counting(L.LightningModule):
    """Trains with dropout and a batch norm, logs, counts and asks its Trainer for the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
        self.mean = MeanMetric()
        self.seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        inputs, classes = batch
        loss = cross_entropy(self.net(inputs), classes)
        self.seen += len(inputs) * self.trainer.world_size
        self.mean.update(loss.detach())
        self.log("loss", loss)
        self.log_dict({"again": loss})
        return {"loss": loss}


BATCH = (torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 1, 0]))


def test_a_causal_model_of_transformers_has_the_loss_that_transformers_computes() -> None:
    model, ids = gpt2().eval(), torch.arange(12).view(2, 6)
    expected = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(Objective(model, {"input_ids": ids}).loss(), expected)
    torch.testing.assert_close(Objective(model, {"input_ids": ids, "labels": ids}).loss(), expected)
    torch.testing.assert_close(Objective(model, ids).loss(), expected)


def test_a_float64_model_has_a_float64_loss() -> None:
    model, ids = gpt2().double(), torch.arange(12).view(2, 6)
    assert Objective(model, {"input_ids": ids}).loss().dtype == torch.float64


def test_a_training_step_runs_without_a_trainer_and_leaves_no_trace() -> None:
    module = Counting().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.random.get_rng_state()
    objective = Objective(module, BATCH)
    loss = objective.loss()
    loss.backward()
    assert module.seen == 0
    assert module.mean.update_count == 0
    assert module._trainer is None
    assert "log" not in vars(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert module.training
    assert torch.equal(objective.loss(), loss)  # the same dropout


def test_inputs_take_the_dtype_of_the_weights() -> None:
    assert Objective(Counting().double(), BATCH).loss().dtype == torch.float64


def test_a_method_training_loss_comes_before_everything() -> None:
    class Own(Counting):
        def training_loss(self, batch: Any) -> Tensor:
            total: Tensor = self.net[0].weight.sum()
            return total

    module = Own()
    assert Objective(module, BATCH).loss() == module.net[0].weight.sum()


def test_a_plain_module_has_a_loss_of_its_output() -> None:
    module = nn.Linear(4, 3)
    inputs = torch.randn(5, 4)
    loss = Objective(module, inputs).loss()
    with torch.no_grad():
        module.bias[0] += 1.0
    assert Objective(module, inputs).loss() != loss
    with_classes = Objective(module, inputs, classes=True)
    loss = with_classes.loss()
    with torch.no_grad():
        module.bias.add_(5.0)  # every logit: a cross-entropy does not see it
    torch.testing.assert_close(with_classes.loss(), loss)


def test_a_loss_can_be_given() -> None:
    module = nn.Linear(4, 3)
    objective = Objective(module, torch.ones(2, 4), loss=lambda module, batch: module(batch).sum())
    torch.testing.assert_close(objective.loss(), module(torch.ones(2, 4)).sum())


def test_token_ids_are_relabeled_and_masks_and_ignored_labels_are_not() -> None:
    ids, permutation = torch.tensor([[0, 1, 2], [2, 2, 1]]), torch.tensor([2, 0, 1])
    labels = torch.tensor([[0, -100, 2], [2, 2, 1]])
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    relabeled: Any = Objective(gpt2(), batch).vocabulary_relabeled(permutation)
    assert relabeled["input_ids"].tolist() == [[2, 0, 1], [1, 1, 0]]
    assert relabeled["labels"].tolist() == [[2, -100, 1], [1, 1, 0]]
    assert relabeled["attention_mask"] is batch["attention_mask"]


def test_classes_are_relabeled_and_inputs_are_not() -> None:
    relabeled: Any = Objective(Counting(), BATCH).classes_relabeled(torch.tensor([2, 0, 1]))
    assert relabeled[1].tolist() == [2, 0, 1, 0, 2]
    assert relabeled[0] is BATCH[0]


@pytest.mark.parametrize("batch", [{"inputs": torch.ones(2, 4)}, (torch.ones(2, 4), torch.ones(2))])
def test_a_batch_that_does_not_fit_forward_is_an_error_that_names_what_is_needed(batch: Any) -> None:
    class Two(nn.Module):
        def forward(self, features: Tensor, mask: Tensor, *, weight: Tensor) -> Tensor:
            return features * mask * weight

    with pytest.raises(ConfigError, match=r"Two\.forward does not take .* needs features, mask, weight; .*\[2, 4\]"):
        Objective(Two(), batch)


def test_a_module_that_fails_on_the_batch_is_an_error_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"Linear cannot be called with the example batch .*Tensor\[2, 5\].*shapes"):
        Objective(nn.Linear(4, 3), torch.ones(2, 5)).run()


def test_sequences_of_one_token_have_no_next_token() -> None:
    with pytest.raises(ConfigError, match="two tokens"):
        Objective(gpt2(), {"input_ids": torch.zeros(2, 1, dtype=torch.long)}).loss()


def test_a_training_step_without_a_loss_is_an_error() -> None:
    class Silent(L.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    with pytest.raises(ConfigError, match="Silent is None"):
        Objective(Silent(), torch.ones(1)).loss()
