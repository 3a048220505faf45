"""What one step does to a batch of equal parameters.

A *bucket* is a list of parameters that differ in nothing an update depends on except their learning rate, decay and
radius: same rule and options, same layout, shape, dtype and device. It is updated as one batch `[K, *shape]`, so the
number of operations does not grow with the number of layers. A batch that needs more scratch memory than it may borrow
is cut into *pieces*: some of the parameters, or some of the cells of one (experts of a stack, say).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from lit_symopt.backends.choice import Part, takes
from lit_symopt.backends.rows import row_step_by_backend
from lit_symopt.errors import ConfigError
from lit_symopt.finite import undone_unless
from lit_symopt.groups import layout_of
from lit_symopt.layout import Layout, Shape
from lit_symopt.linalg.execution import EAGER, Execution
from lit_symopt.linalg.polar import Precision, method_for, polar_scratch_bytes
from lit_symopt.ranges import EVERYTHING, Subject, phase
from lit_symopt.row_step import analytic
from lit_symopt.row_step import scratch_bytes as row_step_bytes
from lit_symopt.row_step import takes as row_step_takes
from lit_symopt.rules import ema_, get_rule, nesterov_, project, scale_factor
from lit_symopt.rules.centering import working_dtype
from lit_symopt.rules.rows import POLAR, WHOLE, Rows
from lit_symopt.rules.scale import NUCLEAR
from lit_symopt.scratch import FRESH, MIB, Scratch

# Options that decide what a matrix rule computes; lr, weight_decay and radius may differ within a bucket.
_RULE_OPTIONS = (
    "rule",
    "centered",
    "momentum",
    "momentum_kind",
    "scale",
    "alpha",
    "eps",
    "row_damping",
    "precision",
    "backend",
    "scratch",
)

BATCHED_BY = (*_RULE_OPTIONS, "layout", "betas", "radius", "master_weights")
"""Options of a group that decide who is updated together; rates are read at every step."""

SPECTRAL = frozenset({"spectral", "right_spectral", "left_spectral"})
"""The rules that are a polar factor and nothing else."""

FUSED = frozenset({"cpu", "cuda", "xpu", "mps"})
"""Types of devices on which torch has fused AdamW and SGD."""

KEPT = ("momentum_buffer", "exp_avg", "exp_avg_sq")
"""State with one number an element."""

USUAL = 256 * MIB
"""Bytes of scratch memory where no bound is given and a matrix needs no more."""

SHORTEST = 1e-12
"""Radius times scale, at least, by which a decay is divided."""

IN_CACHE = 64 * MIB
"""Bytes of scratch of a piece on a CPU where products are in bfloat16, unless a bound is given: what the products
touch, a third of it, stays in a cache of 32 MiB, and there are few enough pieces that calls cost nothing (2 cores)."""


@dataclass
class Member:
    """One parameter in a step, or some cells of one.

    Attributes:
        name: for errors.
        gradient: of this step; of the dtype of the parameter or of the weight.
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
        where = (layout_of(group, weight.shape), tuple(weight.shape), weight.dtype, self.gradient.dtype, weight.device)
        if group["rule"] == "adamw":
            # One rate for all: and two groups that have the same one now need not have it after the next step.
            return ("adamw", id(group), *where)
        return (*(group[option] for option in _RULE_OPTIONS), *where)

    def written(self) -> list[Tensor]:
        """The weights that a step writes."""
        return [self.weight, *([] if self.weight is self.parameter else [self.parameter])]

    def touched(self) -> list[Tensor]:
        """Every tensor that a step writes."""
        return [*self.state.values(), *self.written()]

    def part(self, cells: int, shape: Shape, which: slice) -> Member:
        """Some of the `cells` equal cells, of a shape, that the tensors consist of; shares their storage."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor.view(cells, *shape)[which] if tensor.numel() == self.weight.numel() else tensor

        weight = cut(self.weight)
        return replace(
            self,
            gradient=cut(self.gradient),
            weight=weight,
            parameter=weight if self.parameter is self.weight else cut(self.parameter),
            state={key: cut(value) for key, value in self.state.items()},
        )


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
        if weight.device.type != "cpu" and state["step"].device != weight.device:
            # The step counter lies on the device, so that a refused step can be masked without asking. A checkpoint
            # brings it back on the host.
            state["step"] = state["step"].to(weight.device)
    elif group["momentum"] > 0.0 and "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)


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
    if taken_by_rows(bucket):
        with phase(subject_of, "rule", bucket):
            for member in bucket:
                _update_rows(member, scratch, refused)
        return
    with masked(bucket, refused) as mask:
        if first.group["rule"] == "adamw" and not first.group["centered"]:
            update_elements(bucket, refused=mask)
            return
        for piece, layout, shape in _pieces(bucket):
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
    if not taken_by_rows(bucket):
        next(_pieces(bucket))
        return
    member = bucket[0]
    for rows in layout_of(group, member.weight.shape).to_matrices(member.weight):
        _require_row_scratch(group, rows, member.name)


def _require_row_scratch(group: Mapping[str, Any], rows: Tensor, of: str) -> None:
    need = row_step_bytes(rows, centered=group["centered"])
    if group["scratch"] is not None and need > group["scratch"] * MIB:
        raise _too_small(group, need, rows.shape, of)


def taken_by_rows(bucket: Sequence[Member]) -> bool:
    """Whether a step of row_norm is taken as a whole, momentum and write included."""
    group, weight = bucket[0].group, bucket[0].weight
    if group["rule"] != "row_norm":
        return False
    layout = layout_of(group, weight.shape)
    if group["backend"] not in ("auto", "eager"):
        shape = tuple(weight.shape)
        return part_by_backend(group, layout, shape, dtype=weight.dtype, device_type=weight.device.type) == "row_step"
    return all(
        row_step_takes(group, layout, *member.written(), *member.state.values(), count=len(bucket)) for member in bucket
    )


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
    return None if part == "row_step" and not _in_place(layout, shape) else part


@lru_cache(maxsize=4096)
def _in_place(layout: Layout, shape: Shape) -> bool:
    """Whether the matrices of a tensor are views of it, so that writing them writes it."""
    like = torch.empty(shape, device="meta")
    return all(part is like or part._base is like for part in layout.to_matrices(like))


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
        _require_row_scratch(group, rows, member.name)
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
                scale=group["radius"] * analytic(group["scale"], rows.shape[-1]),
                row_damping=group["row_damping"],
                centered=group["centered"],
                admitted=None if refused is None else refused == 0,
                parameter=parameter,
            )


@contextmanager
def masked(bucket: Sequence[Member], refused: Tensor | None) -> Iterator[Tensor | None]:
    """The mask that torch's fused operations take; where they cannot be used, every write is undone instead."""
    if refused is None or all(_fusable(member) for member in bucket):
        yield refused
        return
    with undone_unless(refused == 0, [tensor for member in bucket for tensor in member.touched()]):
        yield None


def _fusable(member: Member) -> bool:
    """Whether torch's fused operations can be used: they walk through memory and do not look at strides."""
    weight, kept = member.weight, [member.state[key] for key in KEPT if key in member.state]
    # The state of a model that was moved to another dtype keeps its own.
    return (
        weight.device.type in FUSED
        and all(tensor.is_contiguous() for tensor in (member.gradient, weight, *kept))
        and all(tensor.dtype == weight.dtype for tensor in kept)
    )


def update_elements(bucket: Sequence[Member], *, refused: Tensor | None = None) -> None:
    """AdamW as it is, element by element: shapes do not matter."""
    group, weights = bucket[0].group, [member.weight for member in bucket]
    decay = group["weight_decay"]
    with phase(subject_of, "rule", bucket):
        if isinstance(decay, Tensor):  # which AdamW does not take
            if all(_fusable(member) for member in bucket):
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
        refused: unless it is 0, no state changes and all directions are zero; only for members that `_fusable` takes.
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
        if not all(_fusable(member) for member in bucket):
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
        refused: unless it is 0, no weight changes; only for members that `_fusable` takes.
    """
    with phase(subject_of, "write", bucket):
        if refused is not None:  # which only the fused operations take
            updates = [one.contiguous() for one in updates]
        if all(_fusable(member) for member in bucket) and all(one.is_contiguous() for one in updates):
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
    elif not _equal(factors):
        torch._foreach_mul_(tensors, factors)
    elif factors[0] != 1.0:
        torch._foreach_mul_(tensors, factors[0])


def _equal(numbers: list[Any]) -> bool:
    return numbers.count(numbers[0]) == len(numbers)


def _write_back(bucket: Sequence[Member]) -> None:
    masters = [member for member in bucket if member.weight is not member.parameter]
    if masters:
        with phase(subject_of, "write", masters):
            torch._foreach_copy_([member.parameter for member in masters], [member.weight for member in masters])


def _pieces(bucket: Sequence[Member]) -> Iterator[tuple[Sequence[Member], Layout, Shape]]:
    """The bucket in pieces whose scratch memory stays within the group's bound: members, their layout and shape.

    Raises:
        ConfigError: if a single cell needs more.
    """
    first = bucket[0]
    shape = tuple(first.weight.shape)
    layout = layout_of(first.group, shape)
    count, cell, cell_shape = _cells(layout, shape)
    # AdamW counts steps by the parameter, and cells of a tensor with gaps are no views of it.
    if first.group["rule"] == "adamw" or not all(_contiguous(member) for member in bucket):
        count, cell, cell_shape = 1, layout, shape
    at_once = piece_size(
        count * len(bucket),
        first.group,
        cell,
        cell_shape,
        dtype=first.weight.dtype,
        device_type=first.weight.device.type,
        of=first.name,
    )
    if at_once < count:
        size = _even(count, at_once)
        for member in bucket:
            for start in range(0, count, size):
                part = member.part(count, cell_shape, slice(start, start + size))
                yield [part], Layout.experts(cell), tuple(part.weight.shape)
        return
    size = _even(len(bucket), at_once // count)
    for start in range(0, len(bucket), size):
        yield bucket[start : start + size], layout, shape


def piece_size(
    count: int,
    options: Mapping[str, Any],
    layout: Layout,
    shape: Shape,
    *,
    dtype: torch.dtype,
    device_type: str,
    of: str,
) -> int:
    """How many of `count` equal tensors are updated at once within the group's bound of scratch memory; at least one.

    Args:
        count: how many there are.
        options: of a group: `rule`, `precision`, `scratch` in MiB. Without one, it is `USUAL`, on a CPU what fits its
            cache if that is faster, and one tensor where that is more.
        layout, shape: of each.
        dtype: of the weights.
        device_type: where they are.
        of: what they are, for the error.

    Raises:
        ConfigError: if one alone needs more.
    """
    need = scratch_bytes(options, layout, shape, dtype=dtype, device_type=device_type)
    given = options["scratch"]
    if given is not None and need > given * MIB:
        raise _too_small(options, need, shape, of)
    if given is not None:
        bound = int(given * MIB)
    elif device_type == "cpu" and _in_cache(options["rule"], options["precision"], layout, shape, dtype):
        bound = IN_CACHE
    else:
        bound = USUAL
    return max(1, min(count, bound // max(need, 1)))


@lru_cache(maxsize=4096)
def _in_cache(rule: str, precision: Precision, layout: Layout, shape: Shape, dtype: torch.dtype) -> bool:
    """Whether an update on a CPU is products in bfloat16, which are faster the nearer their factors are."""
    if rule not in POLAR:
        return False
    of = partial(method_for, precision, dtype=dtype, device_type="cpu")
    return any(of(side=min(part.m, part.n)) == "bf16" for part in layout.parts(shape))


def _too_small(options: Mapping[str, Any], need: int, shape: Sequence[int], of: str) -> ConfigError:
    return ConfigError(
        f"scratch={options['scratch']} MiB does not hold the update of one matrix of {of!r}: the rule "
        f"{options['rule']!r} needs {-(-need // MIB)} MiB for a shape of {tuple(shape)}; set scratch to at least that, "
        "or leave it out"
    )


def _even(count: int, at_most: int) -> int:
    """The size of pieces of `count` that are as large as each other and no larger than `at_most`.

    >>> _even(9, 8)
    5
    """
    return -(-count // -(-count // at_most))


@lru_cache(maxsize=4096)
def _cells(layout: Layout, shape: Shape) -> tuple[int, Layout, Shape]:
    """Number, layout and shape of the cells of a tensor, if all are equal; else the tensor is the one cell."""
    cells = layout.cells(shape)
    return (len(cells), *cells[0]) if len(set(cells)) == 1 else (1, layout, shape)


def _contiguous(member: Member) -> bool:
    tensors = (member.gradient, member.weight, member.parameter, *member.state.values())
    return all(tensor.is_contiguous() for tensor in tensors)


@lru_cache(maxsize=4096)
def _scratch_bytes(
    rule: str,
    precision: Precision,
    centered: bool,
    layout: Layout,
    shape: Shape,
    dtype: torch.dtype,
    device_type: str,
) -> int:
    entries = prod(shape)
    found = 2 * entries * dtype.itemsize  # directions, and gradients that are of another dtype
    if rule not in POLAR:
        return found + 6 * entries * working_dtype(dtype, precision).itemsize
    for part in layout.parts(shape):
        side, entries = min(part.m, part.n), part.count * part.m * part.n
        method = method_for(precision, dtype=dtype, device_type=device_type, side=side)
        if method == "bf16":
            found += entries * dtype.itemsize * (2 if rule in SPECTRAL and not centered else 6)
            found += part.count * polar_scratch_bytes(part.m, part.n, dtype=dtype)
        else:
            found += torch.float64.itemsize * (6 * entries + 6 * part.count * side * side)
    return found


def scratch_bytes(
    options: Mapping[str, Any], layout: Layout, shape: Shape, *, dtype: torch.dtype, device_type: str
) -> int:
    """An upper bound of the memory that the update of one tensor borrows, in bytes.

    Args:
        options: of a group: `rule`, `precision`, `centered`.
        layout: how the tensor holds its matrices.
        shape: of the tensor.
        dtype: of the weight.
        device_type: where it is.
    """
    rule, precision, centered = (options[key] for key in ("rule", "precision", "centered"))
    return _scratch_bytes(rule, precision, centered, layout, shape, dtype, device_type)


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
    if not _equal(factors):
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


def _adamw_step(
    bucket: Sequence[Member], weights: list[Tensor], weight_decay: float, refused: Tensor | None = None
) -> None:
    """torch's own AdamW, called as `torch.optim.AdamW(fused=True)` calls it."""
    group = bucket[0].group
    gradients = [_stored_like(member.weight, member.gradient) for member in bucket]
    averages, squares = ([member.state[key] for member in bucket] for key in ("exp_avg", "exp_avg_sq"))
    fused = all(_fusable(member) for member in bucket)
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
