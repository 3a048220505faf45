r"""Polar factors by quintics in bfloat16, and whole steps of the spectral rules, by C++ on CPUs with AVX-512 BF16.

    M ← β M + (1−β) G,  V = M           or, nesterov,  M ← β M + G,  V = G + β M
    U = polar(V),       W ← (1 − lr·wd) W − lr·scale·U

The iteration is that of `lit_symopt.linalg.low_precision`: the same quintics, the same form, the same norm to begin
with. A matrix stays with one core from its gradient to its weight: it is read once, rounded to bfloat16, and iterated
on in the cache; nothing is kept of it afterwards. Where there are fewer matrices than threads, or where workspaces of
all threads would take too much memory, all threads share one matrix after another.

Of symmetric products the upper half is computed, and every product of a form but those with X itself is symmetric, so
that in the units of `lit_symopt.linalg.forms` a segment of k steps takes 3r + 4k − 3 in place of 4r + 8k − 6:

| form | here | by whole products |
|---|---|---|
| (1, 1, 1, 1, 1) | 15r + 5 | 20r + 10 |
| (2, 1, 2) | 9r + 11 | 12r + 22 |

Sums with a multiple of X or of the identity are rounded once. Results do not depend on the number of threads. They
differ from those of torch's products by rounding to bfloat16 in another order, and are as far from float64.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lit_symopt.cpp.batches import batches
from lit_symopt.cpp.build import library
from lit_symopt.cpp.operators import operator
from lit_symopt.errors import ConfigError
from lit_symopt.linalg.forms import choose_form, form_operations
from lit_symopt.linalg.low_precision import QUINTICS, STEPS, TRUSTED, peak
from lit_symopt.linalg.newton_schulz import SAFETY
from lit_symopt.scratch import FRESH, MIB, Scratch

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the library calls dtypes."""

MOST = 256 * MIB
"""Bytes that workspaces of all threads may take, unless another bound is given; else all threads share one."""

ALIGNED = 64
"""Bytes in a register."""


class _Matrices(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.POINTER(ctypes.c_void_p)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("dtype", ctypes.c_int32),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("tensors", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("threads", ctypes.c_int32),
        ("workspaces", ctypes.c_int32),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("quintics", ctypes.POINTER(ctypes.c_double)),
        ("form", ctypes.POINTER(ctypes.c_int32)),
        ("segments", ctypes.c_int32),
        ("safety", ctypes.c_float),
        ("trusted_low", ctypes.c_float),
        ("trusted_high", ctypes.c_float),
        ("gradient", _Matrices),
        ("momentum", _Matrices),
        ("beta", ctypes.c_float),
        ("fresh", ctypes.c_float),
        ("nesterov", ctypes.c_int32),
        ("out", _Matrices),
        ("weight", _Matrices),
        ("keep", ctypes.POINTER(ctypes.c_float)),
        ("rate", ctypes.POINTER(ctypes.c_float)),
        ("parameter", _Matrices),
    )


@cache
def supported() -> bool:
    """Whether this CPU has AVX-512 BF16, and no AMX, whose products in torch are faster still; compiles the library.

    Raises:
        ConfigError: if there is no compiler, or it fails.
    """
    return bool(_library().polar_supported())


def workspace_bytes(m: int, n: int) -> int:
    """What the iteration on a matrix m x n borrows, in bytes; results are written where they are asked for.

    >>> workspace_bytes(512, 256) == 2 * (3 * 512 * 256 + 5 * 256 * 256)
    True
    """
    longer, side = (-(-size // 16) * 16 for size in (max(m, n), min(m, n)))
    found = 6 * longer * side + 10 * side * side
    if longer > 4096:  # of longer sums parts are kept, in float32
        found += 4 * -(-side // 64) * 64 * side
    return -(-found // ALIGNED) * ALIGNED


@dataclass(frozen=True)
class Place:
    """Where matrices [count, m, n] lie in a contiguous tensor.

    Attributes:
        offset: numbers before the first.
        count, m, n: how many, and their shape.
        strides: of all three, in numbers.
    """

    offset: int
    count: int
    m: int
    n: int
    strides: tuple[int, int, int]

    def by_rows(self) -> Place:
        """The same, or its transpose, of which the polar factor is the transpose: memory is read along rows."""
        matrix, row, column = self.strides
        return self if row != 1 else Place(self.offset, self.count, self.n, self.m, (matrix, column, row))

    def numbers(self) -> list[int]:
        """As the operator takes it."""
        return [self.offset, self.count, self.m, self.n, *self.strides]


def places(matrices: Tensor) -> list[Place]:
    """Where the matrices [..., m, n] of a view of a contiguous tensor lie in it; one place if their batch is regular.

    >>> places(torch.empty(8, 6, device="meta").unflatten(0, (2, 4))[:, 1:])
    [Place(offset=6, count=2, m=3, n=6, strides=(24, 6, 1))]
    """
    found = []
    for ((view,),) in batches([[matrices]]):
        count, m, n = view.shape
        matrix, row, column = view.stride()
        found.append(Place(int(view.storage_offset()), count, m, n, (matrix, row, column)))
    return found


@torch.no_grad()
def polar(x: Tensor, *, scratch: Scratch = FRESH, out: Tensor | None = None) -> Tensor:
    """The polar factor of each matrix of `x` [..., m, n], not written, in its dtype.

    Args:
        x: real matrices, none of them empty, of any floating dtype and any strides.
        scratch: where the workspaces are borrowed, and the result without `out`.
        out: of the shape of `x`, in float32, bfloat16 or float16, of any strides, sharing no memory with it.

    Raises:
        ConfigError: where there is no compiler or no AVX-512 BF16.
    """
    if x.dtype == torch.float64:
        exponent = torch.frexp(peak(x)).exponent.clamp(-1000, 1000)  # powers of two change no digit
        found = polar(torch.ldexp(x, -exponent).float(), scratch=scratch)
        return found.double() if out is None else out.copy_(found)
    result = scratch.like(x) if out is None else out
    for given, written in batches([[x], [result]]):
        _run([given, [], [], [], written], None, scratch=scratch, bound=MOST)
    return result


@torch.no_grad()
def spectral_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor] = (),
    *,
    lr: Sequence[float],
    weight_decay: Sequence[float],
    beta: float = 0.0,
    nesterov: bool = False,
    parameters: Sequence[Tensor] = (),
    within: Sequence[Place] = (),
    scratch: Scratch = FRESH,
    bound: float = MOST,
) -> None:
    """A step of a spectral rule on each matrix of `weights`, each [..., m, n]; writes weights and momenta.

    Args:
        weights: float32, of one shape; any strides.
        gradients: of the same shape, in float32, bfloat16 or float16.
        momenta: float32, or empty for none: then V = G.
        lr: of each tensor, learning rate times radius and scale.
        weight_decay: of each, times its learning rate: the share of W that is lost.
        beta, nesterov: of the momentum.
        parameters: in half precision, get the new weights rounded; or empty.
        within: where the matrices lie in each tensor, if that is not [..., m, n]; then all must be contiguous. No view
            of any tensor is made, so that what torch does is the same for many tensors as for one.
        scratch: where the workspaces are borrowed.
        bound: bytes that they may take, if those of one matrix take no more.

    Raises:
        ConfigError: for another dtype, and where there is no compiler or no AVX-512 BF16.
    """
    for kind, tensors in (("weights", weights), ("momenta", momenta)):
        if any(tensor.dtype != torch.float32 for tensor in tensors):
            raise ConfigError(f"{kind} of a step in C++ must be float32; choose backend 'eager'")
    given: list[Sequence[Tensor]] = [gradients, momenta, weights, parameters]
    pairs: Iterable[tuple[list[Sequence[Tensor]], Place | None]] = (
        ((given, place) for place in within) if within else (([*views], None) for views in batches(given))
    )
    for lists, place in pairs:
        _run(
            [*lists, []],
            place,
            keep=[1.0 - decay for decay in weight_decay],
            rate=lr,
            beta=beta,
            fresh=1.0 if nesterov else 1.0 - beta,
            nesterov=nesterov,
            scratch=scratch,
            bound=bound,
        )
    torch.autograd.graph.increment_version([*weights, *momenta, *parameters])


def workspaces(count: int, m: int, n: int, *, bound: float = MOST) -> int:
    """How many matrices are worked on at a time: as many as there are threads, or one by all of them."""
    threads = min(torch.get_num_threads(), count)
    return threads if threads * workspace_bytes(m, n) <= bound else 1


def _run(
    lists: Sequence[Sequence[Tensor]],
    place: Place | None,
    *,
    keep: Sequence[float] = (),
    rate: Sequence[float] = (),
    beta: float = 0.0,
    fresh: float = 1.0,
    nesterov: bool = False,
    scratch: Scratch,
    bound: float,
) -> None:
    """Call the operator with gradients, momenta, weights, parameters and results: whole tensors, or views [K, m, n]."""
    if place is not None:
        place = place.by_rows()
        count, m, n = place.count, place.m, place.n
    else:
        if all(one.stride(1) == 1 for tensors in lists for one in tensors):
            lists = [[one.mT for one in tensors] for tensors in lists]
        count, m, n = lists[0][0].shape
    if not count * m * n:
        return
    many = workspaces(len(lists[0]) * count, m, n, bound=bound)
    where, form = [] if place is None else place.numbers(), choose_form(m, n, steps=STEPS)
    with scratch.lend():
        size = many * workspace_bytes(m, n) + ALIGNED
        memory = scratch.empty((size,), dtype=torch.uint8, device="cpu")
        _operator()(*lists, memory, many, keep, rate, beta, fresh, nesterov, form, where)


def _call(
    gradient: Sequence[Tensor],
    momentum: Sequence[Tensor],
    weight: Sequence[Tensor],
    parameter: Sequence[Tensor],
    out: Sequence[Tensor],
    memory: Tensor,
    many: int,
    keep: Sequence[float],
    rate: Sequence[float],
    beta: float,
    fresh: float,
    nesterov: bool,
    form: Sequence[int],
    where: Sequence[int],
) -> None:
    count, m, n = where[1:4] if where else gradient[0].shape
    step = _Step(
        tensors=len(gradient),
        inner=count,
        m=m,
        n=n,
        threads=torch.get_num_threads(),
        workspaces=many,
        workspace=-(-memory.data_ptr() // ALIGNED) * ALIGNED,
        workspace_bytes=workspace_bytes(m, n),
        quintics=(ctypes.c_double * (3 * STEPS))(*[number for quintic in QUINTICS for number in quintic]),
        form=(ctypes.c_int32 * len(form))(*form),
        segments=len(form),
        safety=SAFETY,
        trusted_low=TRUSTED[0],
        trusted_high=TRUSTED[1],
        gradient=_matrices(gradient, where),
        momentum=_matrices(momentum, where),
        beta=beta,
        fresh=fresh,
        nesterov=nesterov,
        out=_matrices(out, where),
        weight=_matrices(weight, where),
        keep=(ctypes.c_float * len(keep))(*keep),
        rate=(ctypes.c_float * len(rate))(*rate),
        parameter=_matrices(parameter, where),
    )
    _library().polar_step(ctypes.byref(step))


def _matrices(tensors: Sequence[Tensor], where: Sequence[int]) -> _Matrices:
    if not tensors:
        return _Matrices()
    dtype = tensors[0].dtype
    if dtype not in CODES:
        raise ConfigError(f"matrices in C++ are float32, bfloat16 or float16, not {dtype}; choose backend 'eager'")
    before = where[0] * dtype.itemsize if where else 0
    strides = list(where[4:]) * len(tensors) if where else [one for tensor in tensors for one in tensor.stride()]
    return _Matrices(
        data=(ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() + before for tensor in tensors]),
        strides=(ctypes.c_int64 * len(strides))(*strides),
        dtype=CODES[dtype],
    )


@cache
def _library() -> ctypes.CDLL:
    found = library("polar")
    found.polar_workspace_bytes.restype = found.polar_step_bytes.restype = ctypes.c_int64
    found.polar_workspace_bytes.argtypes = [ctypes.c_int64, ctypes.c_int64]
    found.polar_step.restype = None
    return found


SCHEMA = """polar_step(
    Tensor[] gradient, Tensor(a!)[] momentum, Tensor(b!)[] weight, Tensor(c!)[] parameter, Tensor(d!)[] out,
    Tensor(e!) memory, int many, float[] keep, float[] rate, float beta, float fresh, bool nesterov, int[] form,
    int[] where
) -> ()"""


@cache
def _operator() -> Any:
    """The call as an operator of torch, which profilers see, and whose operations `FlopCounterMode` counts."""
    if not supported():
        raise ConfigError("polar factors in C++ need a CPU with AVX-512 BF16 and without AMX; choose backend 'eager'")
    found = operator(SCHEMA, _call)
    from torch.utils.flop_counter import register_flop_formula

    @register_flop_formula(found)
    def _count(gradient: Any, *args: Any, **_: Any) -> int:
        form, where = args[-2:]
        count, m, n = where[1:4] if where else gradient[0]
        return int(len(gradient) * count * form_operations(tuple(form), m=m, n=n, halved="everything"))

    return found.default
