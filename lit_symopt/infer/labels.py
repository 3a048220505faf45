"""Labels: which unit (output row) of a linear map each entry of a tensor comes from.

A *label* is an integer tensor of the tensor's shape, -1 where an entry comes from elsewhere. Labels are mostly expanded
views of one short vector and take no memory.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# More labels an entry than this (a sum of that many units) are nothing a rotary embedding does.
MOST_LABELS = 4


def counting(shape: Iterable[int], dim: int) -> Tensor:
    """The index in dimension `dim`, as a tensor of the shape that takes no memory."""
    shape = tuple(shape)
    view = [1] * len(shape)
    view[dim] = shape[dim]
    return torch.arange(shape[dim], dtype=torch.int32).view(view).expand(shape)


def varies(label: Tensor, dim: int) -> bool:
    """Whether a label differs along a dimension."""
    if label.shape[dim] < 2 or label.stride(dim) == 0 or label.numel() == 0:
        return False
    return bool((label != label.narrow(dim, 0, 1)).any())


def varying(label: Tensor) -> tuple[int, ...]:
    """The dimensions along which a label differs."""
    return tuple(dim for dim in range(label.dim()) if varies(label, dim))


def compact(label: Tensor) -> Tensor:
    """The same label, with every dimension along which it is constant expanded from one entry."""
    small = label
    for dim in range(label.dim()):
        if label.shape[dim] and not varies(label, dim):
            small = small.narrow(dim, 0, 1)
    return small.clone().expand(label.shape)


def along(label: Tensor, dim: int) -> Tensor | None:
    """The label as a vector along one dimension, or None if it differs along another one too."""
    dim %= label.dim()
    if label.numel() == 0 or any(other != dim for other in varying(label)):
        return None
    for other in reversed(range(label.dim())):
        label = label if other == dim else label.select(other, 0)
    return label.clone()


def rows(labels: tuple[Tensor, ...], dim: int) -> tuple[Tensor, Tensor]:
    """The different rows of a label along a dimension, in the order of their first appearance, and which is where.

    Returns:
        `[n, width, K]`, and a label of the same shape with that dimension's size 1, or what it was expanded from.
    """
    dim %= labels[0].dim()
    moved = [label.movedim(dim, -1) for label in labels]
    small = list(moved)
    for axis in range(moved[0].dim() - 1):
        if not any(varies(label, axis) for label in moved):
            small = [label.narrow(axis, 0, 1) for label in small]
    stacked = torch.stack(small, -1)
    flat = stacked.flatten(0, -3) if stacked.dim() > 2 else stacked[None]
    seen: dict[bytes, int] = {}
    which = [seen.setdefault(row.numpy().tobytes(), len(seen)) for row in flat.contiguous()]
    first = [which.index(number) for number in range(len(seen))]
    numbers = torch.tensor(which, dtype=torch.int32).view(stacked.shape[:-2]).expand(moved[0].shape[:-1])
    return flat[first], numbers.unsqueeze(dim)


def constant_along(label: Tensor, dims: Iterable[int]) -> bool:
    """Whether a label is the same along dimensions wherever it is one."""
    most = label
    for dim in dims:
        most = most.amax(dim, keepdim=True)
    return bool(((label == most) | (label == -1)).all())


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    """Whether two lists of labels are equal."""
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def united(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The labels of a sum of two tensors with the same origin; none if that would be too many."""
    if not first or not second:
        return ()
    labels = list(first)
    for label in second:
        if not any(torch.equal(label, known) for known in labels):
            labels.append(label)
    return tuple(labels) if len(labels) <= MOST_LABELS else ()
