r"""One step of a Newton-Schulz iteration in three launches.

    A = X Xᵀ,   P = b A + c A²,   X' = a X + P X        (rows: the smaller side of a wide X)
    A = XᵀX,    P = b A + c A²,   X' = a X + X P        (columns: that of a tall one, `transpose`)

which applies a σ + b σ³ + c σ⁵ to the singular values. The first two launches are symmetric: half of the products. The
third adds a X in float32 before it rounds, so that X is read and written once; a·I inside P would save reading it, at
the price of rounding a to the dtype of P. From the other side it is the same launch on transposed views.

With the short side m and the long side n a step does about 3m²n + m³ operations in place of 4m²n + 2m³.

Sources: the iteration, Jordan et al. 2024, "Muon"; coefficients: `lit_symopt.linalg.coefficients`; three launches, as
in microsoft/dion (`dion/newton_schulz_triton.py`). Order of the tiles so that neighbors share what lies in the cache:
the matrix multiplication tutorial of Triton.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_symopt.linalg.coefficients import Quintic
from lit_symopt.linalg.kernels.load import SAME, Tuning, bucket, kernels, names_of, refuse_unless, require, tuned
from lit_symopt.linalg.kernels.symmetric_product import (
    Products,
    as_batch,
    check_matrices,
    depth,
    result_in,
    symmetric_polynomial,
    symmetric_product,
    widen,
)

if TYPE_CHECKING:
    import triton.language as tl

# B matrices of a batch, m x n each, m the side of P

KEY = ("m_bucket", "n_bucket", "batch_bucket")
TUNINGS = (
    Tuning(blocks={"ROWS": 128, "COLUMNS": 256}, warps=8, stages=3),
    Tuning(blocks={"ROWS": 128, "COLUMNS": 128}, warps=8, stages=3),
    Tuning(blocks={"ROWS": 64, "COLUMNS": 128}, warps=4, stages=4),
    Tuning(blocks={"ROWS": 64, "COLUMNS": 64}, warps=4, stages=4),
)
"""For H100; all add up in blocks of the same depth (see `symmetric_product`)."""

GROUP = 8
"""Tiles of this many rows are computed column by column: what they read of P stays in the cache."""


def _scaled_add_product(
    p: tl.tensor,
    x: tl.tensor,
    out: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    p_matrix: tl.tensor,
    p_row: tl.tensor,
    p_column: tl.tensor,
    x_matrix: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    out_matrix: tl.tensor,
    out_row: tl.tensor,
    out_column: tl.tensor,
    a: tl.tensor,
    m_bucket: tl.tensor,
    n_bucket: tl.tensor,
    batch_bucket: tl.tensor,
    PRODUCTS: tl.constexpr,
    WIDEN: tl.constexpr,
    GROUP: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    down, across = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
    program = tl.program_id(0)
    matrix = (program // (down * across)).to(tl.int64)
    tile = program % (down * across)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    i = first + tile % (GROUP * across) % height
    j = tile % (GROUP * across) // height

    rows = (i * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = (j * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inner = tl.arange(0, DEPTH)
    left = p + matrix * p_matrix + rows[:, None] * p_row + inner[None, :] * p_column
    right = x + matrix * x_matrix + inner[:, None] * x_row + columns[None, :] * x_column
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(tl.cdiv(m, DEPTH)):
        remaining = m - step * DEPTH
        u = tl.load(left, mask=(rows[:, None] < m) & (inner[None, :] < remaining), other=0.0)
        v = tl.load(right, mask=(inner[:, None] < remaining) & (columns[None, :] < n), other=0.0)
        if WIDEN:
            u = u.to(tl.float32)
            v = v.to(tl.float32)
        sums = tl.dot(u, v, sums, input_precision=PRODUCTS)
        left += DEPTH * p_column
        right += DEPTH * x_row

    inside = (rows[:, None] < m) & (columns[None, :] < n)
    at = x + matrix * x_matrix + rows[:, None] * x_row + columns[None, :] * x_column
    sums += a * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    to = out + matrix * out_matrix + rows[:, None] * out_row + columns[None, :] * out_column
    tl.store(to, sums.to(out.dtype.element_ty), mask=inside)


@cache
def _kernel() -> Any:
    (kernel,) = kernels(globals(), "_scaled_add_product")
    return tuned(kernel, TUNINGS, key=KEY, when_interpreted=Tuning(blocks={"ROWS": 16, "COLUMNS": 32}))


def scaled_add_product(
    x: Tensor,
    p: Tensor,
    *,
    a: float,
    transpose: bool = False,
    products: Products = "ieee",
    out: Tensor | None = None,
) -> Tensor:
    """a X + P X of each matrix of `x` [..., m, n], or a X + X P if `transpose`; in the dtype of `x`, rounded once.

    Args:
        x: bfloat16, float16 or float32, of any strides; a batch whose dimensions are not one stride apart is copied.
        p: *symmetric* matrices [..., m, m], or [..., n, n] if `transpose`, of the dtype of `x`.
        a: coefficient.
        transpose, products: as of `symmetric_product`.
        out: contiguous, where to write the result; not `x` itself, which other tiles still read.

    Raises:
        ConfigError: for a P that does not fit, and as `symmetric_product`.
    """
    name = "scaled_add_product"
    require(x.device.type)
    check_matrices(name, x)
    side = x.shape[-1] if transpose else x.shape[-2]
    refuse_unless(
        p.shape == (*x.shape[:-2], side, side) and p.dtype == x.dtype and p.device == x.device,
        name,
        f"p must be {names_of([x.dtype])} {(*x.shape[:-2], side, side)} on {x.device}, got {names_of([p.dtype])} "
        f"{tuple(p.shape)} on {p.device}",
    )
    result = result_in(name, out, tuple(x.shape), like=x, dtype=x.dtype, read=[p])
    if not result.numel():
        return result
    batch, left, to = as_batch(x), as_batch(p), as_batch(result)
    if transpose:  # (a X + X P)ᵀ = a Xᵀ + P Xᵀ
        batch, to = batch.mT, to.mT
    count, m, n = batch.shape

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (count * -(-m // meta["ROWS"]) * -(-n // meta["COLUMNS"]),)

    with torch.cuda.device_of(x):
        _kernel()[grid](
            left,
            batch,
            to,
            m,
            n,
            *left.stride(),
            *batch.stride(),
            *to.stride(),
            float(a),
            bucket(m),
            bucket(n),
            bucket(count),
            PRODUCTS=products,
            WIDEN=widen(x.dtype),
            GROUP=GROUP,
            DEPTH=depth(x.dtype),
            **SAME,
        )
    return result


def quintic_step(
    x: Tensor,
    quintic: Quintic,
    *,
    gram: Tensor | None = None,
    transpose: bool | None = None,
    products: Products = "ieee",
    out: Tensor | None = None,
) -> Tensor:
    """a σ + b σ³ + c σ⁵ of the singular values σ of each matrix of `x` [..., m, n], in the dtype of `x`.

    Args:
        x: as of `symmetric_product`.
        quintic: the coefficients a, b, c.
        gram: X Xᵀ, or XᵀX if `transpose`, if it is known already: one launch less.
        transpose: multiply from the right, by matrices n x n; default: from the side that is smaller.
        products, out: as of `scaled_add_product`.

    Raises:
        ConfigError: as `symmetric_product` and `scaled_add_product`.
    """
    a, b, c = quintic
    if transpose is None:
        transpose = x.ndim >= 2 and x.shape[-2] > x.shape[-1]
    if gram is None:
        gram = symmetric_product(x, transpose=transpose, products=products)
    p = symmetric_polynomial(gram, b=b, c=c, products=products)
    return scaled_add_product(x, p, a=a, transpose=transpose, products=products, out=out)
