"""The halves of a step that act element by element: momentum before the rule, decay and write after it, all of AdamW.

They are torch's fused operations where the tensors allow it: one look at memory, and a mask that leaves everything as
it was on a device that finds a gradient which is not finite.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from lit_symopt.finite import undone_unless
from lit_symopt.member import Member, fusable, subject_of
from lit_symopt.ranges import phase
from lit_symopt.rules import ema_, nesterov_

SHORTEST = 1e-12
"""Radius times scale, at least, by which a decay is divided."""


@contextmanager
def masked(bucket: Sequence[Member], refused: Tensor | None) -> Iterator[Tensor | None]:
    """The mask that torch's fused operations take; where they cannot be used, every write is undone instead."""
    if refused is None or all(fusable(member) for member in bucket):
        yield refused
        return
    with undone_unless(refused == 0, [tensor for member in bucket for tensor in member.touched()]):
        yield None


def update_elements(bucket: Sequence[Member], *, refused: Tensor | None = None) -> None:
    """AdamW as it is, element by element: shapes do not matter."""
    group, weights = bucket[0].group, [member.weight for member in bucket]
    decay = group["weight_decay"]
    with phase(subject_of, "rule", bucket):
        if isinstance(decay, Tensor):  # which AdamW does not take
            if all(fusable(member) for member in bucket):
                _decay_(weights, group["lr"] * decay, refused)
            else:
                _scale_(weights, [1.0 - group["lr"] * decay] * len(weights))
            decay = 0.0
        _adamw_step(bucket, weights, decay, refused)
    _write_back(bucket)


def directions(
    bucket: Sequence[Member], *, into: Sequence[Tensor] | None = None, refused: Tensor | None = None
) -> list[Tensor]:
    """The half of a step before the rule, element by element: state ← gradient; returns what the rule is applied to.

    `M ← momentum(M, G)` returns M, to be read only. Centered AdamW returns its step, −lr·U: what is left to do is its
    projection off the shift.

    Args:
        bucket: members of one rule.
        into: contiguous tensors of the shape and dtype of the weights, for directions that are no gradient or state.
        refused: unless it is 0, no state changes and all directions are zero; only for members that `fusable` takes.
    """
    first = bucket[0]
    group = first.group
    if into is None:
        into = []
    if group["rule"] == "adamw":
        with phase(subject_of, "momentum", bucket):
            steps = _zeros(bucket, into)
            _adamw_step(bucket, steps, 0.0, refused)
        return steps
    with phase(subject_of, "momentum", bucket):
        gradients = [member.gradient for member in bucket]
        if first.gradient.dtype != first.weight.dtype:
            gradients = [gradient.to(first.weight.dtype) for gradient in gradients]
        beta, nesterov = group["momentum"], group["momentum_kind"] == "nesterov"
        if refused is None and beta == 0.0:
            return gradients
        buffers = [member.state["momentum_buffer"] for member in bucket] if beta else []
        if refused is None and not nesterov:
            return ema_(buffers, gradients, beta)
        if not all(fusable(member) for member in bucket):
            return nesterov_(buffers, gradients, beta)
        found = _zeros(bucket, into)
        # From zero, a step of SGD with the rate -1 is the direction: one launch for all, which the mask leaves undone.
        _sgd_(found, gradients, buffers, beta=beta, nesterov=nesterov, rate=-1.0, refused=refused)
        return found


def _zeros(bucket: Sequence[Member], into: Sequence[Tensor]) -> list[Tensor]:
    found = list(into) or [torch.empty_like(member.weight) for member in bucket]
    torch._foreach_zero_(found)
    return found


def apply(
    bucket: Sequence[Member], updates: list[Tensor], *, factor: float = 1.0, refused: Tensor | None = None
) -> None:
    """The half of a step after the rule, element by element: `W ← (1 − lr·wd) W − lr·radius·factor·U`.

    Args:
        bucket: members of one rule.
        updates: U of each, times `scale` where that is not `factor`; overwritten.
        factor: one scale for all.
        refused: unless it is 0, no weight changes; only for members that `fusable` takes.
    """
    with phase(subject_of, "write", bucket):
        if refused is not None:  # which only the fused operations take
            updates = [one.contiguous() for one in updates]
        if all(fusable(member) for member in bucket) and all(one.is_contiguous() for one in updates):
            alike: dict[Hashable, list[int]] = {}
            for index, member in enumerate(bucket):
                rates = [member.group[key] for key in ("lr", "weight_decay", "radius")]
                # Tensors cannot be compared without waiting for the device: the same tensor, or another rate.
                same = tuple(id(rate) if isinstance(rate, Tensor) else rate for rate in rates)
                alike.setdefault(same, []).append(index)
            for which in alike.values():
                _write_fused([bucket[index] for index in which], [updates[index] for index in which], factor, refused)
        else:
            assert refused is None
            _write(bucket, updates, factor)
    _write_back(bucket)


def _write_fused(bucket: Sequence[Member], updates: list[Tensor], factor: float, refused: Tensor | None) -> None:
    """Decay and step of members with the same rates, in one launch for all."""
    group, weights = bucket[0].group, [member.weight for member in bucket]
    lr, decay = group["lr"], group["weight_decay"]
    adamw = group["rule"] == "adamw"  # whose updates are steps: W + S - lr·wd·W
    if isinstance(decay, Tensor) or (adamw and isinstance(lr, Tensor)):
        _decay_(weights, lr * decay, refused)
        decay = 0.0
    if adamw:
        _sgd_(weights, updates, [], rate=-1.0, decay=-lr * decay if decay else 0.0, refused=refused)
        return
    length = group["radius"] * factor
    if not SHORTEST <= length <= 1 / SHORTEST:  # or decay / length could leave the range of float32
        torch._foreach_mul_(updates, length)
        length = 1.0
    _sgd_(weights, updates, [], rate=lr * length, decay=decay / length, refused=refused)


def _decay_(weights: list[Tensor], rate: Tensor, refused: Tensor | None) -> None:
    """`W ← W − rate·W` for a rate on the device, because the decay that torch's fused operations take is a number.

    A step of SGD with the weights as gradients, and not a product with 1 − rate, which would be rounded in the same
    direction at every step.
    """
    _sgd_(weights, weights, [], rate=rate, refused=refused)


def _sgd_(
    tensors: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    *,
    rate: float | Tensor,
    beta: float = 0.0,
    nesterov: bool = False,
    decay: float = 0.0,
    refused: Tensor | None = None,
) -> None:
    """torch's fused SGD: with G' = G + decay·W, B ← β B + G' (or, no Nesterov, + (1−β) G'), W ← W − rate·(...)."""
    sgd(
        tensors,
        gradients,
        list(buffers),
        has_sparse_grad=False,
        foreach=False,
        fused=True,
        found_inf=refused,
        weight_decay=decay,
        momentum=beta,
        lr=rate.float() if isinstance(rate, Tensor) else rate,  # type: ignore[arg-type]  # torch takes tensors too
        dampening=0.0 if nesterov else beta,
        nesterov=nesterov,
        maximize=False,
    )


def _write(bucket: Sequence[Member], updates: list[Tensor], factor: float) -> None:
    """The same by operations that look at strides."""
    weights, groups = [member.weight for member in bucket], [member.group for member in bucket]
    _scale_(weights, [1.0 - group["lr"] * group["weight_decay"] for group in groups])
    if groups[0]["rule"] != "adamw":
        _scale_(updates, [-group["lr"] * group["radius"] * factor for group in groups])
    torch._foreach_add_(weights, updates)


def _scale_(tensors: list[Tensor], factors: list[Any]) -> None:
    """Each tensor times its factor, in place; factors are numbers or tensors of one number."""
    if any(isinstance(factor, Tensor) for factor in factors):
        for tensor, factor in zip(tensors, factors, strict=True):
            tensor.mul_(factor)
    elif not all_equal(factors):
        torch._foreach_mul_(tensors, factors)
    elif factors[0] != 1.0:
        torch._foreach_mul_(tensors, factors[0])


def _write_back(bucket: Sequence[Member]) -> None:
    masters = [member for member in bucket if member.weight is not member.parameter]
    if masters:
        with phase(subject_of, "write", masters):
            torch._foreach_copy_([member.parameter for member in masters], [member.weight for member in masters])


def _adamw_step(
    bucket: Sequence[Member], weights: list[Tensor], weight_decay: float, refused: Tensor | None = None
) -> None:
    """torch's own AdamW, called as `torch.optim.AdamW(fused=True)` calls it."""
    group = bucket[0].group
    gradients = [_stored_like(member.weight, member.gradient) for member in bucket]
    averages, squares = ([member.state[key] for member in bucket] for key in ("exp_avg", "exp_avg_sq"))
    fused = all(fusable(member) for member in bucket)
    assert fused or refused is None
    adamw(
        weights,
        gradients,
        averages,
        squares,
        [],
        [member.state["step"] for member in bucket],
        fused=fused,
        found_inf=refused,
        capturable=weights[0].is_cuda and not fused,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"].float() if isinstance(group["lr"], Tensor) else group["lr"],
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=False,
    )


def _stored_like(weight: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the dtype and with the strides of a weight."""
    if gradient.dtype == weight.dtype and gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight).copy_(gradient)


def all_equal(numbers: list[Any]) -> bool:
    """Whether all numbers of a list that is not empty are the same."""
    return numbers.count(numbers[0]) == len(numbers)
