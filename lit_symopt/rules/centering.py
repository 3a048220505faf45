r"""Centering: a rule on the quotient by the shift that all rows share.

    Π = I - 11ᵀ/m,   U = Π rule(Π M)

The loss of a softmax does not see W → W + 1aᵀ, so neither should the update. For cross-entropy heads and softmax
routers 1ᵀG = 0 already: the first projection only removes rounding, the last one matters, because row scaling leaves
the quotient.

Row shards add up n numbers for each of the two projections.

Source: Lau and Su 2026, arXiv:2605.18106.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_symopt.linalg import WHOLE, Precision, Rows

ROUNDINGS = 4
"""A row that differs from the mean by at most this many roundings of itself is the mean."""


def on_quotient(
    function: Callable[[Tensor], Tensor],
    momentum: Tensor,
    *,
    centered: bool,
    precision: Precision,
    rows: Rows = WHOLE,
) -> Tensor:
    """Π function(Π M) if `centered`, else function(M), in a working dtype and back in the dtype of `momentum`.

    The working dtype is float64 where `precision` promises digits that float32 intermediates would lose (`exact`,
    `fp32`) and float32 elsewhere, never below that of `momentum`. `rows` says where the rows of each matrix lie.
    """
    if rows.empty(momentum):
        return torch.empty_like(momentum)
    dtype = momentum.dtype
    work = momentum.to(working_dtype(dtype, precision))
    if not centered:
        return rows.keep(function(work).to(dtype))
    return project(function(project_momentum(work, dtype=dtype, rows=rows)), rows=rows, dtype=dtype).to(dtype)


def working_dtype(dtype: torch.dtype, precision: Precision) -> torch.dtype:
    """The dtype of a rule's intermediates."""
    at_least = torch.float64 if precision in ("exact", "fp32") else torch.float32
    return torch.promote_types(dtype, at_least)


def project(x: Tensor, *, rows: Rows = WHOLE, dtype: torch.dtype | None = None) -> Tensor:
    """Π x for x [..., m, n]: subtract from each row the mean of all rows.

    Twice: the first mean is rounded to the dtype of `x`, and the second takes away what that left, so that the result
    is right relative to its own size even where the shift is much larger than what remains.

    Row shards subtract in float64 whatever the dtype of `x`, which leaves nothing to take away, unless the entries were
    themselves given in float64: for all others one mean is exchanged, not two.

    Args:
        x: matrices [..., m, n], or [K, k, n] with the rows that are here.
        rows: where the rows lie.
        dtype: in which the entries were given, if `x` is a wider copy.
    """
    work, passes = (x, 2) if rows.whole else (x.to(torch.float64), passes_on_shards(dtype or x.dtype))
    for _ in range(passes):
        work = work - rows.mean(work).to(work.dtype)
    return rows.keep(work.to(x.dtype))


def passes_on_shards(dtype: torch.dtype) -> int:
    """How many means `project` exchanges for entries given in `dtype`."""
    return 2 if dtype == torch.float64 else 1


def project_momentum(x: Tensor, *, dtype: torch.dtype, rows: Rows = WHOLE) -> Tensor:
    """Π x with the rows set to zero that hold nothing but the rounding of entries given in `dtype`.

    Without this a pure shift 1aᵀ would have rounding errors for rows, which row rules blow up to full steps. The test
    compares row norms, so it commutes with rotations of the features and permutations of the rows.
    """
    projected = project(x, rows=rows, dtype=dtype)
    noise = ROUNDINGS * torch.finfo(dtype).eps * (_row_norms(x) + _row_norms(x - projected))
    return torch.where(_row_norms(projected) > noise, projected, 0)


def _row_norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
    return norms
