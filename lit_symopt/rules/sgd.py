r"""The momentum itself.

    U = M

Commutes with every rotation, O(m) × O(n), because it does nothing: the baseline of all rules, and the only one whose
step is not invariant to the scale of the gradient. Row shards add up nothing.
"""

from __future__ import annotations

from torch import Tensor

from lit_symopt.linalg import EAGER, WHOLE, Execution, Precision, Rows
from lit_symopt.rules.centering import on_quotient
from lit_symopt.rules.rule import Rule


def sgd(
    momentum: Tensor,
    *,
    centered: bool = False,
    precision: Precision = "auto",
    eps: float = 1e-8,
    row_damping: float = 0.0,
    rows: Rows = WHOLE,
    how: Execution = EAGER,
) -> Tensor:
    """A copy of `momentum` [..., m, n], or ΠM if `centered`.

    >>> import torch
    >>> sgd(torch.tensor([[1.0], [3.0]]), centered=True)
    tensor([[-1.],
            [ 1.]])
    """
    return on_quotient(lambda x: x.clone(), momentum, centered=centered, precision=precision, rows=rows)


RULE = Rule(
    name="sgd",
    function=sgd,
    equation="M",
    group="O(m) × O(n)",
    kind="coordinate",
    scales=frozenset({"none"}),
    source="Robbins and Monro 1951",
)
