"""The polar factor by five quintics in the arithmetic that matrix units are fast in: bfloat16, float16, TF32.

| method | products read | stored | range |
|---|---|---|---|
| `bf16` | 8 bits | bfloat16 | that of float32 |
| `fp16` | 11 bits | float16 | to 65,504: each matrix is scaled to a Frobenius norm of at most one first |
| `tf32` | 11 bits | float32 | that of float32 |

The quintics are those of Polar Express (`QUINTICS`), five as in Muon, on the matrix or in Gram form (`forms`); three
more bits allow a form with fewer operations. TF32 is allowed for these products alone and for as long as they take,
whatever the program has set; where there is none, on a CPU say, they are those of float32.

In float16 the entries of a matrix m x n of norm one are about (m n)^{-1/2}, and below 6e-5 they lose bits: one at
m n = 1e9, three at 2e10, which leaves those of bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeGuard

import torch
from torch import Tensor

from lit_symopt.linalg.coefficients import polar_express
from lit_symopt.linalg.forms import choose_form
from lit_symopt.linalg.newton_schulz import (
    PYTORCH,
    Products,
    gram_and_norm,
    gram_buffer,
    iterate_from,
    scratch_bytes,
)
from lit_symopt.scratch import FRESH, Scratch

LowPrecision = Literal["bf16", "fp16", "tf32"]

DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
"""By method: what the matrices of the iteration are stored in."""

STEPS = 5
# The Schatten-4 norm that `iterate` starts from is up to n^{1/4} times closer to σ₁ than the Frobenius norm, so a
# larger lower bound than the published 1e-3 reaches as far down, and converges. The safety is what bfloat16 needs, the
# Gram form most of all (see `forms`).
QUINTICS = polar_express(lower=3e-3, steps=STEPS, cushion=0.1, safety=1.08)

TRUSTED = 2.0**-22, 2.0**22
"""Between these Schatten-4 norms no square that matters over- or underflows in the range of float32 exponents."""
_EXPONENT = 0x7F800000
"""The bits of a float32 number that hold its exponent."""


def is_low_precision(name: str) -> TypeGuard[LowPrecision]:
    """Whether a precision, or a method, is one of this module's."""
    return name in DTYPES


@torch.no_grad()
def polar_by_quintics(
    x: Tensor,
    *,
    method: LowPrecision = "bf16",
    products: Products = PYTORCH,
    scratch: Scratch = FRESH,
    out: Tensor | None = None,
) -> Tensor:
    """The polar factor of each matrix of `x` [..., m, n], in the dtype of the method, contiguous.

    On a CPU, where asking costs nothing, entries are scaled only if a norm other than zero says that they must be:
    a power of two changes no digit within the exponents of float32, which bfloat16 has, too.

    Args:
        x: real matrices, none of them empty, of any floating dtype and any strides; not written.
        method: see the module.
        products: by whose kernels.
        scratch: where `polar_scratch_bytes` a matrix are borrowed, the result among them without `out`.
        out: contiguous, of the shape of `x` and the dtype of the method, sharing no memory with it; the result is
            written there.
    """
    dtype = DTYPES[method]
    work = scratch.like(x, dtype)
    batch = work.view(-1, *x.shape[-2:])
    gram = gram_buffer(batch, scratch)
    with tf32_allowed(method == "tf32" and x.device.type == "cuda"):
        if method != "fp16" and x.device.type == "cpu":
            work.copy_(x)
            norm = gram_and_norm(batch, gram, products)
            low, high = norm.aminmax()
            if not (TRUSTED[0] <= float(low) and float(high) <= TRUSTED[1]):  # NaN is neither
                trusted = (norm >= TRUSTED[0]) & (norm <= TRUSTED[1])
                if not bool((trusted | (peak(x).view_as(norm) == 0)).all()):
                    _scale_into(work, x)
                    norm = gram_and_norm(batch, gram, products)
        else:
            _scale_into(work, x)
            if method == "fp16":
                _unit_norm_(work)
            norm = gram_and_norm(batch, gram, products)
        # Products carry what is not finite into every entry.
        return iterate_from(
            batch,
            gram,
            norm,
            QUINTICS,
            form=choose_form(*x.shape[-2:], steps=STEPS, dtype=dtype),
            products=products,
            scratch=scratch,
            out=None if out is None else out.view(batch.shape),
        ).view(x.shape)


def polar_scratch_bytes(m: int, n: int, *, dtype: torch.dtype, method: LowPrecision = "bf16", out: bool = False) -> int:
    """Bytes of scratch that a method borrows for a matrix m x n.

    Args:
        m, n: of the matrix.
        dtype: of the result: that of the method for `polar_by_quintics`, any for `polar`, which converts it.
        method: which one.
        out: whether the result has memory of its own.

    Example:
        >>> polar_scratch_bytes(512, 256, dtype=torch.bfloat16, out=True) == 2 * (512 * 256 + 3 * 256 * 256)
        True
    """
    inner = DTYPES[method]
    form = choose_form(m, n, steps=STEPS, dtype=inner)
    direct = dtype == inner
    result = 0 if out or direct else m * n * dtype.itemsize
    within = scratch_bytes(m, n, form=form, dtype=inner, overwrite=True, out=out and direct)
    return result + inner.itemsize * m * n + within


def peak(x: Tensor) -> Tensor:
    """The largest entry of each matrix of [..., m, n], without its sign: [..., 1, 1]."""
    return torch.maximum(x.amax(dim=(-2, -1), keepdim=True), -x.amin(dim=(-2, -1), keepdim=True))


def _scale_into(work: Tensor, x: Tensor) -> None:
    """Each matrix of `x` divided by the power of two at or below its largest entry, in the dtype of `work`."""
    # Whatever is not finite has the exponent of infinity, which makes NaN of it; zeros and the denormal have none.
    unit = _power_of_two(peak(x).float())
    torch.div(x, unit.clamp_(min=torch.finfo(torch.float32).tiny), out=work)


def _unit_norm_(work: Tensor) -> None:
    """Divides each matrix, whose entries are below two, by a power of two at or above its Frobenius norm."""
    norm = torch.linalg.vector_norm(work, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    work.mul_((0.5 / _power_of_two(norm).clamp_(min=0.5)).to(work.dtype))


def _power_of_two(x: Tensor) -> Tensor:
    """The power of two at or below each positive float32 number; 0 for a denormal one, infinity for NaN."""
    return (x.view(torch.int32) & _EXPONENT).view(torch.float32)


@contextmanager
def tf32_allowed(asked: bool) -> Iterator[None]:
    """Float32 products by TF32 units, if asked for; what the program has set holds again afterwards."""
    if not asked:
        yield
        return
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"  # the latter before torch 2.9
    before = getattr(matmul, name)
    setattr(matmul, name, "tf32" if name == "fp32_precision" else True)
    try:
        yield
    finally:
        setattr(matmul, name, before)
