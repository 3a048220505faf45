r"""Centering: a rule on the quotient by the shift that all rows share.

    Π = I - 11ᵀ/m,   U = Π rule(Π M)

The loss of a softmax does not see W → W + 1aᵀ, so neither should the update. For cross-entropy heads and softmax
routers 1ᵀG = 0 already: the first projection only removes rounding, the last one matters, because row scaling leaves
the quotient.

Source: Lau and Su 2026, arXiv:2605.18106.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_symopt.linalg import Precision

ROUNDINGS = 4
"""A row that differs from the mean by at most this many roundings of itself is the mean."""


def on_quotient(
    function: Callable[[Tensor], Tensor], momentum: Tensor, *, centered: bool, precision: Precision
) -> Tensor:
    """Π function(Π M) if `centered`, else function(M), in a working dtype and back in the dtype of `momentum`.

    The working dtype is float64 where `precision` promises digits that float32 intermediates would lose (`exact`,
    `fp32`) and float32 elsewhere, never below that of `momentum`.
    """
    if momentum.numel() == 0:
        return torch.empty_like(momentum)
    work = momentum.to(working_dtype(momentum.dtype, precision))
    if not centered:
        return function(work).to(momentum.dtype)
    return project(function(project_momentum(work, dtype=momentum.dtype))).to(momentum.dtype)


def working_dtype(dtype: torch.dtype, precision: Precision) -> torch.dtype:
    """The dtype of a rule's intermediates."""
    at_least = torch.float64 if precision in ("exact", "fp32") else torch.float32
    return torch.promote_types(dtype, at_least)


def project(x: Tensor) -> Tensor:
    """Π x for x [..., m, n]: subtract from each row the mean of all rows.

    Twice: the first mean is rounded to the dtype of `x`, and the second takes away what that left, so that the result
    is right relative to its own size even where the shift is much larger than what remains.
    """
    for _ in range(2):
        x = x - x.mean(dim=-2, keepdim=True, dtype=torch.float64).to(x.dtype)
    return x


def project_momentum(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Π x with the rows set to zero that hold nothing but the rounding of entries given in `dtype`.

    Without this a pure shift 1aᵀ would have rounding errors for rows, which row rules blow up to full steps. The test
    compares row norms, so it commutes with rotations of the features and permutations of the rows.
    """
    projected = project(x)
    noise = ROUNDINGS * torch.finfo(dtype).eps * (_row_norms(x) + _row_norms(x - projected))
    return torch.where(_row_norms(projected) > noise, projected, 0)


def _row_norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
    return norms
