"""Inference of MLPs whose blocks follow from their definition. Oracle: that definition, written beside each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_symopt import Role
from lit_symopt.blocks import Action
from tests.infer.small import Residual, blocks, roles


def test_glu_activates_the_second_half_and_then_only_what_acts_on_both_halves_alike_is_said() -> None:
    """`torch.nn.functional.glu(a, b) = a * sigmoid(b)`: the gate is stored last."""
    module = Residual(lambda m, x: m.down(F.glu(m.fused(x))), fused=nn.Linear(8, 24), down=nn.Linear(12, 8))
    found = blocks(module, torch.randn(3, 8))
    assert (found["fused.weight"].role, str(found["fused.weight"].layout)) == (Role.GATE_UP, "gate_up('stacked')")
    assert found["fused.weight"].acts is found["down.weight"].acts is Action.PERMUTATION
    assert found["fused.bias"].along == "gate_up"


def test_interleaved_gate_and_up_rows_are_told_from_stacked_ones() -> None:
    def swiglu(m: Any, x: Tensor) -> Tensor:
        pair = m.fused(x).unflatten(-1, (12, 2))
        out: Tensor = m.down(F.silu(pair[..., 0]) * pair[..., 1])
        return out

    found = blocks(Residual(swiglu, fused=nn.Linear(8, 24), down=nn.Linear(12, 8)), torch.randn(3, 8))
    assert str(found["fused.weight"].layout) == "gate_up('interleaved')"
    assert found["fused.weight"].acts is Action.MONOMIAL


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (lambda x: x * torch.sigmoid(1.7 * x), {"a.weight": "up", "b.weight": "down"}),
        (lambda x: x.clamp(min=0), {"a.weight": "up", "b.weight": "down"}),
        (lambda x: x.relu().square(), {"a.weight": "up", "b.weight": "down"}),
        (lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), {"a.weight": "up", "b.weight": "down"}),
        (lambda x: x * (x > 0), {"a.weight": "up", "b.weight": "down"}),
        (lambda x: torch.where(x > 0, x, 0.1 * x), {"a.weight": "up", "b.weight": "down"}),
        (lambda x: x.masked_fill(x < 0, 0.0), {"a.weight": "up", "b.weight": "down"}),
        (lambda x: torch.maximum(x, 0.1 * x), {"a.weight": "up", "b.weight": "down"}),
        (F.logsigmoid, {"a.weight": "up", "b.weight": "down"}),
        (F.hardswish, {"a.weight": "up", "b.weight": "down"}),
        (lambda x: F.prelu(x, torch.tensor([0.2])), {"a.weight": "up", "b.weight": "down"}),
        (lambda x: 3 * x, {"a.weight": "linear", "b.weight": "linear"}),
        (lambda x: F.rms_norm(x, (12,)), {"a.weight": "linear", "b.weight": "linear"}),
    ],
)
def test_an_mlp_needs_an_activation_however_it_is_written(
    activation: Callable[[Tensor], Tensor], expected: dict[str, str]
) -> None:
    module = Residual(
        lambda m, x: m.b(activation(m.a(x))), a=nn.Linear(8, 12, bias=False), b=nn.Linear(12, 8, bias=False)
    )
    assert roles(module, torch.randn(3, 8)) == expected


def test_neurons_that_two_maps_read_are_not_free_to_change_places_with_one_of_them() -> None:
    def shared(m: Any, x: Tensor) -> Tensor:
        hidden = m.a(x).relu()
        out: Tensor = m.b(hidden) * m.c(hidden).sigmoid()
        return out

    parts = {name: nn.Linear(*sizes, bias=False) for name, sizes in (("a", (8, 12)), ("b", (12, 8)), ("c", (12, 8)))}
    assert set(roles(Residual(shared, **parts), torch.randn(3, 8)).values()) == {"linear"}


def test_neurons_that_something_else_reads_too_are_not_free_to_change_places() -> None:
    def leaks(m: Any, x: Tensor) -> Tensor:
        hidden = m.a(x).relu()
        out: Tensor = m.b(hidden) + hidden
        return out

    module = Residual(leaks, a=nn.Linear(8, 8, bias=False), b=nn.Linear(8, 8, bias=False))
    assert roles(module, torch.randn(3, 8)) == {"a.weight": "linear", "b.weight": "linear"}
