r"""The polar factor by decomposition: the reference, and the cheapest way for small matrices.

With M = V diag(σ) Wᵀ and the kept singular values σ ≥ `CUT`·σ₁,

    polar(M) = Σ_kept vᵢ wᵢᵀ = M (MᵀM)^{-1/2},

where the inverse root is a pseudo-inverse: it is zero on the null space, so that a rank-deficient or a centered matrix
gives the polar factor of what it holds and not of its rounding errors. `CUT` lies above the rounding of float32
entries (at most about 1e-7 σ₁) and well below any spread that a float32 momentum can carry.

Source: Higham 2008, "Functions of Matrices", chapter 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

CUT = 3e-6
"""Singular values below CUT·σ₁ count as the null space."""

# m rows, n columns with m >= n, ... any batch


def inverse_root_svd(x: Tensor) -> Tensor:
    """The pseudo-inverse square root (MᵀM)^{-1/2} of `x` [..., m, n] by its singular values, never squaring them.

    M times this root, rather than V Wᵀ, because then a zero row of M gives a zero row, and a tiny one a row that is
    right relative to its own size.
    """
    _, sigma, vh = torch.linalg.svd(x, full_matrices=False)
    keep = (sigma >= CUT * sigma[..., :1]) & (sigma > 0)
    return _rebuild(vh.mT, torch.where(keep, sigma, 1).reciprocal() * keep)


def inverse_root_eigh(gram: Tensor) -> Tensor:
    """The pseudo-inverse square root G^{-1/2} of a Gram matrix [..., n, n] by its eigenvalues λ = σ².

    A Gram matrix squares the condition number, so `gram` has to be float64, accumulated in float64, for σ down to
    `CUT`·σ₁ to be told from rounding: λ/λ₁ = 9e-12 there.
    """
    eigenvalues, vectors = torch.linalg.eigh(gram)  # ascending
    keep = (eigenvalues >= CUT**2 * eigenvalues[..., -1:]) & (eigenvalues > 0)
    return _rebuild(vectors, torch.where(keep, eigenvalues, 1).rsqrt() * keep)


def _rebuild(vectors: Tensor, values: Tensor) -> Tensor:
    return (vectors * values.unsqueeze(-2)) @ vectors.mT
