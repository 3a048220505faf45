r"""A whole step of row_norm: momentum, row norms, centering, decay and write, with as few looks at memory as it takes.

    M ← β M + (1−β) G,  V = M           or, nesterov,  M ← β M + G,  V = G + β M
    U = D(V) V,   D = diag(1 / (‖Vᵢ‖ + δ·rms_j ‖Vⱼ‖))          centered: U = Π D(ΠV) ΠV,  Π = I − 11ᵀ/m
    W ← (1 − lr·wd) W − lr·scale·U

A program holds some whole rows in registers. What it needs of the other rows (the mean of the rows of V, the mean
square of their norms, the mean of the rows of U) takes a pass of its own, which ends in sums, one a program, in float64
and added up in a fixed order. Every pass is the same kernel; the first updates the momentum, the last writes the
weights. How often a number an entry is moved:

| | passes | reads | nesterov | without momentum | writes |
|---|---|---|---|---|---|
| plain | 1 | G M, W: 3 | 3 | G, W: 2 | M, W: 2 |
| damped (δ > 0) | 2 | G M; M, W: 4 | 5 | 3 | 2 |
| centered | 3 | G M; M; M, W: 5 | 7 | 4 | 2 |
| centered and damped | 4 | G M; M; M; M, W: 6 | 9 | 5 | 2 |

(W alone is written without momentum, and one number more where a master in float32 has a parameter in half precision.)
The second and later reads come from the cache where a matrix is small.

Intermediates are in float32, as of precision `auto`, and scaled by the largest entry of a row, so that nothing
over- or underflows; the mean is subtracted as a sum of two float32 numbers, which gives ΠV to the rounding of its own
size. A weight differs from that of `SymOpt` by at most 8 roundings (2⁻²⁴) of |W| + lr·scale, three steps on.

Source: the rule is `lit_symopt.rules.row_norm`, Lau and Su 2026, arXiv:2605.18106. One program for whole rows: the
layer normalization tutorial of Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lit_symopt.linalg.kernels.load import SAME, kernels, names_of, refuse_unless, require

if TYPE_CHECKING:
    import triton.language as tl

# B matrices of a batch, m rows of n features each; V the direction, U the update

NAME = "row_rule"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LONGEST = 1 << 16
"""The longest row. Above 16,384 numbers (centered: 8,192) registers spill, which is slow."""

TILE, STRIDED_ROWS = 2048, 8
"""Numbers in a tile, at least; and rows, where not columns but rows lie side by side: 8 numbers fill 32 bytes, what a
GPU reads at once."""

SUMS = 512
"""Programs that add up columns, at most: about four for each multiprocessor of an H100."""

ROUNDINGS = 4 * 2.0**-23
"""As of `lit_symopt.rules.centering`: a row that differs from the mean by no more than this is the mean."""

Tensors = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None"]
"""Weight, gradient, momentum and parameter."""

FUNCTIONS = ("_minus_mean", "_norms", "_positive", "_direction", "_row_rule")
"""What becomes a kernel, each after those that it calls."""

AddUp = Literal["nothing", "direction", "squares", "update"]
"""What a pass adds up: columns of V, squares of row norms, columns of U; the pass that adds up nothing writes W."""


def _minus_mean(x: tl.tensor, total: tl.tensor, columns: tl.tensor, m: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """`x` less total/m, as two float32 numbers: the first difference is exact where it matters."""
    mean = tl.load(total + columns, mask=inside, other=0.0) / m
    high = mean.to(tl.float32)
    low = (mean - high.to(tl.float64)).to(tl.float32)
    return (x - high[None, :]) - low[None, :]


def _norms(x: tl.tensor, unit: tl.tensor) -> tl.tensor:
    """Row norms in units of `unit`, one a row."""
    units = tl.div_rn(x, unit[:, None])
    return tl.sqrt_rn(tl.sum(units * units, axis=1))


def _positive(x: tl.tensor) -> tl.tensor:
    return tl.where(x > 0, x, 1.0)


def _direction(
    gradient: tl.tensor,
    momentum: tl.tensor,
    valid: tl.tensor,
    writable: tl.tensor,
    beta: tl.tensor,
    fresh: tl.tensor,
    NESTEROV: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    UPDATE: tl.constexpr,
) -> tl.tensor:
    """V of a tile; the momentum is written by the pass that updates it."""
    if UPDATE or NESTEROV or not HAS_MOMENTUM:
        x = tl.load(gradient, mask=valid, other=0.0).to(tl.float32)
    if HAS_MOMENTUM:
        buffer = tl.load(momentum, mask=valid, other=0.0)
        if UPDATE:
            buffer = beta * buffer + fresh * x
            tl.store(momentum, buffer, mask=writable)
        if NESTEROV:
            x += beta * buffer
        else:
            x = buffer
    return x


def _row_rule(
    weight: tl.tensor,
    gradient: tl.tensor,
    momentum: tl.tensor,
    parameter: tl.tensor,
    admitted: tl.tensor,
    shift: tl.tensor,
    squares: tl.tensor,
    back: tl.tensor,
    sums: tl.tensor,
    lr: tl.tensor,
    weight_decay: tl.tensor,
    scale: tl.tensor,
    beta: tl.tensor,
    fresh: tl.tensor,
    damping: tl.tensor,
    eps: tl.tensor,
    roundings: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    programs: tl.tensor,
    tiles: tl.tensor,
    w_matrix: tl.tensor,
    w_row: tl.tensor,
    w_column: tl.tensor,
    g_matrix: tl.tensor,
    g_row: tl.tensor,
    g_column: tl.tensor,
    m_matrix: tl.tensor,
    m_row: tl.tensor,
    m_column: tl.tensor,
    p_matrix: tl.tensor,
    p_row: tl.tensor,
    p_column: tl.tensor,
    NESTEROV: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    UPDATE: tl.constexpr,
    ADD_UP: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    DECAY_ON_DEVICE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    matrix = (tl.program_id(0) // programs).to(tl.int64)
    part = tl.program_id(0) % programs
    columns = tl.arange(0, COLUMNS).to(tl.int64)
    inside = columns < n
    end = m
    if admitted is not None:
        end = tl.where(tl.load(admitted) != 0, m, 0)
    if ADD_UP == "nothing":
        rate = lr
        decay = weight_decay
        if LR_ON_DEVICE:
            rate = tl.load(lr)
        if DECAY_ON_DEVICE:
            decay = tl.load(weight_decay)
        # In float64 and then rounded once, as a host would.
        keep = (1.0 - tl.cast(rate, tl.float64) * tl.cast(decay, tl.float64)).to(tl.float32)
        step = (tl.cast(rate, tl.float64) * tl.cast(scale, tl.float64)).to(tl.float32)
    if ADD_UP == "squares":
        total = tl.zeros((ROWS,), dtype=tl.float64)
    elif ADD_UP != "nothing":
        total = tl.zeros((COLUMNS,), dtype=tl.float64)

    for index in range(tiles):
        rows = ((part * tiles + index) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = (rows[:, None] < m) & inside[None, :]
        writable = (rows[:, None] < end) & inside[None, :]
        x = _direction(
            gradient + matrix * g_matrix + rows[:, None] * g_row + columns[None, :] * g_column,
            momentum + matrix * m_matrix + rows[:, None] * m_row + columns[None, :] * m_column,
            valid,
            writable,
            beta,
            fresh,
            NESTEROV,
            HAS_MOMENTUM,
            UPDATE,
        )
        if ADD_UP == "direction":
            total += tl.sum(x.to(tl.float64), axis=0)
        else:
            if shift is not None:
                centered = tl.where(valid, _minus_mean(x, shift + matrix * n, columns, m, inside), 0.0)
                gone = x - centered
                unit = _positive(tl.maximum(tl.max(tl.abs(x), axis=1), tl.max(tl.abs(gone), axis=1)))
                noise = roundings * (_norms(x, unit) + _norms(gone, unit))
                x = tl.where((_norms(centered, unit) > noise)[:, None], centered, 0.0)
            peak = tl.max(tl.abs(x), axis=1)
            unit = _positive(peak)
            norms = _norms(x, unit)
            if ADD_UP == "squares":
                whole = norms.to(tl.float64) * peak.to(tl.float64)
                total += whole * whole
            else:
                if squares is not None:
                    # In float64, which holds the square of any float32 number; a row of zeros stays one.
                    rms = tl.sqrt(tl.load(squares + matrix) / m)
                    norms += damping * (rms / unit.to(tl.float64)).to(tl.float32)
                u = tl.div_rn(tl.div_rn(x, unit[:, None]), tl.maximum(norms, eps)[:, None])
                if ADD_UP == "update":
                    total += tl.sum(u.to(tl.float64), axis=0)
                else:
                    if back is not None:
                        u = _minus_mean(u, back + matrix * n, columns, m, inside)
                    at = weight + matrix * w_matrix + rows[:, None] * w_row + columns[None, :] * w_column
                    w = keep * tl.load(at, mask=valid, other=0.0).to(tl.float32) - step * u
                    tl.store(at, w.to(weight.dtype.element_ty), mask=writable)
                    if parameter is not None:
                        at = parameter + matrix * p_matrix + rows[:, None] * p_row + columns[None, :] * p_column
                        tl.store(at, w.to(parameter.dtype.element_ty), mask=writable)
    if ADD_UP == "squares":
        tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))
    elif ADD_UP != "nothing":
        tl.store(sums + tl.program_id(0).to(tl.int64) * n + columns, total, mask=inside)


@cache
def _kernel() -> Any:
    return kernels(globals(), *FUNCTIONS)[-1]


@torch.no_grad()
def row_rule(
    weight: Tensor,
    gradient: Tensor,
    momentum: Tensor | None = None,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    beta: float = 0.0,
    nesterov: bool = False,
    scale: float = 1.0,
    eps: float = 1e-8,
    row_damping: float = 0.0,
    centered: bool = False,
    admitted: Tensor | None = None,
    parameter: Tensor | None = None,
) -> None:
    """A step of row_norm on each matrix of `weight` [..., m, n], rows being units; writes weight and momentum.

    Tensors may have any strides; where the dimensions of the batch are not one stride apart in all of them, each index
    of the first is a launch of its own. No result depends on the order in which programs run.

    Args:
        weight: float32, or half precision without a master; arithmetic is in float32.
        gradient: of the shape of `weight`; any of these dtypes.
        momentum: float32, or `None` for none: then V = G.
        lr: learning rate, times the radius; a tensor of one number on the device can change between the replays of a
            CUDA graph, one on the host is read at the call.
        weight_decay: likewise.
        beta: of the momentum.
        nesterov: which momentum, see the module.
        scale: an analytic one: 1 (`none`), 0.2·√n (`rms`), √n (`row_rms`).
        eps, row_damping, centered: as of `lit_symopt.rules.row_norm`.
        admitted: a boolean on the device that masks every write; `None` for yes.
        parameter: in half precision, gets the new `weight` rounded.

    Raises:
        ConfigError: for what does not fit together, for rows above 65,536 numbers, for float64, for a weight of which
            several entries share memory, and where kernels do not run (see `require`).
    """
    require(weight.device.type)
    _check(weight, gradient, momentum, parameter, admitted)
    written = [tensor for tensor in (weight, momentum, parameter) if tensor is not None]
    if not weight.numel():
        return
    step = _Step(
        lr=_number("lr", lr, weight.device),
        weight_decay=_number("weight_decay", weight_decay, weight.device),
        beta=float(beta),
        # As `lit_symopt.rules.momentum`; 1 − β before it is rounded to float32.
        fresh=1.0 if nesterov else 1.0 - float(beta),
        nesterov=nesterov and momentum is not None,
        scale=float(scale),
        eps=float(eps),
        damping=float(row_damping),
        centered=centered,
        admitted=None if admitted is None else admitted.view(torch.uint8),
    )
    with torch.cuda.device_of(weight):
        for tensors in _batches(_each(Tensor.detach, (weight, gradient, momentum, parameter))):
            step(tensors)
    torch.autograd.graph.increment_version(written)


@dataclass(frozen=True, kw_only=True)
class _Step:
    """The passes over one batch [B, m, n]."""

    lr: float | Tensor
    weight_decay: float | Tensor
    beta: float
    fresh: float
    nesterov: bool
    scale: float
    eps: float
    damping: float
    centered: bool
    admitted: Tensor | None

    def __call__(self, tensors: Tensors) -> None:
        found: dict[str, Tensor | None] = {"shift": None, "squares": None, "back": None}
        if self.centered:
            found["shift"] = self._launch(tensors, found, add_up="direction", first=True)
        if self.damping:
            found["squares"] = self._launch(tensors, found, add_up="squares", first=not self.centered)
        if self.centered:
            found["back"] = self._launch(tensors, found, add_up="update", first=False)
        self._launch(tensors, found, add_up="nothing", first=not (self.centered or self.damping))

    def _launch(
        self,
        tensors: Tensors,
        found: dict[str, Tensor | None],
        *,
        add_up: AddUp,
        first: bool,
    ) -> Tensor | None:
        """One pass; returns what it has added up, of each matrix: [B, n], or [B] squares."""
        weight, gradient, momentum, parameter = tensors
        count, m, n = weight.shape
        rows, columns, warps = tile(n, contiguous=all(one is None or one.stride(-1) == 1 for one in tensors))
        needed = -(-m // rows)
        by_column = add_up in ("direction", "update")
        tiles = min(needed, -(-needed * count // SUMS)) if by_column else 1
        programs = -(-needed // tiles)
        sums = None
        if add_up != "nothing":
            shape = (count, programs, n) if by_column else (count, programs)
            sums = torch.empty(shape, dtype=torch.float64, device=weight.device)
        _kernel()[(count * programs,)](
            weight,
            gradient,
            gradient if momentum is None else momentum,
            parameter,
            self.admitted,
            found["shift"],
            found["squares"],
            found["back"],
            sums,
            self.lr,
            self.weight_decay,
            self.scale,
            self.beta,
            self.fresh,
            self.damping,
            self.eps,
            ROUNDINGS,
            m,
            n,
            programs,
            tiles,
            *weight.stride(),
            *gradient.stride(),
            *(gradient if momentum is None else momentum).stride(),
            *(weight if parameter is None else parameter).stride(),
            NESTEROV=self.nesterov,
            HAS_MOMENTUM=momentum is not None,
            UPDATE=first and momentum is not None,
            ADD_UP=add_up,
            LR_ON_DEVICE=isinstance(self.lr, Tensor),
            DECAY_ON_DEVICE=isinstance(self.weight_decay, Tensor),
            ROWS=rows,
            COLUMNS=columns,
            num_warps=warps,
            **SAME,
        )
        return None if sums is None else sums.sum(dim=1)


def tile(n: int, *, contiguous: bool) -> tuple[int, int, int]:
    """Rows and columns of the tile of a program, and its warps: 16 numbers of a tensor for a thread up to n = 8,192.

    >>> tile(512, contiguous=True), tile(3000, contiguous=True), tile(512, contiguous=False)
    ((4, 512, 4), (1, 4096, 8), (8, 512, 8))
    """
    columns = 1 << (n - 1).bit_length()
    rows = max(1 if contiguous else STRIDED_ROWS, TILE // columns)
    warps = max(4, min(16, rows * columns // 512))
    return rows, columns, 32 if columns > 1 << 14 else warps


def _batches(tensors: Tensors) -> Iterator[Tensors]:
    """Views [B, m, n] of all tensors: one of each, or one for every index of the first dimension."""
    shape = tensors[0].shape
    try:
        views = _each(lambda tensor: tensor.view(shape[:-2].numel(), *shape[-2:]), tensors)
    except RuntimeError:  # torch: the view spans dimensions that are not one stride apart
        for index in range(shape[0]):
            yield from _batches(_each(itemgetter(index), tensors))
    else:
        yield views


def _each(function: Callable[[Tensor], Tensor], tensors: Tensors) -> Tensors:
    weight, gradient, momentum, parameter = tensors
    return (
        function(weight),
        function(gradient),
        None if momentum is None else function(momentum),
        None if parameter is None else function(parameter),
    )


def _number(name: str, value: float | Tensor, device: torch.device) -> float | Tensor:
    if not isinstance(value, Tensor):
        return float(value)
    refuse_unless(
        value.numel() == 1 and value.device.type in ("cpu", device.type),
        NAME,
        f"{name} must be one number, on {device} or on the host, got shape {tuple(value.shape)} on {value.device}",
    )
    return value.detach() if value.device.type == device.type else float(value)


def _check(
    weight: Tensor, gradient: Tensor, momentum: Tensor | None, parameter: Tensor | None, admitted: Tensor | None
) -> None:
    refuse_unless(weight.ndim >= 2, NAME, f"needs matrices [..., m, n], got shape {tuple(weight.shape)}")
    refuse_unless(
        weight.shape[-1] <= LONGEST, NAME, f"takes rows of at most {LONGEST:,} numbers, got {weight.shape[-1]:,}"
    )
    known = {"weight": weight, "gradient": gradient, "momentum": momentum, "parameter": parameter}
    given = {name: tensor for name, tensor in known.items() if tensor is not None}
    for name, tensor in given.items():
        allowed = DTYPES[:1] if name == "momentum" else DTYPES
        refuse_unless(
            tensor.shape == weight.shape and tensor.device == weight.device and tensor.dtype in allowed,
            NAME,
            f"{name} must be {names_of(allowed)} {tuple(weight.shape)} on {weight.device}, got "
            f"{names_of([tensor.dtype])} {tuple(tensor.shape)} on {tensor.device}",
        )
        shared = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        refuse_unless(name == "gradient" or not shared, NAME, f"entries of {name} share memory; clone it")
    refuse_unless(
        admitted is None
        or (admitted.dtype == torch.bool and admitted.numel() == 1 and admitted.device == weight.device),
        NAME,
        f"admitted must be one boolean on {weight.device}",
    )
