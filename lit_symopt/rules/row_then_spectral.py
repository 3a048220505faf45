r"""Rows to norm one, then singular values to one.

    U = polar(D(M) M),   centered: U = Π polar(Π D(ΠM) ΠM)

The row scaling takes the magnitudes of the units out before the spectrum is flattened, so that a rare unit has the same
say as a frequent one: S_m × O(n). Row scaling leaves the quotient by the shift, hence the projection in the middle.

Row shards add up 1 number with δ > 0, n for the projection in the middle, and the n(n+1)/2 of a Gram matrix.

Source: Lau and Su 2026, arXiv:2605.18106 (hybrid rules).
"""

from __future__ import annotations

from torch import Tensor

from lit_symopt.linalg import EAGER, WHOLE, Execution, Precision, Rows, polar
from lit_symopt.rules.centering import on_quotient, project
from lit_symopt.rules.row_norm import unit_rows
from lit_symopt.rules.rule import SPECTRAL_SCALES, Rule


def row_then_spectral(
    momentum: Tensor,
    *,
    centered: bool = False,
    precision: Precision = "auto",
    eps: float = 1e-8,
    row_damping: float = 0.0,
    rows: Rows = WHOLE,
    how: Execution = EAGER,
) -> Tensor:
    """polar(D(M) M) for `momentum` [..., m, n].

    >>> import torch
    >>> row_then_spectral(torch.tensor([[5.0, 0.0], [0.0, 1e-6]]))
    tensor([[1., 0.],
            [0., 1.]])
    """

    def rule(x: Tensor) -> Tensor:
        units = unit_rows(x, eps=eps, damping=row_damping, rows=rows, dtype=momentum.dtype)
        if centered:
            units = project(units, rows=rows, dtype=momentum.dtype)
        return polar(units, precision=precision, as_dtype=momentum.dtype, rows=rows, how=how)

    return on_quotient(rule, momentum, centered=centered, precision=precision, rows=rows)


RULE = Rule(
    name="row_then_spectral",
    function=row_then_spectral,
    equation="polar(D(M) M)",
    group="S_m × O(n)",
    kind="spectral",
    scales=SPECTRAL_SCALES | {"row_nuclear"},
    damped=True,
    source="arXiv:2605.18106",
)
