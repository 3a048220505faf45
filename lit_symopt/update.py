"""What one step does to a batch of equal parameters.

A *bucket* is a list of parameters that differ in nothing an update depends on except their learning rate, decay and
radius: same rule and options, same layout, shape, dtype and device. It is updated as one batch `[K, *shape]`, so the
number of operations does not grow with the number of layers. A batch that needs more scratch memory than it may borrow
is cut into *pieces*: some of the parameters, or some of the cells of one (experts of a stack, say).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_symopt.elements import all_equal, apply, directions, masked, update_elements
from lit_symopt.layout import Layout, Shape
from lit_symopt.linalg.execution import EAGER, Execution
from lit_symopt.linalg.polar import method_for
from lit_symopt.member import Member, subject_of
from lit_symopt.pieces import pieces
from lit_symopt.ranges import EVERYTHING, Subject, phase
from lit_symopt.rules import get_rule, project, scale_factor
from lit_symopt.rules.rows import SPECTRAL, WHOLE, Rows
from lit_symopt.rules.scale import NUCLEAR
from lit_symopt.scratch import FRESH, Scratch
from lit_symopt.whole_step import require_scratch_of_a_whole, taken_as_a_whole, whole_step


def update(bucket: Sequence[Member], *, scratch: Scratch = FRESH, refused: Tensor | None = None) -> None:
    """Update every member of a bucket in place.

    Args:
        bucket: members that share what `Member.bucket` says.
        scratch: lends the memory of intermediates.
        refused: a float32 scalar on the device: unless it is 0, nothing changes.

    Raises:
        ConfigError: if one matrix needs more scratch memory than the group's option `scratch` allows.
    """
    first = bucket[0]
    if (part := taken_as_a_whole(bucket)) is not None:
        with phase(subject_of, "rule", bucket):
            whole_step(part, bucket, scratch=scratch, refused=refused)
        return
    with masked(bucket, refused) as mask:
        if first.group["rule"] == "adamw" and not first.group["centered"]:
            update_elements(bucket, refused=mask)
            return
        for piece, layout, shape in pieces(bucket):
            with scratch.lend():
                _update_matrices(piece, layout, shape, scratch, mask)


def require_scratch(bucket: Sequence[Member]) -> None:
    """Make sure, before anything is written, that the group's option `scratch` is enough for the update of a bucket.

    Raises:
        ConfigError: if one matrix needs more.
    """
    group = bucket[0].group
    if group["scratch"] is None or (group["rule"] == "adamw" and not group["centered"]):
        return
    if (part := taken_as_a_whole(bucket)) is not None:
        require_scratch_of_a_whole(part, bucket[0])
    else:
        next(pieces(bucket))


def _update_matrices(
    bucket: Sequence[Member], layout: Layout, shape: Shape, scratch: Scratch, refused: Tensor | None
) -> None:
    """Update members that are one piece."""
    of = partial(subject_of, bucket)
    weight, group = bucket[0].weight, bucket[0].group
    how = Execution(backend=group["backend"], scratch=scratch)

    stack = scratch.empty((len(bucket), *shape), dtype=weight.dtype, device=weight.device)
    found = directions(_widened(bucket, scratch), into=stack.unbind(), refused=refused)
    with phase(of, "pack"):
        if found[0].data_ptr() == stack.data_ptr():
            packed = stack
        elif len(found) == 1 and found[0].dtype == weight.dtype:
            packed = found[0].unsqueeze(0)
        else:
            packed = scratch.like(stack, torch.bfloat16) if _in_bfloat16(group, layout, shape, weight) else stack
            torch._foreach_copy_(packed.unbind(), found)
    updates, factor = _update_and_factor(packed, group=group, layout=layout, shape=shape, of=of, how=how)
    if updates.dtype != weight.dtype or (refused is not None and not updates.is_contiguous()):
        with phase(of, "pack"):
            updates = stack.copy_(updates)
    apply(bucket, list(updates.unbind()), factor=factor, refused=refused)


def _widened(bucket: Sequence[Member], scratch: Scratch) -> Sequence[Member]:
    """The members with gradients of the dtype of their weights."""
    first = bucket[0]
    if first.gradient.dtype == first.weight.dtype:
        return bucket
    with phase(subject_of, "momentum", bucket):
        wide = [scratch.like(member.weight) for member in bucket]
        torch._foreach_copy_(wide, [member.gradient for member in bucket])
        return [replace(member, gradient=gradient) for member, gradient in zip(bucket, wide, strict=True)]


def _in_bfloat16(group: Mapping[str, Any], layout: Layout, shape: Shape, weight: Tensor) -> bool:
    """Whether nothing but a polar factor in bfloat16 is taken of the directions, so that they may come rounded."""
    if group["rule"] not in SPECTRAL or group["centered"] or group["scale"] in NUCLEAR:
        return False
    of = partial(method_for, group["precision"], dtype=weight.dtype, device_type=weight.device.type)
    return all(of(side=min(part.m, part.n)) == "bf16" for part in layout.parts(shape))


def direction_to_update(
    direction: Tensor,
    *,
    group: Mapping[str, Any],
    layout: Layout,
    shape: Sequence[int],
    of: Callable[[], Subject] | Subject = EVERYTHING,
    how: Execution = EAGER,
) -> Tensor:
    """Rule and scale for a stack of equal parameters.

    Args:
        direction: momentum, `[K, *shape]`; not written.
        group: options of the rule.
        layout: how each `[*shape]` holds its matrices.
        shape: of one parameter.
        of: what the ranges of a profiler say of the stack.
        how: by whose kernels and in whose memory.

    Returns:
        `scale · U`, `[K, *shape]`.
    """
    return _scaled(*_update_and_factor(direction, group=group, layout=layout, shape=shape, of=of, how=how), of)


def matrices_to_update(
    matrices: Tensor,
    *,
    options: Mapping[str, Any],
    fan_out: int,
    fan_in: int,
    rows: Rows = WHOLE,
    of: Callable[[], Subject] | Subject = EVERYTHING,
    how: Execution = EAGER,
) -> Tensor:
    """`scale · U` of a batch of matrices `[..., m, n]`; for centered AdamW, whose step they are, its projection.

    Args:
        matrices: momentum; not written.
        options: rule, scale and their options, as in a group.
        fan_out, fan_in: of each matrix as a linear map.
        rows: where the other rows of the matrices are, if not all are here.
        of: what the ranges of a profiler say of the matrices.
        how: by whose kernels and in whose memory.
    """
    found = _rule_and_factor(matrices, options=options, fan_out=fan_out, fan_in=fan_in, rows=rows, of=of, how=how)
    return _scaled(*found, of)


def _scaled(update: Tensor, factor: float, of: Callable[[], Subject] | Subject) -> Tensor:
    with phase(of, "scale"):
        return update if factor == 1.0 else update.mul_(factor)


def _update_and_factor(
    direction: Tensor,
    *,
    group: Mapping[str, Any],
    layout: Layout,
    shape: Sequence[int],
    of: Callable[[], Subject] | Subject,
    how: Execution,
) -> tuple[Tensor, float]:
    """U of a stack, and the scale that is left to do: the factor that all its matrices share, if they do."""
    with phase(of, "pack"):
        batches = layout.to_matrices(direction, batch_dims=1)
    found = [
        _rule_and_factor(matrices, options=group, fan_out=part.fan_out, fan_in=part.fan_in, rows=WHOLE, of=of, how=how)
        for part, matrices in zip(layout.parts(shape), batches, strict=True)
    ]
    factors = [factor for _, factor in found]
    if not all_equal(factors):
        with phase(of, "scale"):
            for update, factor in found:
                update.mul_(factor)
        factors = [1.0]
    with phase(of, "pack"):
        return layout.from_matrices([update for update, _ in found], shape, batch_dims=1), factors[0]


def _rule_and_factor(
    matrices: Tensor,
    *,
    options: Mapping[str, Any],
    fan_out: int,
    fan_in: int,
    rows: Rows,
    of: Callable[[], Subject] | Subject,
    how: Execution,
) -> tuple[Tensor, float]:
    """U of a batch of matrices, a tensor of its own, and an analytic scale; one that is measured is in U already."""
    if options["rule"] == "adamw":
        with phase(of, "rule"):
            return project(matrices, rows=rows), 1.0
    rule = get_rule(options["rule"])
    of_the_rule = {key: options[key] for key in ("centered", "precision", "eps", "row_damping")}
    with phase(of, "rule"):
        update = rule.function(matrices, **of_the_rule, rows=rows, how=how)
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
        return (update, factor) if isinstance(factor, float) else (update.mul_(factor), 1.0)
