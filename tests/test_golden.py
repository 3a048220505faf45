"""SymOpt against what the paper authors' published implementation computed for the same gradients.

Oracle: `data/golden_updates.npz`; for each case the initial parameter, three gradients, and the parameter after each
step (lr 0.01, momentum 0.95, weight decay 0.1). The `muon` cases iterate in bfloat16 for five steps only, with singular
values between 0.7 and 1.2, so they are compared in direction.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lit_symopt import Layout, SymOpt

GOLDEN = np.load(Path(__file__).parent / "data" / "golden_updates.npz")
ROUNDING, SPECTRAL = 1e-6, 1e-3

PAIRS = {
    "gpt_oss_gate_up_pair": Layout.experts(Layout.gate_up("interleaved", pairs=True, stored="in_out")),
    "olmoe_gate_up_pair": Layout.experts(Layout.gate_up("stacked", pairs=True)),
}
ORIENTATIONS = {"row": Layout.experts(), "col": Layout.transposed(), **PAIRS}
RULES = {
    "row_norm": ("row_norm", ROUNDING),
    "right_spectral": ("right_spectral", SPECTRAL),
    "left_spectral": ("left_spectral", SPECTRAL),
    "row_then_polar": ("row_then_spectral", SPECTRAL),
    "polar_then_row": ("spectral_then_row", SPECTRAL),
}


def cases(prefix: str) -> list[str]:
    return sorted({name.rsplit("/", 1)[0] for name in GOLDEN.files if name.startswith(prefix)})


def replay(case: str, **options: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each of three steps: the parameter before it, after it, and after it according to the oracle."""
    weight = nn.Parameter(torch.from_numpy(GOLDEN[f"{case}/p0"]).clone())
    optimizer = SymOpt([weight], lr=0.01, weight_decay=0.1, **{"precision": "fp32", "momentum": 0.95, **options})
    steps = []
    for gradient, expected in zip(GOLDEN[f"{case}/grads"], GOLDEN[f"{case}/traj"], strict=True):
        before = weight.detach().clone()
        weight.grad = torch.from_numpy(gradient).clone()
        optimizer.step()
        steps.append((before, weight.detach().clone(), torch.from_numpy(expected)))
        with torch.no_grad():
            weight.copy_(steps[-1][2])  # so that a step is compared alone
    return steps


def update(before: Tensor, after: Tensor) -> Tensor:
    return (1 - 0.01 * 0.1) * before - after


@pytest.mark.parametrize(
    "case", [*cases("row_norm"), *cases("right_spectral"), *cases("left_spectral"), *cases("hybrid")]
)
def test_symmetry_rules_agree(case: str) -> None:
    pieces = case.split("/")
    settings = dict(piece.split("=") for piece in pieces if "=" in piece)
    rule, tolerance = RULES[pieces[1] if pieces[0] == "hybrid" else pieces[0]]
    options: dict[str, Any] = {"rule": rule, "centered": settings.get("center") == "True"}
    if float(settings.get("alpha", 0.0)):
        options |= {"scale": "nuclear", "alpha": float(settings["alpha"])}
    if "orientation" in settings:
        shape = GOLDEN[f"{case}/p0"].shape
        layout = ORIENTATIONS[settings["orientation"]]
        options["layout"] = Layout.experts(layout) if settings["orientation"] == "col" and len(shape) == 3 else layout
    for before, after, expected in replay(case, **options):
        ours, theirs = update(before, after), update(before, expected)
        assert (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-7 * before.norm()


MUON = {
    "muon/full": Layout.matrix(),
    "muon_heads/qkv": Layout.heads(4),
    "muon_heads/o": Layout.heads(4, dim="columns"),
    "muon_experts/row": Layout.experts(),
    "muon_experts/col": Layout.experts(),
    "muon_experts/gpt_oss_gate_up_pair": Layout.experts(Layout.gate_up("interleaved", stored="in_out")),
    "muon_experts/olmoe_gate_up_pair": Layout.experts(Layout.gate_up("stacked")),
}


# The oracle's aspect is reversed for these two: 12 × 8 neurons seen as 8 × 12, and the other way round.
QUIRKS = {"muon_experts/col": (12 / 8) ** 0.5, "muon_experts/gpt_oss_gate_up_pair": (12 / 8) ** -0.5}


def test_every_golden_case_is_replayed() -> None:
    assert set(cases("muon")) == set(MUON)
    assert len(cases("")) == 30


@pytest.mark.parametrize("case", MUON)
def test_muon_agrees_in_direction_and_size(case: str) -> None:
    options = {"rule": "spectral", "momentum_kind": "nesterov", "scale": "spectral", "layout": MUON[case]}
    for before, after, expected in replay(case, **options):
        ours, theirs = update(before, after), update(before, expected)
        cosine = nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
        assert cosine > 0.99
        assert 0.7 <= theirs.norm() / ours.norm() / QUIRKS.get(case, 1.0) <= 1.2
