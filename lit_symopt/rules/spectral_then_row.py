r"""Singular values to one, then rows to norm one.

    U = D(P) P,   P = polar(M)

Flattens the spectrum first and then gives each unit a step of the same length: S_m × O(n).

Row shards add up the n(n+1)/2 numbers of a Gram matrix, and 1 with δ > 0.

Source: Lau and Su 2026, arXiv:2605.18106 (hybrid rules).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_symopt.linalg import EAGER, WHOLE, Execution, Precision, Rows, polar
from lit_symopt.rules.centering import on_quotient
from lit_symopt.rules.row_norm import unit_rows
from lit_symopt.rules.rule import ROW_SCALES, Rule


def spectral_then_row(
    momentum: Tensor,
    *,
    centered: bool = False,
    precision: Precision = "auto",
    eps: float = 1e-8,
    row_damping: float = 0.0,
    rows: Rows = WHOLE,
    how: Execution = EAGER,
) -> Tensor:
    """D(P) P with P = polar(M) for `momentum` [..., m, n], or Π D(P) P with P = polar(ΠM) if `centered`.

    >>> spectral_then_row(torch.tensor([[5.0, 0.0], [0.0, 2.0], [0.0, 1.0], [0.0, 0.0]]))
    tensor([[1., 0.],
            [0., 1.],
            [0., 1.],
            [0., 0.]])
    """

    def rule(x: Tensor) -> Tensor:
        p = polar(x, precision=precision, as_dtype=momentum.dtype, rows=rows, how=how)
        # A zero row of M has a zero row in P, but for rounding, which must not be blown up to a full step.
        p = torch.where((x == 0).all(dim=-1, keepdim=True), 0, p)
        return unit_rows(p, eps=eps, damping=row_damping, rows=rows, dtype=momentum.dtype)

    return on_quotient(rule, momentum, centered=centered, precision=precision, rows=rows)


RULE = Rule(
    name="spectral_then_row",
    function=spectral_then_row,
    equation="D(P) P, P = polar(M)",
    group="S_m × O(n)",
    kind="row",
    scales=ROW_SCALES,
    damped=True,
    source="arXiv:2605.18106",
)
