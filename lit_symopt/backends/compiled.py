"""`torch.compile`: the whole polar factor of a batch in bfloat16, and a whole step of row_norm, as one graph each.

Free of Python branches on data, and of lent memory, because a compiler plans the memory itself. Equal to the eager
result up to rounding: what eager operations write to memory in between stays in registers, sums are in another order,
and products with sums are fused. A weight differs by some roundings of |W| + lr·scale, a polar factor by at most 0.03
of its Frobenius norm, which is what bfloat16 leaves open.

No faster than eager on a CPU (see `lit_symopt.backends.choice`). Not yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lit_symopt.backends.graphs import Graphs
from lit_symopt.linalg.coefficients import Quintic
from lit_symopt.linalg.forms import Form
from lit_symopt.linalg.newton_schulz import PyTorchProducts, gram_and_norm, gram_buffer, iterate_from
from lit_symopt.rules.centering import ROUNDINGS
from lit_symopt.scratch import FRESH

# B matrices of a batch, m rows of n numbers each

EXPONENT = 0x7F800000
"""The bits of a float32 number that hold its exponent."""


@torch.no_grad()
def polar(x: Tensor, quintics: Sequence[Quintic], *, form: Form) -> Tensor:
    """The polar factor of each matrix of `x` [..., m, n] in bfloat16: same shape and dtype; `x` is not written.

    Args:
        x: real matrices, none of them empty.
        quintics: of the iteration.
        form: of as many steps; a graph for every one.
    """
    result: Tensor = _polar_graph(tuple(quintics), form)(x.reshape(-1, *x.shape[-2:]))
    return result.view(x.shape)


class _TracedProducts(PyTorchProducts):
    """Without views of diagonals, for which Inductor of torch 2.13 uses what it has deprecated itself."""

    def polynomial(self, gram: Tensor, *, a: float, b: float, c: float, out: Tensor) -> None:
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=out)
        if a:
            out.add_(_identity(gram), alpha=a)

    def multiply(self, x: Tensor, p: Tensor, *, a: float, tall: bool, out: Tensor) -> None:
        if a:
            p = p + a * _identity(p)
        torch.bmm(x, p, out=out) if tall else torch.bmm(p, x, out=out)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


TRACED = _TracedProducts()


@cache
def _polar_graph(quintics: tuple[Quintic, ...], form: Form) -> Graphs:
    def function(x: Tensor) -> Tensor:
        # By the power of two at or below the largest entry: no digit changes. Of what is not finite it is infinity, and
        # products carry the NaN into every entry; of zeros and the denormal it has no bit.
        peak = x.abs().amax(dim=(-2, -1), keepdim=True).float()
        unit = (peak.view(torch.int32) & EXPONENT).view(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
        work = (x / unit).bfloat16()
        gram = gram_buffer(work, FRESH)
        norm = gram_and_norm(work, gram, TRACED)
        return iterate_from(work, gram, norm, quintics, form=form, products=TRACED).to(x.dtype)

    return Graphs(function)


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
) -> None:
    """A step of row_norm on each matrix of `weight` [..., m, n], rows being units; writes weight and momentum.

    Does what `lit_symopt.linalg.kernels.row_rule` does and takes what that takes, but ε, which has no effect below 1:

        M ← β M + (1−β) G,  V = M           or, nesterov,  M ← β M + G,  V = G + β M
        U = D(V) V, or Π D(ΠV) ΠV if centered,     W ← (1 − lr·wd) W − lr·scale·U

    Args:
        weight: float32 [..., m, n], written in place.
        gradient: of the shape of `weight`, any floating dtype.
        momentum: float32, written in place, or `None` for none: then V = G.
        lr: learning rate, times the radius; a number, or a tensor of one number on the device of `weight`. Neither is
            part of a graph.
        weight_decay: likewise.
        beta, nesterov, row_damping, centered: of the rule; a graph for every combination.
        scale: an analytic one; goes into the rate.
        admitted: a boolean on the device that masks every write; `None` for yes.
        parameter: in half precision, gets the new `weight` rounded.
    """
    if not weight.numel():
        return
    keep, rate = rates(lr, weight_decay, scale=scale, device=weight.device)
    of_momentum = _Momentum(float(beta), nesterov) if momentum is not None else None
    w, g, m, p = _matrices((weight, gradient, momentum, parameter), one=not centered and row_damping == 0)
    rule = (of_momentum, float(row_damping), centered)
    if weight.device.type == "cpu":
        # Inductor's C++ code cannot write two tensors in the loop over rows of one graph (torch 2.13: KeyError).
        if of_momentum is not None:
            _momentum_graph(of_momentum)(m, g, admitted)
        _row_graph(*rule, one=False)(w, g, m, None, admitted, keep, rate)
        if p is not None and w is not None:
            p.copy_(w)
    else:
        _row_graph(*rule, one=True)(w, g, m, p, admitted, keep, rate)


def rates(
    lr: float | Tensor, weight_decay: float | Tensor, *, scale: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`1 − lr·wd` and `lr·scale` in float64 on the device; asks nothing of it.

    >>> rates(0.1, 0.5, scale=2.0, device=torch.device("cpu"))
    (tensor(0.9500, dtype=torch.float64), tensor(0.2000, dtype=torch.float64))
    """
    found = []
    for value in (1 - lr * weight_decay, lr * scale):
        if isinstance(value, Tensor):
            found.append(value.detach().to(device, torch.float64, non_blocking=True).reshape(()))
        else:
            # A fill on the device: copying a number from the host would wait for it.
            found.append(torch.full((), value, dtype=torch.float64, device=device))
    return found[0], found[1]


def _matrices(tensors: Sequence[Tensor | None], *, one: bool) -> list[Tensor | None]:
    """Views [B, m, n], or [B m, n] where rows do not know of each other: fewer patterns of shapes for the graphs.

    Tensors with gaps stay as they are.
    """
    detached = [None if tensor is None else tensor.detach() for tensor in tensors]
    if not all(tensor is None or tensor.is_contiguous() for tensor in detached):
        return detached
    return [
        None if tensor is None else tensor.view(-1, *(tensor.shape[-1:] if one else tensor.shape[-2:]))
        for tensor in detached
    ]


@dataclass(frozen=True)
class _Momentum:
    beta: float
    nesterov: bool

    def accumulate(self, buffer: Tensor, gradient: Tensor) -> Tensor:
        return self.beta * buffer + (1.0 if self.nesterov else 1.0 - self.beta) * gradient

    def direction(self, buffer: Tensor, gradient: Tensor) -> Tensor:
        return gradient + self.beta * buffer if self.nesterov else buffer


@cache
def _momentum_graph(momentum: _Momentum) -> Graphs:
    def function(buffer: Tensor, gradient: Tensor, admitted: Tensor | None) -> None:
        _write(buffer, momentum.accumulate(buffer, gradient.to(buffer.dtype)), admitted)

    return Graphs(function)


@cache
def _row_graph(momentum: _Momentum | None, damping: float, centered: bool, *, one: bool) -> Graphs:
    """The whole step if `one`, else what is left of it after the momentum: a graph that writes the weight alone."""

    def function(
        weight: Tensor,
        gradient: Tensor,
        buffer: Tensor | None,
        parameter: Tensor | None,
        admitted: Tensor | None,
        keep: Tensor,
        rate: Tensor,
    ) -> None:
        direction = gradient.to(weight.dtype)
        if momentum is not None and buffer is not None:
            new = momentum.accumulate(buffer, direction) if one else buffer
            direction = momentum.direction(new, direction)
            if one:
                _write(buffer, new, admitted)
        # In float64, which holds the square of any float32 number, and which registers hold at the speed of memory.
        x = (_centered(direction) if centered else direction).double()
        norms = x.square().sum(dim=-1, keepdim=True).sqrt()
        length = norms + damping * norms.square().mean(dim=-2, keepdim=True).sqrt() if damping else norms
        update = x * (rate / torch.where(norms > 0, length, 1))
        if centered:
            update = update - update.mean(dim=-2, keepdim=True)
        new = (keep * weight - update).to(weight.dtype)
        _write(weight, new, admitted)
        if parameter is not None:
            _write(parameter, new.to(parameter.dtype), admitted)

    return Graphs(function)


def _write(to: Tensor, value: Tensor, admitted: Tensor | None) -> None:
    to.copy_(value if admitted is None else torch.where(admitted, value, to))


def _centered(x: Tensor) -> Tensor:
    """Π x, with rows of zeros where nothing but rounding is left; see `lit_symopt.rules.centering`."""
    centered = (x.double() - x.double().mean(dim=-2, keepdim=True)).to(x.dtype)
    noise = ROUNDINGS * torch.finfo(x.dtype).eps * (_norms(x) + _norms(x - centered))
    return torch.where(_norms(centered) > noise, centered, 0)


def _norms(x: Tensor) -> Tensor:
    return x.double().square().sum(dim=-1, keepdim=True).sqrt()
