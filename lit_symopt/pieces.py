"""Buckets in pieces that borrow no more scratch memory than they may: some of the parameters, or some cells of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch

from lit_symopt.errors import ConfigError
from lit_symopt.groups import layout_of
from lit_symopt.layout import Layout, Shape
from lit_symopt.linalg.execution import Backend
from lit_symopt.linalg.low_precision import is_low_precision, polar_scratch_bytes
from lit_symopt.linalg.polar import Precision, method_for
from lit_symopt.member import Member
from lit_symopt.rules.centering import working_dtype
from lit_symopt.rules.rows import POLAR, SPECTRAL
from lit_symopt.scratch import MIB

USUAL = 256 * MIB
"""Bytes of scratch memory where no bound is given and a matrix needs no more."""

IN_CACHE = 64 * MIB
"""Bytes of scratch of a piece on a CPU where products are in bfloat16, unless a bound is given: what the products
touch, a third of it, stays in a cache of 32 MiB, and there are few enough pieces that calls cost nothing (2 cores)."""


def pieces(bucket: Sequence[Member]) -> Iterator[tuple[Sequence[Member], Layout, Shape]]:
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
        raise too_small(options, need, shape, of)
    if given is not None:
        bound = int(given * MIB)
    elif device_type == "cpu" and _in_cache(options["rule"], options["precision"], layout, shape, dtype):
        bound = IN_CACHE
    else:
        bound = USUAL
    return max(1, min(count, bound // max(need, 1)))


@lru_cache(maxsize=4096)
def _in_cache(rule: str, precision: Precision, layout: Layout, shape: Shape, dtype: torch.dtype) -> bool:
    """Whether an update on a CPU is products in low precision, which are faster the nearer their factors are."""
    if rule not in POLAR:
        return False
    of = partial(method_for, precision, dtype=dtype, device_type="cpu")
    return any(is_low_precision(of(side=min(part.m, part.n))) for part in layout.parts(shape))


def too_small(options: Mapping[str, Any], need: int, shape: Sequence[int], of: str) -> ConfigError:
    """The error for an update that needs `need` bytes of scratch memory where the group allows less."""
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
    backend: Backend,
) -> int:
    entries = prod(shape)
    found = 2 * entries * dtype.itemsize  # directions, and gradients that are of another dtype
    if rule not in POLAR:
        return found + 6 * entries * working_dtype(dtype, precision).itemsize
    for part in layout.parts(shape):
        side, entries = min(part.m, part.n), part.count * part.m * part.n
        method = method_for(precision, dtype=dtype, device_type=device_type, side=side)
        if is_low_precision(method):
            found += entries * dtype.itemsize * (2 if rule in SPECTRAL and not centered else 6)
            found += part.count * polar_scratch_bytes(part.m, part.n, dtype=dtype, method=method)
            if backend == "cpp":
                found += part.count * _cpp_bytes(part.m, part.n)
        else:
            found += torch.float64.itemsize * (6 * entries + 6 * part.count * side * side)
    return found


def scratch_bytes(
    options: Mapping[str, Any], layout: Layout, shape: Shape, *, dtype: torch.dtype, device_type: str
) -> int:
    """An upper bound of the memory that the update of one tensor borrows, in bytes.

    Args:
        options: of a group: `rule`, `precision`, `centered`, and `backend` if it is not `auto`.
        layout: how the tensor holds its matrices.
        shape: of the tensor.
        dtype: of the weight.
        device_type: where it is.
    """
    rule, precision, centered = (options[key] for key in ("rule", "precision", "centered"))
    backend = options.get("backend", "auto")
    return _scratch_bytes(rule, precision, centered, layout, shape, dtype, device_type, backend)


def _cpp_bytes(m: int, n: int) -> int:
    from lit_symopt.cpp.polar import workspace_bytes

    return workspace_bytes(m, n)
