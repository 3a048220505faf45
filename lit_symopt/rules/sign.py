r"""The sign of every entry.

    U = sign(M)

Commutes with signed permutations of the coordinates only: right for vectors, wrong for matrices, whose bases are free.
It is the steepest descent of Scion's last layer, in the norm that is the largest entry. Row shards add up nothing.

Sources: Bernstein et al. 2018, arXiv:1802.04434 (signSGD); Pethick et al. 2025, arXiv:2502.07529 (Scion).
"""

from __future__ import annotations

from torch import Tensor

from lit_symopt.linalg import EAGER, WHOLE, Execution, Precision, Rows
from lit_symopt.rules.centering import on_quotient
from lit_symopt.rules.rule import Rule


def sign(
    momentum: Tensor,
    *,
    centered: bool = False,
    precision: Precision = "auto",
    eps: float = 1e-8,
    row_damping: float = 0.0,
    rows: Rows = WHOLE,
    how: Execution = EAGER,
) -> Tensor:
    """sign(M) for `momentum` [..., m, n], with sign(0) = 0, or Π sign(ΠM) if `centered`.

    >>> import torch
    >>> sign(torch.tensor([[2.0, -1e-30, 0.0]]))
    tensor([[ 1., -1.,  0.]])
    """
    return on_quotient(lambda x: x.sign(), momentum, centered=centered, precision=precision, rows=rows)


RULE = Rule(
    name="sign",
    function=sign,
    equation="sign(M)",
    group="signed permutations",
    kind="coordinate",
    scales=frozenset({"none", "inverse_fan_in"}),
    source="arXiv:1802.04434; arXiv:2502.07529",
)
