r"""A matrix times its own transpose, of which only one half has to be computed.

    A = X Xᵀ        or XᵀX        (`symmetric_product`)
    P = b A + c A²                (`symmetric_polynomial`: A² = A Aᵀ, because A is symmetric)

Both are out = α·X Xᵀ + β·C with a symmetric C. Of the T × T square tiles of the output, only the T(T+1)/2 on and above
the diagonal are computed; the program of tile (i, j) also writes its transpose to (j, i). What lies below the diagonal
is therefore the same bits as what lies above it, on the tiles of the diagonal too. C is read above the diagonal alone.

Sums are in float32 whatever the dtype of X. Half of the 2m²k operations of a product are done, plus those of T half
tiles: a share of (T+1)/2T.

Sources: half of a product for symmetric results is BLAS's SYRK (Dongarra et al. 1990, "A set of level 3 basic linear
algebra subprograms"); half of the tiles and their mirror in one Triton kernel for Newton-Schulz, microsoft/dion
(`dion/newton_schulz_triton.py`), which launches all T² programs and lets the others return. Tiling and pipelining of
the product follow the matrix multiplication tutorial of Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lit_symopt.linalg.kernels.load import (
    SAME,
    Tuning,
    bucket,
    interpreted,
    kernels,
    names_of,
    refuse_unless,
    require,
    tuned,
)

if TYPE_CHECKING:
    import triton.language as tl

# B matrices of a batch, m x k each; the output is m x m

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Products = Literal["ieee", "tf32"]
"""How float32 entries are multiplied: exactly, or rounded to 10 bits on tensor cores. Half precision is exact."""

KEY = ("m_bucket", "k_bucket", "batch_bucket")
TUNINGS = (
    Tuning(blocks={"BLOCK": 128}, warps=8, stages=3),
    Tuning(blocks={"BLOCK": 64}, warps=4, stages=4),
)
"""For H100: large tiles for large matrices, small ones where there would be too few for all multiprocessors. Both add
up in blocks of the same depth, so that which of them wins should not decide the order of a sum."""


def _symmetric_product(
    x: tl.tensor,
    added: tl.tensor,
    out: tl.tensor,
    m: tl.tensor,
    k: tl.tensor,
    x_matrix: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    added_matrix: tl.tensor,
    added_row: tl.tensor,
    added_column: tl.tensor,
    alpha: tl.tensor,
    beta: tl.tensor,
    m_bucket: tl.tensor,
    k_bucket: tl.tensor,
    batch_bucket: tl.tensor,
    PRODUCTS: tl.constexpr,
    WIDEN: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    tiles = tl.cdiv(m, BLOCK)
    of_matrix = tiles * (tiles + 1) // 2
    program = tl.program_id(0)
    matrix = (program // of_matrix).to(tl.int64)
    tile = program % of_matrix
    # Tile j(j+1)/2 + i is (i, j), i <= j. The root is rounded: one too many or too few is put right.
    j = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > tile, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= tile, j + 1, j)
    i = tile - j * (j + 1) // 2

    rows = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    columns = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inner = tl.arange(0, DEPTH)
    left = x + matrix * x_matrix + rows[:, None] * x_row + inner[None, :] * x_column
    right = x + matrix * x_matrix + columns[None, :] * x_row + inner[:, None] * x_column
    sums = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for step in range(tl.cdiv(k, DEPTH)):
        remaining = k - step * DEPTH
        a = tl.load(left, mask=(rows[:, None] < m) & (inner[None, :] < remaining), other=0.0)
        b = tl.load(right, mask=(columns[None, :] < m) & (inner[:, None] < remaining), other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision=PRODUCTS)
        left += DEPTH * x_column
        right += DEPTH * x_column

    above = (rows[:, None] <= columns[None, :]) & (columns[None, :] < m)
    value = alpha * sums
    if added is not None:
        at = added + matrix * added_matrix + rows[:, None] * added_row + columns[None, :] * added_column
        value += beta * tl.load(at, mask=above, other=0.0).to(tl.float32)
    value = value.to(out.dtype.element_ty)
    base = out + matrix * m * m
    tl.store(base + rows[:, None] * m + columns[None, :], value, mask=above)
    below = (columns[:, None] > rows[None, :]) & (columns[:, None] < m)
    tl.store(base + columns[:, None] * m + rows[None, :], tl.trans(value), mask=below)


@cache
def _kernel() -> Any:
    (kernel,) = kernels(globals(), "_symmetric_product")
    return tuned(kernel, TUNINGS, key=KEY, when_interpreted=Tuning(blocks={"BLOCK": 16}))


def symmetric_product(
    x: Tensor,
    *,
    transpose: bool = False,
    out_dtype: torch.dtype | None = None,
    products: Products = "ieee",
    out: Tensor | None = None,
) -> Tensor:
    """X Xᵀ of each matrix of `x` [..., m, n], or XᵀX if `transpose`: [..., m, m] or [..., n, n], bitwise symmetric.

    Args:
        x: bfloat16, float16 or float32, of any strides; a batch whose dimensions are not one stride apart is copied.
        transpose: multiply from the other side; nothing is transposed in memory.
        out_dtype: of the result, default that of `x`; sums are in float32 in any case.
        products: `tf32` rounds float32 entries first; no effect on half precision.
        out: contiguous, where to write the result.

    Raises:
        ConfigError: for another dtype, an `out` that does not fit, and where kernels do not run (see `require`).
    """
    x = x.mT if transpose else x
    return _launch("symmetric_product", x, None, alpha=1.0, beta=0.0, out_dtype=out_dtype, products=products, out=out)


def symmetric_polynomial(
    gram: Tensor, *, b: float, c: float, products: Products = "ieee", out: Tensor | None = None
) -> Tensor:
    """b A + c A² of each symmetric matrix A of `gram` [..., m, m], bitwise symmetric, in the dtype of `gram`.

    Args:
        gram: symmetric, as `symmetric_product` gives them; that it is so is not checked. Not written.
        b, c: coefficients.
        products, out: as of `symmetric_product`.

    Raises:
        ConfigError: as `symmetric_product`, and for matrices that are not square.
    """
    refuse_unless(
        gram.ndim >= 2 and gram.shape[-1] == gram.shape[-2],
        "symmetric_polynomial",
        f"needs square matrices, got shape {tuple(gram.shape)}; pass X Xᵀ or XᵀX",
    )
    return _launch("symmetric_polynomial", gram, gram, alpha=c, beta=b, out_dtype=None, products=products, out=out)


def _launch(
    name: str,
    x: Tensor,
    added: Tensor | None,
    *,
    alpha: float,
    beta: float,
    out_dtype: torch.dtype | None,
    products: Products,
    out: Tensor | None,
) -> Tensor:
    require(x.device.type)
    check_matrices(name, x)
    batch = as_batch(x)
    count, m, k = batch.shape
    out = result_in(name, out, (*x.shape[:-1], m), like=x, dtype=out_dtype or x.dtype)
    if not out.numel():
        return out
    last = batch if added is not None else None

    def grid(meta: dict[str, int]) -> tuple[int]:
        tiles = -(-m // meta["BLOCK"])
        return (count * tiles * (tiles + 1) // 2,)

    with torch.cuda.device_of(x):
        _kernel()[grid](
            batch,
            last,
            out.detach(),
            m,
            k,
            *batch.stride(),
            *(batch.stride() if last is not None else (0, 0, 0)),
            float(alpha),
            float(beta),
            bucket(m),
            bucket(k),
            bucket(count),
            PRODUCTS=products,
            WIDEN=widen(x.dtype),
            DEPTH=depth(x.dtype),
            **SAME,
        )
    return out


def check_matrices(name: str, x: Tensor) -> None:
    """Refuse what is not a batch of matrices of a dtype that is multiplied with sums in float32."""
    refuse_unless(x.ndim >= 2, name, f"needs matrices [..., m, n], got shape {tuple(x.shape)}")
    refuse_unless(x.dtype in DTYPES, name, f"takes {names_of(DTYPES)}, got {names_of([x.dtype])}; convert it")


def as_batch(x: Tensor) -> Tensor:
    """[..., m, n] as [B, m, n]: a view where the dimensions of the batch allow, else a copy."""
    return x.detach().reshape(x.shape[:-2].numel(), *x.shape[-2:])


def result_in(
    name: str,
    out: Tensor | None,
    shape: tuple[int, ...],
    *,
    like: Tensor,
    dtype: torch.dtype,
    read: Sequence[Tensor] = (),
) -> Tensor:
    """`out`, if it fits and shares no memory with `like` and what else is `read`, or a new contiguous tensor."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=like.device)
    refuse_unless(
        tuple(out.shape) == shape and out.dtype == dtype and out.device == like.device and out.is_contiguous(),
        name,
        f"out must be contiguous {names_of([dtype])} {shape} on {like.device}, got {names_of([out.dtype])} "
        f"{tuple(out.shape)} on {out.device}",
    )
    refuse_unless(
        not any(_overlap(out, tensor) for tensor in (like, *read)),
        name,
        "out shares memory with what is read; pass another tensor",
    )
    return out


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the addresses between first and last entry of two tensors have some in common."""
    (first, end), (other_first, other_end) = _addresses(a), _addresses(b)
    return first < other_end and other_first < end


def _addresses(tensor: Tensor) -> tuple[int, int]:
    if not tensor.numel():
        return 0, 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.element_size()


def depth(dtype: torch.dtype) -> int:
    """How many columns of X a program multiplies at once: 128 bytes of a row."""
    return 128 // dtype.itemsize


def widen(dtype: torch.dtype) -> bool:
    """Whether entries are converted to float32 first: the interpreter multiplies the bits of bfloat16 as integers."""
    return dtype == torch.bfloat16 and interpreted()
