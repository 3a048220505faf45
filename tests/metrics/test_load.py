"""ExpertLoad and imbalance where the numbers can be said without a computer."""

from __future__ import annotations

import math

import torch

from lit_symopt.metrics import ExpertLoad, imbalance


def test_an_even_load_has_no_variation_full_entropy_and_balance_loss_one() -> None:
    load = ExpertLoad([4])
    load.update(0, torch.arange(8).reshape(8, 1) % 4, torch.full((8, 4), 0.25))
    found = load.compute()
    assert [found[f"{group}/cv"].item() for group in ("assignments", "mass")] == [0.0, 0.0]
    assert math.isclose(found["assignments/entropy"].item(), 1.0)
    assert found["assignments/largest_share"] == 0.25
    assert math.isclose(found["balance_loss"].item(), 1.0)


def test_one_expert_taking_everything_is_the_other_end_of_every_range() -> None:
    load = ExpertLoad([4])
    load.update(0, torch.zeros(8, 1, dtype=torch.int64), torch.eye(4)[[0] * 8])
    found = load.compute()
    assert math.isclose(found["assignments/cv"].item(), math.sqrt(3))
    assert found["assignments/entropy"] == 0.0
    assert found["assignments/largest_share"] == 1.0
    assert (found["assignments/dead_experts"].item(), found["mass/dead_experts"].item()) == (3.0, 3.0)
    assert found["balance_loss"] == 4.0


def test_a_single_expert_is_even_with_one_token_too() -> None:
    load = ExpertLoad([1])
    load.update(0, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    found = load.compute()
    values = {name.partition("/")[2]: value.item() for name, value in found.items() if "/" in name}
    assert values == {"cv": 0.0, "entropy": 1.0, "largest_share": 1.0, "dead_experts": 0.0}
    assert found["balance_loss"] == 1.0


def test_top_k_equal_to_the_number_of_experts_is_even_by_assignments_whatever_the_probabilities() -> None:
    load = ExpertLoad([3])
    load.update(0, torch.tensor([[2, 0, 1], [0, 1, 2]]), torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.1, 0.0]]))
    found = load.compute()
    assert found["assignments/cv"] < 1e-12
    assert math.isclose(found["balance_loss"].item(), 1.0, rel_tol=1e-6)
    assert found["mass/dead_experts"] == 1.0


def test_a_layer_without_tokens_has_no_numbers_and_does_not_spoil_the_other() -> None:
    load = ExpertLoad([2, 2])
    load.update(1, torch.tensor([[0], [1]]), torch.full((2, 2), 0.5))
    found = load.compute()
    assert found["assignments/cv"].isnan().tolist() == [True, False]
    assert found["mass/entropy"].isnan().tolist() == [True, False]


def test_updates_of_micro_batches_add_up_to_one_of_the_whole_batch() -> None:
    selected, probabilities = torch.randint(4, (12, 1)), torch.rand(12, 4).softmax(-1)
    whole, parts = ExpertLoad([4]), ExpertLoad([4])
    whole.update(0, selected, probabilities)
    for rows in torch.arange(12).split(5):
        parts.update(0, selected[rows], probabilities[rows])
    for name, value in whole.compute().items():
        torch.testing.assert_close(parts.compute()[name], value, rtol=1e-12, atol=1e-12)


def test_padding_of_layers_with_fewer_experts_is_no_dead_expert() -> None:
    found = imbalance(torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]), torch.tensor([2, 3]), dead_below=0.01)
    assert found["dead_experts"].tolist() == [0.0, 0.0]
    assert found["cv"][0] == 0.0
