"""Steps that are taken as a whole, from gradient to weight: by one kernel, or block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from lit_symopt import row_step
from lit_symopt.backends.choice import Part, takes
from lit_symopt.backends.rows import row_step_by_backend
from lit_symopt.cpp import row_step as cpp
from lit_symopt.cpp.polar import Place, places, spectral_step, workspace_bytes
from lit_symopt.groups import layout_of
from lit_symopt.layout import Layout, Shape
from lit_symopt.linalg.execution import Execution
from lit_symopt.member import Member
from lit_symopt.pieces import USUAL, too_small
from lit_symopt.rules import get_rule, scale_factor
from lit_symopt.rules.rows import SPECTRAL
from lit_symopt.scratch import MIB, Scratch

WholeStep = Literal["row_step", "spectral_step"]


def taken_as_a_whole(bucket: Sequence[Member]) -> WholeStep | None:
    """Which whole step the update of a bucket is, momentum and write included; `None` for none."""
    group, weight = bucket[0].group, bucket[0].weight
    if group["rule"] != "row_norm" and group["rule"] not in SPECTRAL:
        return None
    layout, shape = layout_of(group, weight.shape), tuple(weight.shape)
    if group["backend"] not in ("auto", "eager"):
        part = part_by_backend(group, layout, shape, dtype=weight.dtype, device_type=weight.device.type)
        if group["backend"] == "cpp" and not all(_all_float32(member) for member in bucket):
            return None
        return None if part == "polar" else part
    rows = group["rule"] == "row_norm" and all(
        row_step.takes(group, layout, *member.written(), *member.state.values(), count=len(bucket)) for member in bucket
    )
    return "row_step" if rows else None


def _all_float32(member: Member) -> bool:
    """Not so in a model that was moved to another dtype, whose momentum goes the general way."""
    return all(tensor.dtype == torch.float32 for tensor in (member.weight, *member.state.values()))


def part_by_backend(
    group: Mapping[str, Any], layout: Layout, shape: Shape, *, dtype: torch.dtype, device_type: str
) -> Part | None:
    """What of the update of a parameter the group's backend takes over from `eager`; `None` for nothing.

    Args:
        group: of the optimizer.
        layout, shape: of the parameter.
        dtype: of the weight that is updated, so float32 for parameters in half precision.
        device_type: where it is.
    """
    longest = max(part.n for part in layout.parts(shape))
    part = takes(group["backend"], group, dtype=dtype, device_type=device_type, longest_row=longest)
    if part in ("row_step", "spectral_step") and not _in_place(layout, shape):
        return "polar" if part == "spectral_step" else None
    return part


@lru_cache(maxsize=4096)
def _in_place(layout: Layout, shape: Shape) -> bool:
    """Whether the matrices of a tensor are views of it, so that writing them writes it."""
    like = torch.empty(shape, device="meta")
    return all(part is like or part._base is like for part in layout.to_matrices(like))


def whole_step(part: WholeStep, bucket: Sequence[Member], *, scratch: Scratch, refused: Tensor | None) -> None:
    """Update the members of a bucket in place.

    Args:
        part: of `taken_as_a_whole`.
        bucket: members that share what `Member.bucket` says.
        scratch: lends what the step borrows.
        refused: a float32 scalar on the device: unless it is 0, nothing changes.

    Raises:
        ConfigError: if one matrix needs more scratch memory than the group's option `scratch` allows.
    """
    require_scratch_of_a_whole(part, bucket[0])
    if part == "row_step":
        for member in bucket:
            _update_rows(member, scratch, refused)
    elif refused is None or not bool(refused):  # on a CPU, where looking costs nothing
        for masters in (True, False):
            members = [member for member in bucket if (member.weight is not member.parameter) == masters]
            if members:
                _update_spectral(members, scratch, masters=masters)


def require_scratch_of_a_whole(part: WholeStep, member: Member) -> None:
    """Make sure that the group's option `scratch` is enough for a step of a member.

    Raises:
        ConfigError: if one matrix needs more.
    """
    group, shape = member.group, tuple(member.weight.shape)
    if group["scratch"] is None:
        return
    layout = layout_of(group, shape)
    if part == "row_step":
        needs = {tuple(rows.shape): _row_step_bytes(rows, group) for rows in layout.to_matrices(member.weight)}
    else:
        needs = {(one.m, one.n): workspace_bytes(one.m, one.n) for one in layout.parts(shape)}
    for matrix, need in needs.items():
        if need > group["scratch"] * MIB:
            raise too_small(group, need, matrix, member.name)


def _row_step_bytes(rows: Tensor, group: Mapping[str, Any]) -> int:
    if group["backend"] == "cpp":
        return cpp.scratch_bytes(rows, centered=group["centered"], damped=group["row_damping"] != 0)
    return row_step.scratch_bytes(rows, centered=group["centered"])


def _update_rows(member: Member, scratch: Scratch, refused: Tensor | None) -> None:
    group, weight = member.group, member.weight
    layout = layout_of(group, weight.shape)
    tensors = (
        weight,
        member.gradient,
        member.state["momentum_buffer"] if group["momentum"] else None,
        None if member.parameter is weight else member.parameter,
    )
    batches = [
        [None] * len(layout.parts(weight.shape)) if tensor is None else layout.to_matrices(tensor) for tensor in tensors
    ]
    for rows, gradient, momentum, parameter in zip(*batches, strict=True):
        assert rows is not None
        assert gradient is not None
        with scratch.lend():
            row_step_by_backend(
                rows,
                gradient,
                momentum,
                how=Execution(backend=group["backend"], scratch=scratch),
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                beta=group["momentum"],
                nesterov=group["momentum_kind"] == "nesterov",
                scale=group["radius"] * row_step.analytic(group["scale"], rows.shape[-1]),
                row_damping=group["row_damping"],
                centered=group["centered"],
                admitted=None if refused is None else refused == 0,
                parameter=parameter,
            )


def _update_spectral(bucket: Sequence[Member], scratch: Scratch, *, masters: bool) -> None:
    """All members at once: what is borrowed does not grow with how many they are."""
    group, shape = bucket[0].group, tuple(bucket[0].weight.shape)
    layout, rule = layout_of(group, shape), get_rule(group["rule"])
    tensors = (
        [member.weight for member in bucket],
        [member.gradient for member in bucket],
        [member.state["momentum_buffer"] for member in bucket] if group["momentum"] else [],
        [member.parameter for member in bucket] if masters else [],
    )
    contiguous = all(tensor.is_contiguous() for which in tensors for tensor in which)
    batches = [] if contiguous else [[layout.to_matrices(tensor) for tensor in which] for which in tensors]
    rates = [float(member.group["lr"]) for member in bucket]
    for index, part in enumerate(layout.parts(shape)):
        views = [[parts[index] for parts in which] for which in batches]
        weights, gradients, momenta, parameters = tensors if contiguous else views
        scale = scale_factor(
            group["scale"],
            rule=rule,
            momentum=weights[0],
            update=torch.empty(part.count, part.m, part.n, device="meta"),
            fan_out=part.fan_out,
            fan_in=part.fan_in,
        )
        spectral_step(
            weights,
            gradients,
            momenta,
            lr=[rate * member.group["radius"] * scale for rate, member in zip(rates, bucket, strict=True)],
            weight_decay=[
                rate * float(member.group["weight_decay"]) for rate, member in zip(rates, bucket, strict=True)
            ],
            beta=group["momentum"],
            nesterov=group["momentum_kind"] == "nesterov",
            parameters=parameters,
            within=_places(layout, shape)[index] if contiguous else (),
            scratch=scratch,
            bound=USUAL if group["scratch"] is None else group["scratch"] * MIB,
        )


@lru_cache(maxsize=4096)
def _places(layout: Layout, shape: Shape) -> list[list[Place]]:
    """Where the matrices of each part of a contiguous tensor lie."""
    return [places(part) for part in layout.to_matrices(torch.empty(shape, device="meta"))]
