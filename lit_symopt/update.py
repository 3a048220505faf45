"""What one step does to a batch of equal parameters.

A *bucket* is a list of parameters that differ in nothing an update depends on except their learning rate, decay and
radius: same rule and options, same layout, shape, dtype and device. It is updated as one batch `[K, *shape]`, so the
number of operations does not grow with the number of layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lit_symopt.errors import ConfigError, TaxonomyError
from lit_symopt.groups import layout_of
from lit_symopt.layout import Layout
from lit_symopt.rules import ema_, get_rule, nesterov_, project, scale_factor

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
        where = (layout_of(group, weight), tuple(weight.shape), weight.dtype, weight.device)
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

    def touched(self) -> list[Tensor]:
        """Every tensor that a step writes."""
        return [*self.state.values(), self.weight, *([] if self.weight is self.parameter else [self.parameter])]


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
    if bucket[0].group["rule"] != "adamw":
        _matrix_step(bucket)
    elif bucket[0].group["centered"]:
        _centered_adamw_step(bucket)
    else:
        _adamw_step(bucket, [member.weight for member in bucket], bucket[0].group["weight_decay"])
    masters = [member for member in bucket if member.weight is not member.parameter]
    if masters:
        torch._foreach_copy_([member.parameter for member in masters], [member.weight for member in masters])


def direction_to_update(direction: Tensor, *, group: dict[str, Any], layout: Layout, shape: Sequence[int]) -> Tensor:
    """Rule and scale for a stack of equal parameters.

    Args:
        direction: momentum, `[K, *shape]`; not written.
        group: options of the rule.
        layout: how each `[*shape]` holds its matrices.
        shape: of one parameter.

    Returns:
        `scale · U`, `[K, *shape]`.
    """
    rule = get_rule(group["rule"])
    options = {key: group[key] for key in ("centered", "precision", "eps", "row_damping")}
    updates = []
    for part, matrices in zip(layout.parts(shape), layout.to_matrices(direction, batch_dims=1), strict=True):
        result = rule.function(matrices, **options)
        factor = scale_factor(
            group["scale"],
            rule=rule,
            momentum=matrices,
            update=result,
            fan_out=part.fan_out,
            fan_in=part.fan_in,
            alpha=1.0 if group["alpha"] is None else group["alpha"],
            centered=group["centered"],
            eps=group["eps"],
            row_damping=group["row_damping"],
        )
        updates.append(result * factor)
    return layout.from_matrices(updates, shape, batch_dims=1)


def _matrix_step(bucket: Sequence[Member]) -> None:
    """`M ← momentum(M, G)`, `W ← (1 − lr·wd) W − lr·radius·scale·U(M)`."""
    first = bucket[0]
    directions = [member.gradient for member in bucket]
    if first.group["momentum"] > 0.0:
        accumulate = nesterov_ if first.group["momentum_kind"] == "nesterov" else ema_
        buffers = [member.state["momentum_buffer"] for member in bucket]
        directions = accumulate(buffers, directions, first.group["momentum"])
    layout, shape = layout_of(first.group, first.weight), first.weight.shape
    _refuse_partitions(bucket, layout)
    updates = direction_to_update(torch.stack(directions), group=first.group, layout=layout, shape=shape)
    weights, groups = [member.weight for member in bucket], [member.group for member in bucket]
    torch._foreach_mul_(weights, [1.0 - group["lr"] * group["weight_decay"] for group in groups])
    steps = torch._foreach_mul(list(updates.unbind()), [-group["lr"] * group["radius"] for group in groups])
    torch._foreach_add_(weights, steps)


def _refuse_partitions(bucket: Sequence[Member], layout: Layout) -> None:
    """A layout that fitted when the optimizer was built and no longer does: somebody has flattened the parameters."""
    try:
        layout.parts(bucket[0].weight.shape)
    except TaxonomyError as error:
        raise ConfigError(
            f"{bucket[0].name!r} is not the matrix the optimizer was built with ({error}). A strategy such as "
            f"DeepSpeed ZeRO has put flat partitions in its place, which is not supported yet; use one device or DDP."
        ) from error


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


def _centered_adamw_step(bucket: Sequence[Member]) -> None:
    """AdamW whose step is projected off the shift: `W ← (1 − lr·wd) W − lr·Π U`."""
    group, weight = bucket[0].group, bucket[0].weight
    steps = [torch.zeros_like(member.weight) for member in bucket]  # becomes −lr·U
    _adamw_step(bucket, steps, 0.0)
    layout = layout_of(group, weight)
    matrices = layout.to_matrices(torch.stack(steps), batch_dims=1)
    centered = layout.from_matrices([project(matrix) for matrix in matrices], weight.shape, batch_dims=1)
    weights = [member.weight for member in bucket]
    torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
    torch._foreach_add_(weights, list(centered.unbind()))
