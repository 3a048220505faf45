"""What every step of row_norm is tested with, and promises, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.matrices import generator

LR, DECAY = 1e-2, 0.1
STEPS = 3
ROUNDING = 2.0**-24
OPTIONS: list[dict[str, Any]] = [
    {"centered": centered, "row_damping": damping, "nesterov": nesterov, "beta": beta}
    for centered, damping, (nesterov, beta) in product(
        (False, True), (0.0, 0.1), ((False, 0.0), (False, 0.9), (True, 0.9))
    )
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def a_pure_shift_gives_no_update_and_a_large_one_leaves_what_remains(stepped: Callable[..., Tensor]) -> None:
    """Of a centered step, given as a function of weight, gradient and options that returns the new weight."""
    shift = random(1, 40, seed=3)
    rounded = shift * (1 + 2.0**-23 * random(90, 40, seed=5).sign())
    nothing = torch.zeros(90, 40)
    for g in (shift.expand(90, -1), shift.repeat(90, 1), rounded):
        assert torch.equal(stepped(nothing, g, centered=True, lr=1.0), nothing)
    # As of `lit_symopt.rules.centering`: 4 roundings of the row and of the mean are none of its own, more are.
    for roundings, expected in ((6, 0.0), (10, 1.0)):
        g = shift * (1 + roundings * 2.0**-23 * torch.tensor([1.0, -1.0]).repeat(45).unsqueeze(-1))
        norms = stepped(nothing, g, centered=True, lr=1.0).norm(dim=1)
        torch.testing.assert_close(norms, torch.full((90,), expected))
    mixed = random(90, 40, seed=4) + 1e6 * shift
    update = -stepped(nothing, mixed, lr=1.0, centered=True)
    exact = mixed.double() - mixed.double().mean(dim=0)
    exact = exact / exact.norm(dim=1, keepdim=True)
    exact = exact - exact.mean(dim=0)
    assert (update - exact).abs().max() <= 4 * ROUNDING
