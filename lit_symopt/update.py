"""What one step does to a batch of equal parameters.

A *bucket* is a list of parameters that differ in nothing an update depends on except their learning rate, decay and
radius: same rule and options, same layout, shape, dtype and device. It is updated as one batch `[K, *shape]`, so the
number of operations does not grow with the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lit_symopt.groups import layout_of
from lit_symopt.layout import Layout
from lit_symopt.ranges import EVERYTHING, Subject, phase
from lit_symopt.rules import ema_, get_rule, nesterov_, project, scale_factor
from lit_symopt.rules.rows import WHOLE, Rows

# Options that decide what a matrix rule computes; lr, weight_decay and radius may differ within a bucket.
_RULE_OPTIONS = ("rule", "centered", "momentum", "momentum_kind", "scale", "alpha", "eps", "row_damping", "precision")


@dataclass(frozen=True)
class Member:
    """One parameter in a step.

    Attributes:
        name: for errors.
        gradient: in the dtype of the arithmetic.
        weight: what is updated: the parameter itself, or its fp32 master.
        parameter: where a master is written back.
        group: the parameter group.
        state: the optimizer state.
    """

    name: str
    gradient: Tensor
    weight: Tensor
    parameter: Tensor
    group: dict[str, Any]
    state: dict[str, Tensor]

    def bucket(self) -> Hashable:
        """What members must share to be updated together."""
        group, weight = self.group, self.weight
        where = (layout_of(group, weight.shape), tuple(weight.shape), weight.dtype, weight.device)
        if group["rule"] == "adamw":
            return (
                "adamw",
                group["centered"],
                group["betas"],
                group["eps"],
                group["lr"],
                group["weight_decay"],
                *where,
            )
        return (*(group[option] for option in _RULE_OPTIONS), *where)

    def written(self) -> list[Tensor]:
        """The weights that a step writes."""
        return [self.weight, *([] if self.weight is self.parameter else [self.parameter])]

    def touched(self) -> list[Tensor]:
        """Every tensor that a step writes."""
        return [*self.state.values(), *self.written()]


def subject_of(members: Sequence[Member]) -> Subject:
    """What a range says of members of one rule: elements by role, and the shape of the batch."""
    elements: dict[str, int] = {}
    for member in members:
        role = str(member.group["role"])
        elements[role] = elements.get(role, 0) + member.weight.numel()
    first = members[0]
    alike = all(member.weight.shape == first.weight.shape for member in members)
    shape = (len(members), *first.weight.shape) if alike else (sum(elements.values()),)
    return Subject(rule=first.group["rule"], elements=elements, shape=shape)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; shares its storage."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def make_state(member: Member) -> None:
    """Create the state a rule keeps: nothing, one momentum an element, or AdamW's two."""
    state, weight, group = member.state, member.weight, member.group
    if group["rule"] == "adamw":
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        if weight.is_cuda and not state["step"].is_cuda:
            # The step counter lies on the device, so that a refused step can be masked without asking. A checkpoint
            # brings it back on the host.
            state["step"] = state["step"].to(weight.device)
    elif group["momentum"] > 0.0 and "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)


def update(bucket: Sequence[Member]) -> None:
    """Update every member of a bucket in place."""
    first = bucket[0]
    if first.group["rule"] == "adamw" and not first.group["centered"]:
        update_elements(bucket)
        return
    of = partial(subject_of, bucket)
    layout, shape = layout_of(first.group, first.weight.shape), first.weight.shape
    found = directions(bucket)
    with phase(of, "pack"):
        stack = torch.stack(found) if len(found) > 1 else found[0].unsqueeze(0)
    updates = direction_to_update(stack, group=first.group, layout=layout, shape=shape, of=of)
    apply(bucket, list(updates.unbind()))


def update_elements(bucket: Sequence[Member]) -> None:
    """AdamW as it is, element by element: shapes do not matter."""
    with phase(subject_of, "rule", bucket):
        _adamw_step(bucket, [member.weight for member in bucket], bucket[0].group["weight_decay"])
    _write_back(bucket)


def directions(bucket: Sequence[Member]) -> list[Tensor]:
    """The half of a step before the rule, element by element: state ← gradient; returns what the rule is applied to.

    `M ← momentum(M, G)` returns M, to be read only. Centered AdamW returns its step, −lr·U: what is left to do is its
    projection off the shift.
    """
    first = bucket[0]
    if first.group["rule"] == "adamw":
        with phase(subject_of, "momentum", bucket):
            steps = [torch.zeros_like(member.weight) for member in bucket]
            _adamw_step(bucket, steps, 0.0)
        return steps
    gradients = [member.gradient for member in bucket]
    if first.group["momentum"] == 0.0:
        return gradients
    accumulate = nesterov_ if first.group["momentum_kind"] == "nesterov" else ema_
    with phase(subject_of, "momentum", bucket):
        return accumulate([member.state["momentum_buffer"] for member in bucket], gradients, first.group["momentum"])


def apply(bucket: Sequence[Member], updates: list[Tensor]) -> None:
    """The half of a step after the rule, element by element: `W ← (1 − lr·wd) W − lr·radius·scale·U`.

    Args:
        bucket: members of one rule.
        updates: scale · U of each; overwritten.
    """
    weights, groups = [member.weight for member in bucket], [member.group for member in bucket]
    with phase(subject_of, "write", bucket):
        torch._foreach_mul_(weights, [1.0 - group["lr"] * group["weight_decay"] for group in groups])
        if groups[0]["rule"] != "adamw":
            torch._foreach_mul_(updates, [-group["lr"] * group["radius"] for group in groups])
        torch._foreach_add_(weights, updates)
    _write_back(bucket)


def _write_back(bucket: Sequence[Member]) -> None:
    masters = [member for member in bucket if member.weight is not member.parameter]
    if masters:
        with phase(subject_of, "write", masters):
            torch._foreach_copy_([member.parameter for member in masters], [member.weight for member in masters])


def direction_to_update(
    direction: Tensor,
    *,
    group: Mapping[str, Any],
    layout: Layout,
    shape: Sequence[int],
    of: Callable[[], Subject] | Subject = EVERYTHING,
) -> Tensor:
    """Rule and scale for a stack of equal parameters.

    Args:
        direction: momentum, `[K, *shape]`; not written.
        group: options of the rule.
        layout: how each `[*shape]` holds its matrices.
        shape: of one parameter.
        of: what the ranges of a profiler say of the stack.

    Returns:
        `scale · U`, `[K, *shape]`.
    """
    with phase(of, "pack"):
        batches = layout.to_matrices(direction, batch_dims=1)
    updates = [
        matrices_to_update(matrices, options=group, fan_out=part.fan_out, fan_in=part.fan_in, of=of)
        for part, matrices in zip(layout.parts(shape), batches, strict=True)
    ]
    with phase(of, "pack"):
        return layout.from_matrices(updates, shape, batch_dims=1)


def matrices_to_update(
    matrices: Tensor,
    *,
    options: Mapping[str, Any],
    fan_out: int,
    fan_in: int,
    rows: Rows = WHOLE,
    of: Callable[[], Subject] | Subject = EVERYTHING,
) -> Tensor:
    """`scale · U` of a batch of matrices `[..., m, n]`; for centered AdamW, whose step they are, its projection.

    Args:
        matrices: momentum; not written.
        options: rule, scale and their options, as in a group.
        fan_out, fan_in: of each matrix as a linear map.
        rows: where the other rows of the matrices are, if not all are here.
        of: what the ranges of a profiler say of the matrices.
    """
    if options["rule"] == "adamw":
        with phase(of, "rule"):
            return project(matrices, rows=rows)
    rule = get_rule(options["rule"])
    of_the_rule = {key: options[key] for key in ("centered", "precision", "eps", "row_damping")}
    with phase(of, "rule"):
        update = rule.function(matrices, **of_the_rule, rows=rows)
    with phase(of, "scale"):
        factor = scale_factor(
            options["scale"],
            rule=rule,
            momentum=matrices,
            update=update,
            fan_out=fan_out,
            fan_in=fan_in,
            alpha=1.0 if options["alpha"] is None else options["alpha"],
            centered=options["centered"],
            eps=options["eps"],
            row_damping=options["row_damping"],
            rows=rows,
        )
        return (
            update if isinstance(factor, float) and factor == 1.0 else update.mul_(factor)
        )  # rules give fresh tensors


def _adamw_step(bucket: Sequence[Member], weights: list[Tensor], weight_decay: float) -> None:
    """torch's own AdamW, called as `torch.optim.AdamW` calls it."""
    group = bucket[0].group
    adamw(
        weights,
        [member.gradient for member in bucket],
        [member.state["exp_avg"] for member in bucket],
        [member.state["exp_avg_sq"] for member in bucket],
        [],
        [member.state["step"] for member in bucket],
        capturable=weights[0].is_cuda,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=False,
    )
