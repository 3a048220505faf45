r"""The polar factor by matrix products alone: iterations of Newton-Schulz type.

Every step applies an odd quintic p(σ) = a σ + b σ³ + c σ⁵ to the singular values (see `coefficients`), either to the
matrix itself, which is the *plain* form, or, in *Gram form*, to the small side only:

    on X:     G = XᵀX,   X ← a X + X (b G + c G²)          (m < n: G = XXᵀ, X ← a X + (b G + c G²) X)
    on G:     P = a I + b G + c G²,   Q ← Q P,   G ← P G P,   and at last   X ← X Q

On X every step renews the Gram matrix of the rounded X, so that errors do not pile up. On G the large side is touched
twice in all, but σ is known to the rounding of σ² only: in float64 that is enough for all nine steps, in bfloat16
(2⁻⁹) for two, after which X ← X Q and its Gram matrix is renewed (a *restart*). How many steps lie between restarts is
a `Form`; which one is the cheaper is up to the shape (`forms.choose_form`).

A form is made of three products (`Products`): a Gram matrix, a polynomial of it, and a matrix times a polynomial.
`PYTORCH` calls those of torch; another backend is an object with the same three methods. All write into buffers that
are borrowed once (`scratch_bytes`), and nothing large is allocated between them.

Sources: Björck and Bowie 1971; Higham 2008, "Functions of Matrices", chapter 8; the quintic on X: Jordan et al. 2024
(Muon); the choice of coefficients: arXiv:2505.16932 (Polar Express); the Gram form in half precision with restarts:
the package gram-newton-schulz (Dao-AILab), which restarts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lit_symopt.linalg.coefficients import Quintic, polar_express
from lit_symopt.linalg.forms import Form, plain
from lit_symopt.scratch import FRESH, Scratch

# K matrices of a batch, m rows, n columns, s = min(m, n)

GRAM_LOWER = 4e-5
"""Promised are σ ≥ 1e-4 σ₁; σ₁ is estimated from above by at most n^{1/16}, below 2.5 up to n = 10⁶."""
GRAM_STEPS = 9
"""max |1 - p(σ)| over [GRAM_LOWER, 1] is below 1e-6 after nine steps (tested)."""
FILTER = 1.5e-6
"""Half width d of the null-space filter, relative to σ₁: between rounding (1e-7) and what is promised (1e-4)."""
SAFETY = 1.01
"""Room for the rounding of bfloat16 above σ = 1 (arXiv:2505.16932, section 3.4)."""

_LEAST, _LEAST_HALF = 1e-18, 2.0**-7
"""Stand for the norm of a zero matrix: the squares of their inverses are numbers of float32, of float16.

In float16 every other norm is larger: that of matrices with a Frobenius norm of 0.5 or more, up to a side of 2²⁴.
"""


class Products(Protocol):
    """The three products of an iteration, on batches [K, ., .] of one dtype; each writes all of `out`.

    No `out` shares memory with an argument, and every polynomial is symmetric up to rounding. Matrices that are read
    keep their numbers, except `p` of `multiply`.
    """

    def gram(self, x: Tensor, *, tall: bool, out: Tensor) -> None:
        """XᵀX if `tall`, else XXᵀ."""

    def polynomial(self, gram: Tensor, *, a: float, b: float, c: float, out: Tensor) -> None:
        """a I + b G + c G²; without the identity if `a` is 0."""

    def multiply(self, x: Tensor, p: Tensor, *, a: float, tall: bool, out: Tensor) -> None:
        """a X + X P if `tall`, else a X + P X; X P or P X if `a` is 0. Of `a` other than 0, `p` may be overwritten."""


class PyTorchProducts:
    """The products as PyTorch computes them.

    Symmetric ones are computed in full: three of four blocks by three or two calls took longer than one call for all
    four on a CPU, at sides of 128 and 256.
    """

    def gram(self, x: Tensor, *, tall: bool, out: Tensor) -> None:
        """`Products.gram`."""
        torch.bmm(x.mT, x, out=out) if tall else torch.bmm(x, x.mT, out=out)

    def polynomial(self, gram: Tensor, *, a: float, b: float, c: float, out: Tensor) -> None:
        """`Products.polynomial`; a I is added after the sum was rounded."""
        # Sum and product in one call: at these sizes reading a matrix once more costs as much as multiplying it.
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=out)
        if a:
            out.diagonal(dim1=-2, dim2=-1).add_(a)

    def multiply(self, x: Tensor, p: Tensor, *, a: float, tall: bool, out: Tensor) -> None:
        """`Products.multiply`; a X as a I in P, which is rounded once more, but X need not be copied and read again."""
        if a:
            p.diagonal(dim1=-2, dim2=-1).add_(a)
        torch.bmm(x, p, out=out) if tall else torch.bmm(p, x, out=out)


PYTORCH = PyTorchProducts()


@torch.no_grad()
def iterate(
    x: Tensor,
    quintics: Sequence[Quintic],
    *,
    form: Form | None = None,
    products: Products = PYTORCH,
    scratch: Scratch = FRESH,
    overwrite: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Apply `quintics` to the singular values of `x` [..., m, n] through its smaller side, in the dtype of `x`.

    Squares of entries must neither overflow nor vanish; in float16 let the Frobenius norm be between 0.5 and 1. A zero
    matrix gives zeros, one with an entry that is not finite gives NaN.

    Args:
        x: [..., m, n] of any floating dtype.
        quintics: one a step; those of Polar Express with a safety of 1.05 or more in bfloat16 (see `forms`).
        form: how many steps lie between restarts; default: on X in every step, whatever the shape.
        products: what computes them.
        scratch: where `scratch_bytes` a matrix are borrowed, those of the result among them without `out`.
        overwrite: `x`, which must then be contiguous, may hold anything afterwards, the result for one.
        out: contiguous, of the shape and dtype of `x`, sharing no memory with it; the result is written there.

    Returns:
        `out`, or else `x` or memory of `scratch`.
    """
    if not overwrite:
        x = scratch.like(x).copy_(x)
    batch = x.view(-1, *x.shape[-2:])
    gram = gram_buffer(batch, scratch)
    norm = gram_and_norm(batch, gram, products)
    return iterate_from(
        batch,
        gram,
        norm,
        quintics,
        form=plain(len(quintics)) if form is None else form,
        products=products,
        scratch=scratch,
        out=None if out is None else out.view(batch.shape),
    ).view(x.shape)


def is_tall(x: Tensor) -> bool:
    """Whether the columns of [..., m, n] count as the smaller side; not of a square matrix, for which XXᵀ is faster."""
    return x.shape[-2] > x.shape[-1]


def gram_buffer(x: Tensor, scratch: Scratch) -> Tensor:
    """Memory for the Gram matrices of a batch [K, m, n]."""
    side = min(x.shape[-2:])
    return scratch.empty((x.shape[0], side, side), dtype=x.dtype, device=x.device)


def gram_and_norm(x: Tensor, gram: Tensor, products: Products = PYTORCH) -> Tensor:
    """Write the Gram matrices G of the smaller side of a batch [K, m, n] to `gram`; returns ‖G‖_F^{1/2} [K, 1, 1].

    That is the Schatten-4 norm of X, which bounds σ₁ from above by a factor of at most s^{1/4}; the Frobenius norm of
    X, which is the usual choice, only by s^{1/2}. Float32, or float64 for float64.
    """
    products.gram(x, tall=is_tall(x), out=gram)
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True, dtype=dtype)
    return norm.sqrt_()


def iterate_from(
    x: Tensor,
    gram: Tensor,
    norm: Tensor,
    quintics: Sequence[Quintic],
    *,
    form: Form,
    products: Products = PYTORCH,
    scratch: Scratch = FRESH,
    out: Tensor | None = None,
) -> Tensor:
    """`iterate` where the first Gram matrices and what bounds the singular values are known.

    Args:
        x: contiguous [K, m, n]; overwritten.
        gram: of `x`; overwritten.
        norm: [K, 1, 1], at least σ₁ of each.
        quintics: one a step.
        form: of as many steps.
        products, scratch, out: as of `iterate`.
    """
    tall = is_tall(x)
    # What is not finite stays so, and a zero matrix stays zero for any finite scale.
    scale = (norm * SAFETY).clamp_(min=_LEAST_HALF if x.dtype == torch.float16 else _LEAST).reciprocal_()
    gram.mul_(scale.square().to(x.dtype))
    scale = scale.to(x.dtype)
    if form[0] == 1:
        x.mul_(scale)

    spare = out if out is not None and len(form) % 2 else scratch.like(x)
    small = [scratch.like(gram) for _ in range(_buffers(form) - 1)]
    steps = iter(quintics)
    for restart, count in enumerate(form):
        if restart:
            products.gram(x, tall=tall, out=gram)
        segment = [next(steps) for _ in range(count)]
        to = out if out is not None and restart == len(form) - 1 else spare
        if count == 1:
            ((a, b, c),) = segment
            products.polynomial(gram, a=0.0, b=b, c=c, out=small[0])
            products.multiply(x, small[0], a=a, tall=tall, out=to)
        else:
            q = _polynomial_of_steps(gram, segment, products, small)
            if not restart:
                q.mul_(scale)  # in place of X, which is larger
            products.multiply(x, q, a=0.0, tall=tall, out=to)
        x, spare = to, x
    return x


def _polynomial_of_steps(
    gram: Tensor, quintics: Sequence[Quintic], products: Products, buffers: Sequence[Tensor]
) -> Tensor:
    """Q with p(X) = X Q for the composition p of two `quintics` or more; overwrites `gram` and `buffers`."""
    (a, b, c), *later = quintics
    q, other, *more = buffers
    products.polynomial(gram, a=a, b=b, c=c, out=q)
    p = q
    for left, (a, b, c) in zip(reversed(range(len(later))), later, strict=True):
        # G ← P G P by the rounded P that X will be multiplied by
        products.multiply(gram, p, a=0.0, tall=True, out=other)
        products.multiply(other, p, a=0.0, tall=True, out=gram)
        if left:
            p = more[0]
            products.polynomial(gram, a=a, b=b, c=c, out=p)
            products.multiply(q, p, a=0.0, tall=True, out=other)
            q, other = other, q
        else:
            products.polynomial(gram, a=a, b=b, c=c, out=other)
            products.multiply(q, other, a=0.0, tall=True, out=gram)
    return gram


def _buffers(form: Form) -> int:
    """How many s x s matrices a form needs at a time, the Gram matrix among them."""
    return min(max(form) + 1, 4)


def scratch_bytes(
    m: int, n: int, *, form: Form, dtype: torch.dtype = torch.bfloat16, overwrite: bool = False, out: bool = False
) -> int:
    """Bytes of scratch that `iterate` borrows for a matrix m x n.

    Args:
        m, n: of the matrix.
        form: that is asked for.
        dtype: of the products.
        overwrite: whether `x` may be overwritten.
        out: whether the result has memory of its own.

    Example:
        >>> scratch_bytes(512, 256, form=(1, 1, 1, 1, 1), overwrite=True) == 2 * (512 * 256 + 2 * 256 * 256)
        True
    """
    side = min(m, n)
    large = (not overwrite) + (not out or len(form) % 2 == 0)
    return dtype.itemsize * (large * m * n + _buffers(form) * side * side)


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
