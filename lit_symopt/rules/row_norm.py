r"""Every row to norm one.

    U = D(M) M,   D = diag(1 / (‖Mᵢ‖ + δ·rms_j ‖Mⱼ‖)),   δ = `row_damping`

A row is a unit with a free basis for its features: the rule commutes with permutations of the rows and rotations of the
columns, S_m × O(n). With δ = 0 every nonzero row gets norm one, however small it was; δ > 0 lets a row that is small
against the others, such as that of a token not seen for long, fade, and keeps the same symmetry.

Source: Lau and Su 2026, arXiv:2605.18106.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_symopt.linalg import Precision
from lit_symopt.rules.centering import on_quotient
from lit_symopt.rules.rule import ROW_SCALES, Rule


def row_norm(
    momentum: Tensor,
    *,
    centered: bool = False,
    precision: Precision = "auto",
    eps: float = 1e-8,
    row_damping: float = 0.0,
) -> Tensor:
    """D(M) M for `momentum` [..., m, n], or Π D(ΠM) ΠM if `centered`.

    >>> row_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1e-30]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000],
            [0.0000, 1.0000]])
    """
    return on_quotient(
        lambda x: unit_rows(x, eps=eps, damping=row_damping), momentum, centered=centered, precision=precision
    )


def unit_rows(x: Tensor, *, eps: float, damping: float) -> Tensor:
    """D(x) x. Each row is first divided by its own largest entry, so that no square over- or underflows.

    A row's norm relative to that entry is at least one unless the row is zero: `eps` guards 0/0 and nothing else.
    """
    peak = _largest(x, dim=-1)
    rows = x / torch.where(peak > 0, peak, 1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)  # in units of the row's peak
    if damping:
        top = _largest(peak, dim=-2)
        relative = peak / torch.where(top > 0, top, 1)  # the row's peak in units of the matrix's
        rms = (norms * relative).square().mean(dim=-2, keepdim=True).sqrt()
        norms = norms + damping * torch.where(relative > 0, rms / relative, torch.inf)
    return rows / norms.clamp(min=eps)


def _largest(x: Tensor, *, dim: int) -> Tensor:
    return x.abs().amax(dim=dim, keepdim=True)


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
