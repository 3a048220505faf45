r"""The polar factor by matrix products alone: iterations of Newton-Schulz type.

Every step applies an odd quintic p(σ) = a σ + b σ³ + c σ⁵ to the singular values (see `coefficients`), either to the
matrix itself or, in *Gram form*, to the small side only:

    on X:     A = XᵀX,   X ← a X + X (b A + c A²)          (m < n: A = XXᵀ, X ← a X + (b A + c A²) X)
    on G:     P = a I + b G + c G²,   Q ← Q P,   G ← P G P,   and at last   polar(M) = M Q

On X every step renews the Gram matrix of the rounded X, so that errors do not pile up: the form for bfloat16. In Gram
form the large side is touched twice in all, but Q approximates (MᵀM)^{-1/2}, whose condition is that of M squared: the
form for float64.

Sources: Björck and Bowie 1971; Higham 2008, "Functions of Matrices", chapter 8; the quintic on X: Jordan et al. 2024
(Muon); the choice of coefficients: arXiv:2505.16932 (Polar Express).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_symopt.linalg.coefficients import Quintic, polar_express

# m rows, n columns with m >= n, ... any batch

GRAM_LOWER = 4e-5
"""Promised are σ ≥ 1e-4 σ₁; σ₁ is estimated from above by at most n^{1/16}, below 2.5 up to n = 10⁶."""
GRAM_STEPS = 9
"""max |1 - p(σ)| over [GRAM_LOWER, 1] is below 1e-6 after nine steps (tested)."""
FILTER = 1.5e-6
"""Half width d of the null-space filter, relative to σ₁: between rounding (1e-7) and what is promised (1e-4)."""
SAFETY = 1.01
"""Room for the rounding of bfloat16 above σ = 1 (arXiv:2505.16932, section 3.4)."""


def iterate(x: Tensor, quintics: Sequence[Quintic]) -> Tensor:
    """Apply `quintics` to the singular values of `x` [..., m, n] through its smaller side, in the dtype of `x`.

    The first Gram matrix also gives the scale: ‖XᵀX‖_F^{1/2}, the Schatten-4 norm, bounds σ₁ from above by a factor of
    at most min(m, n)^{1/4}; the Frobenius norm of X, which is the usual choice, only by min(m, n)^{1/2}.
    """
    shape, tall = x.shape, x.shape[-2] >= x.shape[-1]
    x = x.reshape(-1, *shape[-2:])
    gram = _gram(x, tall=tall)
    norm_dtype = torch.promote_types(x.dtype, torch.float32)
    bound = SAFETY * torch.linalg.matrix_norm(gram, dtype=norm_dtype, keepdim=True).sqrt()
    bound = torch.where(bound > 0, bound, 1)
    x, gram = (x / bound).to(x.dtype), (gram / bound.square()).to(x.dtype)
    for step, (a, b, c) in enumerate(quintics):
        if step > 0:
            gram = _gram(x, tall=tall)
        # Sum and product in one call: at these sizes reading a matrix once more costs as much as multiplying it.
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, p, beta=a) if tall else torch.baddbmm(x, p, x, beta=a)
    return x.view(shape)


def _gram(x: Tensor, *, tall: bool) -> Tensor:
    return x.mT @ x if tall else x @ x.mT


def inverse_root_iteration(gram: Tensor) -> Tensor:
    """The inverse square root of a float64 Gram matrix [..., n, n] with its null space filtered out.

    Polynomials cannot cut sharply: they would lift σ = 1e-7 σ₁, the rounding of float32 entries, to about 1e-2. The
    factor (G (G + d²)^{-1})² is 1 - 2 (d/σ)² where σ ≫ d and (σ/d)⁴ where σ ≪ d, for one Cholesky factorization.
    """
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    squared = gram @ gram
    bound = torch.linalg.matrix_norm(squared @ squared, keepdim=True).pow(1 / 4)  # Schatten-16 norm of M, squared
    gram = gram / torch.where(bound > 0, bound, 1)

    factor, _ = torch.linalg.cholesky_ex(gram + FILTER**2 * identity)
    keep = torch.cholesky_solve(gram, factor)

    root = identity
    for a, b, c in polar_express(lower=GRAM_LOWER, steps=GRAM_STEPS):
        p = a * identity + b * gram + c * gram @ gram
        root, gram = root @ p, p @ gram @ p
    return root @ keep @ keep / torch.where(bound > 0, bound, 1).sqrt()
