r"""Rows to norm one, then singular values to one.

    U = polar(D(M) M),   centered: U = Π polar(Π D(ΠM) ΠM)

The row scaling takes the magnitudes of the units out before the spectrum is flattened, so that a rare unit has the same
say as a frequent one: S_m × O(n). Row scaling leaves the quotient by the shift, hence the projection in the middle.

Source: Lau and Su 2026, arXiv:2605.18106 (hybrid rules).
"""

from __future__ import annotations

from torch import Tensor

from lit_symopt.linalg import Precision, polar
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
) -> Tensor:
    """polar(D(M) M) for `momentum` [..., m, n].

    >>> import torch
    >>> row_then_spectral(torch.tensor([[5.0, 0.0], [0.0, 1e-6]]))
    tensor([[1., 0.],
            [0., 1.]])
    """

    def rule(x: Tensor) -> Tensor:
        rows = unit_rows(x, eps=eps, damping=row_damping)
        return polar(project(rows) if centered else rows, precision=precision, as_dtype=momentum.dtype)

    return on_quotient(rule, momentum, centered=centered, precision=precision)


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
