"""Three steps of the paper's published implementation, replayed with the pure functions.

`tests/data/golden_updates.npz` holds for each case the initial parameter `p0`, `grads` [3, ...] and the parameter after
each step `traj` [3, ...], float32, computed with learning rate 0.01, momentum 0.95 and weight decay 0.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_symopt.rules import ema_, get_rule, nesterov_, scale_factor
from tests.matrices import relative_error

DATA = np.load(Path(__file__).parents[1] / "data" / "golden_updates.npz")
LR, BETA, WEIGHT_DECAY = 0.01, 0.95, 0.1

# E experts, I neurons, d features, H heads
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    rule: str
    tolerance: float
    centered: bool = False
    alpha: float | None = None
    momentum: Literal["ema", "nesterov"] = "ema"
    scale: str = "none"
    to_matrices: Map = field(default=lambda x: x)
    from_matrices: Map = field(default=lambda x: x)


def split(x: Tensor, dim: int, sizes: tuple[int, int]) -> Tensor:
    """`Tensor.unflatten`, which has no types."""
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def transpose(x: Tensor) -> Tensor:
    return x.transpose(-2, -1)


def interleaved_pairs(x: Tensor) -> Tensor:
    """[E, d, 2I] with columns gate_0, up_0, gate_1, ... → one row [gate_j, up_j] a neuron, [E, I, 2d]."""
    return transpose(x).reshape(x.shape[0], -1, 2 * x.shape[1])


def from_interleaved_pairs(x: Tensor) -> Tensor:
    return transpose(x.reshape(x.shape[0], -1, x.shape[2] // 2))


def stacked_pairs(x: Tensor) -> Tensor:
    """[E, 2I, d] with the gate rows above the up rows → [E, I, 2d]."""
    return split(x, 1, (2, -1)).transpose(1, 2).flatten(2)


def from_stacked_pairs(x: Tensor) -> Tensor:
    return split(x, 2, (2, -1)).transpose(1, 2).flatten(1, 2)


def interleaved_branches(x: Tensor) -> Tensor:
    """[E, d, 2I] → gate and up, [E, 2, I, d]."""
    return split(transpose(x), 1, (-1, 2)).transpose(1, 2)


def from_interleaved_branches(x: Tensor) -> Tensor:
    return transpose(x.transpose(1, 2).flatten(1, 2))


def heads_of_rows(x: Tensor) -> Tensor:
    return split(x, 0, (4, -1))


def heads_of_columns(x: Tensor) -> Tensor:
    """[d, H h] → [H, d, h]."""
    return split(x, 1, (4, -1)).transpose(0, 1)


def from_heads_of_columns(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)


ROWS = 1e-5  # float32 rounding of a trajectory with a learning rate of 0.01
SPECTRAL = 1e-3
PAIRS = {
    "gpt_oss_gate_up_pair": (interleaved_pairs, from_interleaved_pairs),
    "olmoe_gate_up_pair": (stacked_pairs, from_stacked_pairs),
    "row": (lambda x: x, lambda x: x),
    "col": (transpose, transpose),
}
HYBRIDS = {"polar_then_row": "spectral_then_row", "row_then_polar": "row_then_spectral"}

CASES = [
    *(Case(f"row_norm/center={c}", "row_norm", ROWS, centered=c) for c in (False, True)),
    *(
        Case(f"row_norm/orientation={o}", "row_norm", ROWS, to_matrices=to, from_matrices=back)
        for o, (to, back) in PAIRS.items()
    ),
    *(
        Case(f"hybrid/row_then_polar/orientation={o}", "row_then_spectral", SPECTRAL,
             to_matrices=PAIRS[o][0], from_matrices=PAIRS[o][1])
        for o in ("row", "col")
    ),
    *(
        Case(f"{side}_spectral/center={c}/alpha={a}", f"{side}_spectral", SPECTRAL,
             centered=c, alpha=a, scale="nuclear")
        for side in ("right", "left") for c in (False, True) for a in (0.0, 1.0)
    ),
    *(
        Case(f"hybrid/{order}/left={left}/center={c}", rule, SPECTRAL, centered=c)
        for order, rule in HYBRIDS.items() for left in (False, True) for c in (False, True)
        if (order, left, c) != ("row_then_polar", True, True)  # the published implementation diverges there
    ),
]  # fmt: skip

MUON = [
    Case(name, "spectral", 0.99, momentum="nesterov", scale="spectral", to_matrices=to, from_matrices=back)
    for name, to, back in (
        ("muon/full", lambda x: x, lambda x: x),
        ("muon_heads/qkv", heads_of_rows, lambda x: x.flatten(0, 1)),
        ("muon_heads/o", heads_of_columns, from_heads_of_columns),
        ("muon_experts/row", lambda x: x, lambda x: x),
        ("muon_experts/col", transpose, transpose),
        ("muon_experts/olmoe_gate_up_pair", lambda x: split(x, 1, (2, -1)), lambda x: x.flatten(1, 2)),
        ("muon_experts/gpt_oss_gate_up_pair", interleaved_branches, from_interleaved_branches),
    )
]


def replay(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Pairs of update: ours, and the one between two published parameters, solved for in float64."""
    gradients, trajectory = (torch.from_numpy(DATA[f"{case.name}/{key}"]) for key in ("grads", "traj"))
    before = torch.from_numpy(DATA[f"{case.name}/p0"]).double()
    rule, buffer, pairs = get_rule(case.rule), torch.zeros_like(gradients[0]), []
    accumulate = ema_ if case.momentum == "ema" else nesterov_
    for gradient, after in zip(gradients, trajectory.double(), strict=True):
        (direction,) = accumulate([buffer], [gradient], BETA)
        matrices = case.to_matrices(direction)
        update = rule.function(matrices, centered=case.centered, precision="fp32")
        m, n = update.shape[-2:]
        factor = scale_factor(
            case.scale,
            rule=rule,
            momentum=matrices,
            update=update,
            fan_out=m,
            fan_in=n,
            alpha=1.0 if case.alpha is None else case.alpha,
        )
        published = ((1 - LR * WEIGHT_DECAY) * before - after) / LR
        pairs.append((case.from_matrices(update * factor), published))
        before = after
    return pairs


def test_every_golden_case_is_replayed() -> None:
    assert {case.name for case in CASES + MUON} == {key.rsplit("/", 1)[0] for key in DATA.files}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_updates_agree_with_the_published_implementation(case: Case) -> None:
    for ours, published in replay(case):
        assert relative_error(ours, published) <= case.tolerance


@pytest.mark.parametrize("case", MUON, ids=lambda case: case.name)
def test_muon_updates_agree_with_the_published_implementation_in_direction(case: Case) -> None:
    for ours, published in replay(case):
        cosine = torch.cosine_similarity(ours.double().flatten(), published.flatten(), dim=0)
        assert cosine > case.tolerance
        assert 0.7 < float(published.norm() / ours.double().norm()) < 1.2  # its singular values after five bf16 steps
