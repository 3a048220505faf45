r"""Every row to norm one.

    U = D(M) M,   D = diag(1 / (‖Mᵢ‖ + δ·rms_j ‖Mⱼ‖)),   δ = `row_damping`

A row is a unit with a free basis for its features: the rule commutes with permutations of the rows and rotations of the
columns, S_m × O(n). With δ = 0 every nonzero row gets norm one, however small it was; δ > 0 lets a row that is small
against the others, such as that of a token not seen for long, fade, and keeps the same symmetry.

Row shards add up nothing, or 1 number with δ > 0.

Source: Lau and Su 2026, arXiv:2605.18106.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_symopt.linalg import EAGER, WHOLE, Execution, Precision, Rows
from lit_symopt.rules.centering import on_quotient
from lit_symopt.rules.rule import ROW_SCALES, Rule


def row_norm(
    momentum: Tensor,
    *,
    centered: bool = False,
    precision: Precision = "auto",
    eps: float = 1e-8,
    row_damping: float = 0.0,
    rows: Rows = WHOLE,
    how: Execution = EAGER,
) -> Tensor:
    """D(M) M for `momentum` [..., m, n], or Π D(ΠM) ΠM if `centered`.

    >>> row_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1e-30]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000],
            [0.0000, 1.0000]])
    """
    return on_quotient(
        lambda x: unit_rows(x, eps=eps, damping=row_damping, rows=rows, dtype=momentum.dtype),
        momentum,
        centered=centered,
        precision=precision,
        rows=rows,
    )


def unit_rows(x: Tensor, *, eps: float, damping: float, rows: Rows = WHOLE, dtype: torch.dtype | None = None) -> Tensor:
    """D(x) x. Each row is first divided by its own largest entry, so that no square over- or underflows.

    A row's norm relative to that entry is at least one unless the row is zero: `eps` guards 0/0 and nothing else.
    `rows` says where the rows lie, `dtype` in which dtype the entries were given (default: that of `x`).
    """
    peak = torch.maximum(x.amax(dim=-1, keepdim=True), -x.amin(dim=-1, keepdim=True))
    units = x / torch.where(peak > 0, peak, 1)
    norms: Tensor = torch.linalg.vector_norm(units, dim=-1, keepdim=True)  # in units of the row's peak
    if damping:
        relative = _relative(peak, rows, dtype or x.dtype)
        rms = rows.mean((norms * relative).square()).sqrt()
        norms = norms + damping * torch.where(relative > 0, rms / relative, torch.inf)
    return units.div_(norms.clamp(min=eps)).to(x.dtype)


def _relative(peak: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """The rows' peaks in a unit in which their squares are safe: the peak of the matrix, where one is needed."""
    if rows.whole or dtype == torch.float64:
        top = rows.max(peak)
        return peak / torch.where(top > 0, top, 1)
    return peak.to(torch.float64)  # which holds the square of any float32 number: one exchange less


RULE = Rule(
    name="row_norm",
    function=row_norm,
    equation="D(M) M",
    group="S_m × O(n)",
    kind="row",
    scales=ROW_SCALES,
    damped=True,
    source="arXiv:2605.18106",
)
