r"""Every singular value to one.

    U = polar(M) = M (MᵀM)^{-1/2}

Rows and columns both have free bases: the rule commutes with O(m) × O(n). `right_spectral` and `left_spectral` are the
same map and call this function; they exist because a role names the side whose Gram matrix is its own (d × d for
S_V × O(d), E × E for S_E × O(d)), which is the side a sharded update exchanges. On one device the smaller side is
always taken: its Gram matrix is accumulated and inverted in float64, so the larger, singular one could not be more
accurate, only slower.

Row shards add up the n(n+1)/2 numbers of the Gram matrix of the columns.

Sources: Jordan et al. 2024 (Muon), https://kellerjordan.github.io/posts/muon/; Lau and Su 2026, arXiv:2605.18106.
"""

from __future__ import annotations

from torch import Tensor

from lit_symopt.linalg import EAGER, WHOLE, Execution, Precision, Rows, polar
from lit_symopt.rules.centering import on_quotient
from lit_symopt.rules.rule import SPECTRAL_SCALES, Rule


def spectral(
    momentum: Tensor,
    *,
    centered: bool = False,
    precision: Precision = "auto",
    eps: float = 1e-8,
    row_damping: float = 0.0,
    rows: Rows = WHOLE,
    how: Execution = EAGER,
) -> Tensor:
    """polar(M) for `momentum` [..., m, n], or Π polar(ΠM) if `centered`. `eps` and `row_damping` have no meaning here.

    >>> import torch
    >>> spectral(torch.tensor([[0.0, 3.0], [-2.0, 0.0]]), precision="exact")
    tensor([[ 0.,  1.],
            [-1.,  0.]])
    """
    if not centered and rows.whole:
        return polar(momentum, precision=precision, how=how)  # which chooses its own working dtype
    return on_quotient(
        lambda x: polar(x, precision=precision, as_dtype=momentum.dtype, rows=rows, how=how),
        momentum,
        centered=centered,
        precision=precision,
        rows=rows,
    )


RULE = Rule(
    name="spectral",
    function=spectral,
    equation="polar(M) = M (MᵀM)^{-1/2}",
    group="O(m) × O(n)",
    kind="spectral",
    scales=SPECTRAL_SCALES,
    source="arXiv:2605.18106; Jordan et al. 2024",
)
