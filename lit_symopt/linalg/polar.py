r"""The polar factor of a batch of matrices, in the precision asked for.

    polar(M) = M (MᵀM)^{-1/2} = (MMᵀ)^{-1/2} M = V Wᵀ   for M = V diag(σ) Wᵀ, over the singular values σ ≥ 3e-6 σ₁

| precision | method | where |
|---|---|---|
| `exact` | `svd`: singular value decomposition in float64 | everywhere; float64 matrices whatever the precision |
| `fp32` | `eigh`: the Gram matrix of the smaller side, accumulated and decomposed in float64 | CPU; side ≤ 256 |
| | `iteration`: the same Gram matrix, nine steps of Polar Express in float64 | accelerators, side > 256 |
| `bf16` | `bf16`: five steps of Polar Express in bfloat16, on the matrix or in Gram form (`forms`) | everywhere |
| `fp16` | `fp16`: the same in float16: three more bits and fewer operations (`low_precision`) | slow on a CPU |
| `tf32` | `tf32`: the same with float32 entries and products by TF32 units | on a CPU products of float32 |
| `auto` | that of `fp32` on a CPU, `bf16` on an accelerator | |

Errors ‖U - U_ref‖/‖U_ref‖ (Frobenius) against a float64 singular value decomposition of the same float32 matrix, upper
bounds that the tests check and `profiles/records/polar-accuracy` measures:

| spectrum | exact | fp32 `eigh` | fp32 `iteration` | `bf16` | `fp16`, `tf32` |
|---|---|---|---|---|---|
| Gaussian, m ≥ 2n | 1e-6 | 1e-6 | 1e-5 | 0.04 | 0.02 |
| Gaussian, square | 1e-6 | 1e-6 | 1e-2: some have a σ below 1e-4 σ₁ | 0.1 | 0.1 |
| σ log-uniform over 1e2 | 1e-6 | 1e-6 | 1e-5 | 0.06 | 0.02 |
| σ log-uniform over 1e3 | 1e-6 | 1e-6 | 1e-4 | 0.35 | 0.3 |
| σ log-uniform over 1e4 | 1e-6 | 1e-6 | 1e-3 | 0.6 | 0.6 |
| any within [1e-4, 1] | 1e-6 | 1e-6 | 1e-3 | 1 | 1 |
| rank 8 | 1e-6 | 1e-6 | 1e-3 | 1.2: the rounding to bfloat16 fills the null space | 0.2 |

`auto` has the errors of `eigh` on a CPU, because there it is not only more accurate but also faster than a float32
iteration on the matrix (see the record), and those of `bf16` on an accelerator. After five steps the directions
with σ ≥ 1e-2 σ₁ come out with singular values in [0.8, 1.05] (`fp16`, `tf32`: [0.95, 1.02]); smaller ones come out
smaller, which is why the error grows with the spread.

Of a matrix whose rows lie in several places the same Gram matrix is added up, and every place multiplies its rows by
the root: `eigh` and `iteration` can do that, where the smaller side are the columns.

There is no float32 matrix product in any method but `tf32`, so TF32 enters only where it is asked for. Only `svd` and
`eigh` synchronize with the host on an accelerator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_symopt.errors import ConfigError
from lit_symopt.linalg.decompose import inverse_root_eigh, inverse_root_svd
from lit_symopt.linalg.execution import EAGER, Execution
from lit_symopt.linalg.low_precision import DTYPES, LowPrecision, is_low_precision, peak, polar_by_quintics
from lit_symopt.linalg.newton_schulz import inverse_root_iteration
from lit_symopt.linalg.rows import WHOLE, Rows
from lit_symopt.scratch import Scratch

Precision = Literal["exact", "fp32", "tf32", "bf16", "fp16", "auto"]
Method = Literal["svd", "eigh", "iteration", "tf32", "bf16", "fp16"]

METHODS: Mapping[Method, str] = {
    "svd": "singular value decomposition in float64",
    "eigh": "eigenvalue decomposition of the Gram matrix in float64",
    "iteration": "nine steps on the Gram matrix in float64",
    "tf32": "five steps with products in TF32",
    "bf16": "five steps in bfloat16",
    "fp16": "five steps in float16",
}
"""Each in words."""

GRAM_METHODS: tuple[Method, ...] = ("eigh", "iteration")
"""The methods that look at the Gram matrix alone, and so work on row shards."""

DECOMPOSE_UP_TO = 256
"""Side of the largest Gram matrix that is decomposed on an accelerator, where decompositions are slow."""


@torch.no_grad()
def polar(
    x: Tensor,
    *,
    precision: Precision = "auto",
    as_dtype: torch.dtype | None = None,
    rows: Rows = WHOLE,
    how: Execution = EAGER,
) -> Tensor:
    """The polar factor of each matrix of `x` [..., m, n]: same shape, same dtype; `x` is not written.

    Invariant to the scale of `x`; a zero matrix gives zeros, one with an entry that is not finite gives NaN.

    Args:
        x: real matrices [..., m, n] of any floating dtype; the dimensions may be 0.
        precision: see the table of the module.
        as_dtype: compute `x` as if it were of this dtype. A float64 intermediate that stems from float32 data needs the
            promises of float32 only.
        rows: where the rows of each matrix lie. Shards exchange the upper triangle of one Gram matrix.
        how: by whose kernels `bf16`, and in whose memory it, `fp16` and `tf32` are computed; the result may lie in
            memory that it lends.

    Raises:
        ConfigError: for an unknown precision, for what is not a batch of real matrices, and for row shards of which a
            Gram matrix is not enough: all precisions but `fp32`, and `auto` on a CPU, need the whole matrix, and so
            does one with more columns than rows.

    >>> polar(torch.tensor([[0.0, 1e-20], [-3e-21, 0.0]]))
    tensor([[ 0.,  1.],
            [-1.,  0.]])
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ConfigError(f"polar needs real matrices [..., m, n], got {x.dtype} of shape {tuple(x.shape)}")
    m, n = rows.count(x), x.shape[-1]
    method = method_for(precision, dtype=as_dtype or x.dtype, device_type=x.device.type, side=min(m, n))
    if not rows.whole and (method not in GRAM_METHODS or n > m):
        raise ConfigError(
            f"row shards give the polar factor of an m x n matrix through its n x n Gram matrix, for n <= m and the "
            f"methods {' and '.join(GRAM_METHODS)}, not of {m} x {n} by {method!r} (precision {precision!r}, "
            f"{as_dtype or x.dtype} on {x.device.type}); put the matrix together, or choose precision 'fp32'"
        )
    return polar_by(method, x, rows=rows, how=how)


def method_for(precision: Precision, *, dtype: torch.dtype, device_type: str, side: int) -> Method:
    """How a matrix of this dtype, on this kind of device, with this smaller side, gets its polar factor."""
    if precision not in get_args(Precision):
        raise ConfigError(f"precision {precision!r} is not known; choose one of {', '.join(get_args(Precision))}")
    if precision == "exact" or dtype == torch.float64:
        return "svd"
    if is_low_precision(precision):
        return precision
    if precision == "auto" and device_type != "cpu":
        return "bf16"
    return "eigh" if device_type == "cpu" or side <= DECOMPOSE_UP_TO else "iteration"


def polar_by(method: Method, x: Tensor, *, rows: Rows = WHOLE, how: Execution = EAGER) -> Tensor:
    """The polar factor of each matrix of `x` [..., m, n] by a given method, through the smaller side.

    Row shards take one of `GRAM_METHODS`, and the side of the columns.
    """
    if rows.empty(x):
        return torch.empty_like(x)
    if not rows.whole:
        return _polar_of_shards(method, x, rows)
    if method == "bf16" and how.backend not in ("auto", "eager"):
        from lit_symopt.backends.polar import polar_by_backend

        return polar_by_backend(x, how)
    if is_low_precision(method):
        return _polar_by_quintics(method, x, how.scratch)
    if x.shape[-2] < x.shape[-1]:
        return _polar_of_tall(method, x.mT).mT.contiguous()
    return _polar_of_tall(method, x)


def inverse_root(gram: Tensor) -> Tensor:
    """G^{-1/2} of float64 Gram matrices [..., n, n] as `fp32` computes it, zero on the null space σ < 3e-6 σ₁.

    For an update whose rows lie in several places: add up their Gram matrices, then multiply each part by this root.

    >>> m = torch.tensor([[3.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
    >>> m @ inverse_root(m.mT @ m)
    tensor([[0.6000, 0.0000],
            [0.8000, 0.0000]], dtype=torch.float64)
    """
    if gram.dtype != torch.float64:
        raise ConfigError(f"a Gram matrix squares the condition number and must be float64, got {gram.dtype}")
    side = gram.shape[-1]
    method = method_for("fp32", dtype=torch.float32, device_type=gram.device.type, side=side)
    return inverse_root_eigh(gram) if method == "eigh" else inverse_root_iteration(gram)


def _polar_of_shards(method: Method, x: Tensor, rows: Rows) -> Tensor:
    work = x.to(torch.float64)
    # Squares of float32 numbers fit float64, so the peak of all rows need not be known before the Gram matrix is.
    gram = rows.gram(work)
    top = gram.diagonal(dim1=-2, dim2=-1).amax(dim=-1, keepdim=True).unsqueeze(-1)  # the largest column, squared
    finite = top.isfinite()
    unit = torch.where(finite & (top > 0), top, 1)
    gram = torch.where(finite, gram / unit, 0)
    root = inverse_root_eigh(gram) if method == "eigh" else inverse_root_iteration(gram)
    return rows.keep(torch.where(finite, work / unit.sqrt() @ root, torch.nan).to(x.dtype))


def _polar_by_quintics(method: LowPrecision, x: Tensor, scratch: Scratch) -> Tensor:
    if x.dtype == DTYPES[method]:
        return polar_by_quintics(x, method=method, scratch=scratch)
    result = scratch.like(x)
    with scratch.lend():
        return result.copy_(polar_by_quintics(x, method=method, scratch=scratch))


def _polar_of_tall(method: Method, x: Tensor) -> Tensor:
    work, largest = _safe(x.to(torch.float64))
    finite = largest.isfinite()
    work = torch.where(finite, work, 0)  # decompositions refuse it
    if method == "svd":
        u = work @ inverse_root_svd(work)
    elif method == "eigh":
        u = work @ inverse_root_eigh(work.mT @ work)
    else:
        u = work @ inverse_root_iteration(work.mT @ work)
    return torch.where(finite, u, torch.nan).to(x.dtype)


def _safe(work: Tensor) -> tuple[Tensor, Tensor]:
    """Each matrix divided by its largest entry, so that every square and product is safe; and that entry.

    It rounds, where a power of two would not, but at the working precision, which has digits to spare, and it needs no
    care for exponents out of range.
    """
    largest = peak(work)
    return work / torch.where(largest > 0, largest, 1), largest
