r"""A whole step of row_norm in C++: momentum, row norms, centering, decay and write.

    M ← β M + (1−β) G,  V = M           or, nesterov,  M ← β M + G,  V = G + β M
    U = D(V) V,   D = diag(1 / (‖Vᵢ‖ + δ·rms_j ‖Vⱼ‖))          centered: U = Π D(ΠV) ΠV,  Π = I − 11ᵀ/m
    W ← (1 − lr·wd) W − lr·scale·U

The twin of `lit_symopt.linalg.kernels.row_rule` for CPUs: what it needs of all rows takes a pass of its own. How often
a number an entry is moved:

| | passes | reads | nesterov | without momentum | writes |
|---|---|---|---|---|---|
| plain | 1 | G M, W: 3 | 3 | G, W: 2 | M, W: 2 |
| damped (δ > 0) | 2 | G M; M, W: 4 | 5 | 3 | 2 |
| centered | 3 | G M; M; M, W: 5 | 7 | 4 | 2 |
| centered and damped | 4 | G M; M; M; M, W: 6 | 9 | 5 | 2 |

(W alone is written without momentum, and half a number more where the weight is the master of a parameter in half
precision.) The first pass writes M, or, nesterov, the last: a pass that only reads is faster. All passes go forwards;
to go back through what is still in the cache took longer.

Sums, norms and rates are in float64; four squares at a time are added in float32 first where none over- or underflows,
and entries are in float32 unless the factor of their row is beyond its range: rows of any size are right. A step is
computed before W loses it, and rounded with it once. A weight differs from that of the equation by at most 4 roundings
(2⁻²⁴) of |W| + lr·scale a step, and from that of the eager step by at most 8. Columns are added up in chunks of rows
and these in order, so that no result depends on the number of threads. A NaN spreads over its row; centered, over its
matrix; damped, over the rows of its matrix that are not zero.

Tensors may have any strides; rows whose numbers do not lie side by side go through a buffer, as do those in half
precision.

Source: the rule is `lit_symopt.rules.row_norm`, Lau and Su 2026, arXiv:2605.18106.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lit_symopt.cpp.batches import batches
from lit_symopt.cpp.build import library
from lit_symopt.cpp.operators import operator
from lit_symopt.errors import ConfigError
from lit_symopt.scratch import ALIGNED, FRESH, Scratch

# B matrices of a batch, m rows of n features each; V the direction, U the update

NAME = "row_step"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CHUNK = 32
"""Rows whose columns are added up first."""
CHUNK_NUMBERS = 1 << 14
"""Of what a thread takes at a time where nothing is added up and a chunk may be less."""

GATHERED = 32
"""Rows that go through a buffer at once where numbers of other rows lie between: two lines of the cache of each column,
which took half as long as one."""
GATHERED_NUMBERS = 1 << 17
"""In such a buffer at the most, but for one row: half a usual second-level cache."""

PAD = 16
"""Numbers after each row in a buffer, as of the C++ file."""

SMALL = 1 << 16
"""Numbers for which a second thread takes longer to wake than it saves."""

Tensors = Sequence[Any]
"""Weight, gradient, momentum and parameter; the last two may be `None`."""


class _View(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("type", "matrix", "row", "column")))


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, _View) for name in ("weight", "gradient", "momentum", "parameter")),
        *((name, ctypes.c_int64) for name in ("batch", "m", "n", "chunk", "block", "nesterov", "centered", "threads")),
        *((name, ctypes.c_double) for name in ("beta", "decay", "rate", "damping")),
        *((name, ctypes.c_void_p) for name in ("norms", "lengths", "sums", "means", "work")),
    )


def scratch_bytes(weight: Tensor, *, centered: bool = False, damped: bool = False) -> int:
    """What `row_step` borrows at the most for matrices like `weight` [..., m, n]."""
    shape = (weight.shape[:-2].numel(), *weight.shape[-2:])
    return 8 * sum(_sizes(shape, centered=centered, damped=damped, block=_most_gathered(shape[-1]))) + ALIGNED


def _sizes(shape: Sequence[int], *, centered: bool, damped: bool, block: int) -> list[int]:
    """Of the five pieces that are borrowed, in float64 numbers; in whole lines of the cache."""
    batch, m, n = shape
    norms, lengths = (batch * m, 2 * batch) if centered or damped else (0, 0)
    sums, means = (batch * -(-m // CHUNK) * n, 2 * batch * n) if centered else (0, 0)
    work = -(-torch.get_num_threads() * (3 * block + 2) * (n + PAD) // 2)
    return [-(-size // 8) * 8 for size in (norms, lengths, sums, means, work)]


@torch.no_grad()
def row_step(
    weight: Tensor,
    gradient: Tensor,
    momentum: Tensor | None = None,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    beta: float = 0.0,
    nesterov: bool = False,
    scale: float = 1.0,
    row_damping: float = 0.0,
    centered: bool = False,
    admitted: Tensor | None = None,
    parameter: Tensor | None = None,
    scratch: Scratch = FRESH,
) -> None:
    """A step of row_norm on each matrix of `weight` [..., m, n], rows being units; writes weight and momentum.

    Args:
        weight: float32, on a CPU.
        gradient: of the shape of `weight`; float32 or half precision.
        momentum: float32, or `None` for none: then V = G.
        lr: learning rate, times the radius; a number or a tensor of one number.
        weight_decay: decoupled; likewise.
        beta: of the momentum.
        nesterov: which momentum, see the module.
        scale: an analytic one, see `lit_symopt.row_step.analytic`.
        row_damping, centered: as of `lit_symopt.rules.row_norm`.
        admitted: a boolean; if false, nothing is written. `None` for yes.
        parameter: in half precision, gets the new `weight` rounded.
        scratch: what the step borrows, see `scratch_bytes`.

    Raises:
        ConfigError: for what does not fit together, for a weight of which several entries share memory, and where
            there is no compiler.
    """
    _check(weight, gradient, momentum, parameter, admitted)
    rate, decay = _number("lr", lr), _number("weight_decay", weight_decay)
    if not weight.numel() or (admitted is not None and not admitted.item()):
        return
    given = (weight, gradient, momentum, parameter)
    for lists in batches([[] if tensor is None else [tensor.detach()] for tensor in given]):
        one = [found[0] if found else None for found in lists]
        sizes = _sizes(lists[0][0].shape, centered=centered, damped=row_damping != 0, block=_block(one))
        with scratch.lend():
            borrowed = scratch.empty((sum(sizes),), dtype=torch.float64, device="cpu")
            _operator()(*one, borrowed, beta, nesterov, rate * decay, rate * scale, row_damping, centered)
    torch.autograd.graph.increment_version([one for one in (weight, momentum, parameter) if one is not None])


SCHEMA = """row_step(
    Tensor(a!) weight, Tensor gradient, Tensor(b!)? momentum, Tensor(c!)? parameter, Tensor(d!) borrowed,
    float beta, bool nesterov, float decay, float rate, float damping, bool centered
) -> ()"""


@cache
def _operator() -> Any:
    return operator(SCHEMA, _call).default


def _call(
    weight: Tensor,
    gradient: Tensor,
    momentum: Tensor | None,
    parameter: Tensor | None,
    borrowed: Tensor,
    beta: float,
    nesterov: bool,
    decay: float,
    rate: float,
    damping: float,
    centered: bool,
) -> None:
    batch, m, n = weight.shape
    tensors = (weight, gradient, momentum, parameter)
    block = _block(tensors)
    pieces, at = [], borrowed.data_ptr()
    for size in _sizes(weight.shape, centered=centered, damped=damping != 0, block=block):
        pieces.append(at if size else None)
        at += 8 * size
    chunk = CHUNK if centered or block > 1 else max(1, min(CHUNK, CHUNK_NUMBERS // n))
    threads = 1 if weight.numel() < SMALL else torch.get_num_threads()
    step = _Step(
        *(_view(tensor) for tensor in tensors),
        *(batch, m, n, chunk, block, nesterov, centered, threads),
        *(beta, decay, rate, damping),
        *pieces,
    )
    library(NAME).row_step(ctypes.byref(step))


def _view(tensor: Tensor | None) -> _View:
    if tensor is None:
        return _View()
    matrix, row, column = tensor.stride()
    return _View(tensor.data_ptr(), DTYPES.index(tensor.dtype), matrix, row, column if tensor.shape[-1] > 1 else 1)


def _block(tensors: Tensors) -> int:
    """Rows that are read at once: one, unless rows are nearer to each other than columns."""
    m, n = tensors[0].shape[-2:]
    near = m > 1 and n > 1 and any(one is not None and one.stride(-2) < one.stride(-1) for one in tensors)
    return _most_gathered(n) if near else 1


def _most_gathered(n: int) -> int:
    return max(1, min(GATHERED, GATHERED_NUMBERS // n))


def _number(name: str, value: float | Tensor) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise _refusal(f"{name} must be one number, got shape {tuple(value.shape)}")
    return float(value)


def _check(
    weight: Tensor, gradient: Tensor, momentum: Tensor | None, parameter: Tensor | None, admitted: Tensor | None
) -> None:
    if weight.ndim < 2:
        raise _refusal(f"needs matrices [..., m, n], got shape {tuple(weight.shape)}")
    for name, tensor, allowed in (
        ("weight", weight, DTYPES[:1]),
        ("gradient", gradient, DTYPES),
        ("momentum", momentum, DTYPES[:1]),
        ("parameter", parameter, DTYPES[1:]),
    ):
        if tensor is None:
            continue
        if tensor.shape != weight.shape or tensor.device.type != "cpu" or tensor.dtype not in allowed:
            raise _refusal(
                f"{name} must be {' or '.join(map(str, allowed))} {tuple(weight.shape)} on the CPU, got "
                f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
        if name != "gradient" and any(
            size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            raise _refusal(f"entries of {name} share memory; clone it")
    if admitted is not None and (admitted.dtype != torch.bool or admitted.numel() != 1):
        raise _refusal(f"admitted must be one boolean, got {admitted.dtype} {tuple(admitted.shape)}")


def _refusal(problem: str) -> ConfigError:
    return ConfigError(f"kernel {NAME}: {problem}; or choose backend 'eager'")
