"""The losses of routers against straightforward NumPy, against transformers, and their invariances."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_symopt.errors import ConfigError
from lit_symopt.models.router_losses import load_balancing_loss, router_z_loss


def logits(layers: int = 3, tokens: int = 40, experts: int = 5, *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(tokens, experts, generator=generator, dtype=torch.float64) for _ in range(layers)]


def softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def balance_by_hand(layers: list[Tensor], top_k: int) -> float:
    """E Σ f_e P_e of each layer by counting, averaged."""
    values = []
    for layer in layers:
        x = layer.numpy()
        tokens, experts = x.shape
        counts = np.zeros(experts)
        for row in x:
            for expert in np.argsort(-row)[:top_k]:
                counts[expert] += 1
        values.append(experts * float((counts / (tokens * top_k) * softmax(x).mean(axis=0)).sum()))
    return float(np.mean(values))


def of_transformers(layers: list[Tensor], *, top_k: int) -> float:
    from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

    theirs: Any = load_balancing_loss_func
    return float(theirs(tuple(layers), num_experts=layers[0].shape[1], top_k=top_k))


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_load_balancing_is_experts_times_the_product_of_loads_and_probabilities(top_k: int) -> None:
    layers = logits()
    assert load_balancing_loss(layers, top_k=top_k).item() == pytest.approx(balance_by_hand(layers, top_k), rel=1e-12)


def test_z_loss_is_the_mean_square_of_the_logsumexp() -> None:
    layers = logits()
    by_hand = np.mean([np.mean(np.log(np.exp(layer.numpy()).sum(axis=1)) ** 2) for layer in layers])
    assert router_z_loss(layers).item() == pytest.approx(float(by_hand), rel=1e-12)


@pytest.mark.parametrize("top_k", [1, 2])
def test_of_one_layer_transformers_has_top_k_times_the_load_balancing_loss(top_k: int) -> None:
    (layer,) = logits(layers=1)
    theirs = of_transformers([layer], top_k=top_k)
    assert theirs == pytest.approx(top_k * load_balancing_loss([layer], top_k=top_k).item(), rel=1e-6)


def test_layers_that_are_unequal_in_opposite_ways_do_not_make_up_for_each_other() -> None:
    one = torch.tensor([[9.0, 0.0]]).repeat(8, 1)
    layers = [one, one.flip(1)]
    assert load_balancing_loss(layers, top_k=1).item() == pytest.approx(2.0, abs=1e-3)
    assert of_transformers(layers, top_k=1) == pytest.approx(1.0, abs=1e-3)


def test_equal_loads_give_one_and_a_single_busy_expert_gives_their_number() -> None:
    assert load_balancing_loss([9 * torch.eye(4)], top_k=1).item() == pytest.approx(1.0)
    busy = torch.tensor([[50.0, 0.0, 0.0, 0.0]]).repeat(6, 1)
    assert load_balancing_loss([busy], top_k=1).item() == pytest.approx(4.0)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (5, 5)])
def test_one_expert_or_all_selected_is_always_balanced(experts: int, top_k: int) -> None:
    layers = [layer.requires_grad_() for layer in logits(experts=experts)]
    loss = load_balancing_loss(layers, top_k=top_k)
    loss.backward()
    assert loss.item() == pytest.approx(1.0)
    assert all(layer.grad is not None and float(layer.grad.abs().max()) < 1e-12 for layer in layers)


def test_only_the_z_loss_sees_a_shift_of_all_logits_of_a_token() -> None:
    layers = logits()
    shifted = [layer + 7.0 for layer in layers]
    assert load_balancing_loss(shifted, top_k=2).item() == pytest.approx(load_balancing_loss(layers, top_k=2).item())
    assert router_z_loss(shifted).item() > router_z_loss(layers).item() + 7.0


def test_a_step_against_the_gradient_balances_the_load_and_shrinks_the_logits() -> None:
    for loss in (lambda layers: load_balancing_loss(layers, top_k=2), router_z_loss):
        layers = [layer.requires_grad_() for layer in logits()]
        before = loss(layers)
        before.backward()
        after = loss([layer.detach() - layer.grad for layer in layers if layer.grad is not None])
        assert after.item() < before.item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_they_are_summed_up_in_float32_at_least(dtype: torch.dtype) -> None:
    layers = [layer.to(dtype) for layer in logits()]
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert load_balancing_loss(layers, top_k=2).dtype == expected
    assert router_z_loss(layers).dtype == expected


def test_sequences_of_a_batch_are_one_set_of_tokens() -> None:
    layers = logits()
    batched = [layer.view(4, 10, 5) for layer in layers]
    assert torch.equal(load_balancing_loss(batched, top_k=2), load_balancing_loss(layers, top_k=2))
    assert torch.equal(router_z_loss(batched), router_z_loss(layers))


def test_impossible_input_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="top_k=6 must be between 1 and the number of experts, 5"):
        load_balancing_loss(logits(), top_k=6)
    with pytest.raises(ConfigError, match="no layer with experts"):
        router_z_loss([])
