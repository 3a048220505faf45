"""What is known of a tensor while a graph is followed: which linear map wrote each entry, and by which of its units.

A *label* is an integer tensor of the tensor's shape: entry by entry the unit (output row) of the linear map it comes
from, -1 where it comes from elsewhere. Labels are mostly expanded views of one short vector and take no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

# How far a value is from a linear function of what the linear map wrote.
STRAIGHT, SHIFTED, BENT = 0, 1, 2

# More labels an entry than this (a sum of that many units) are nothing a rotary embedding does.
MOST_LABELS = 4


class Kind(str, Enum):
    """Where an activation comes from."""

    LINEAR = "linear"  # a linear map; its key is the parameter
    CONV = "conv"  # a convolution; its key is the parameter
    SCORES = "scores"  # a product of two activations; its label is the head
    WEIGHTS = "weights"  # those after a softmax
    ATTENDED = "attended"  # a mean of values; its label is head·h + dimension
    STREAM = "stream"  # the residual stream
    SUM = "sum"  # of several maps, beside which their own origins are kept: the stream's beginning, or one more map
    INPUT = "input"  # floating numbers of the batch
    OPAQUE = "opaque"  # anything else


@dataclass(frozen=True)
class Origin:
    """An operation that made an activation: its kind, and the parameter's name or the number of the attention."""

    kind: Kind
    key: str = ""


STREAM = Origin(Kind.STREAM)
SUM = Origin(Kind.SUM)
OPAQUE = Origin(Kind.OPAQUE)
INPUT = Origin(Kind.INPUT)


@dataclass(frozen=True)
class Source:
    """One origin of a tensor.

    Attributes:
        labels: one tensor for each unit that enters an entry (two after a rotary embedding); none where the units are
            no longer told apart.
        bend: `STRAIGHT`, `SHIFTED` by constants or clipped, or `BENT` by an activation function.
        marks: operations it went through, such as "softmax", "tanh", "chosen" (by a top-k) or "normed".
    """

    origin: Origin
    labels: tuple[Tensor, ...] = ()
    bend: int = STRAIGHT
    marks: frozenset[str] = frozenset()

    def marked(self, *marks: str, bend: int | None = None) -> Source:
        """The same after more operations."""
        bend = self.bend if bend is None else max(bend, self.bend)
        return replace(self, marks=self.marks | set(marks), bend=bend)


@dataclass(frozen=True)
class ParamView:
    """A tensor that is a parameter, seen through views, casts, selections and elementwise functions.

    Attributes:
        coordinates: for each dimension of the parameter, the index in it, entry by entry.
        chosen_by: what the integers that selected its rows are made of; see `Flow.integers`.
        selected: whether integers selected its rows.
    """

    name: str
    coordinates: tuple[Tensor, ...]
    selected: bool = False
    chosen_by: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Flow:
    """What is known of one tensor. Nothing at all: a constant.

    Attributes:
        sources: of an activation.
        params: the parameters it is made of, if of parameters alone.
        integers: what integers are made of: "tokens" (ids of the batch as they are), "derived" from the batch,
            "positions", "routed" (by a top-k of activations, or another comparison), "compared" (entry by entry).
        statistic_of: the origins it is a mean, maximum or the like of.
        touched: names of the vectors (gains, biases) that acted on it since its last linear map or activation.
    """

    sources: tuple[Source, ...] = ()
    params: tuple[ParamView, ...] = ()
    integers: frozenset[str] = frozenset()
    statistic_of: frozenset[Origin] = frozenset()
    touched: frozenset[str] = frozenset()

    @property
    def active(self) -> bool:
        """Whether it depends on the batch's data through floating numbers."""
        return bool(self.sources)

    @property
    def origins(self) -> frozenset[Origin]:
        """The origins of its sources."""
        return frozenset(source.origin for source in self.sources)

    def of(self, *kinds: Kind) -> tuple[Source, ...]:
        """Its sources of these kinds."""
        return tuple(source for source in self.sources if source.origin.kind in kinds)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Flow:
        """The same with every label and coordinate changed, as a view changes the tensor."""
        return replace(
            self,
            sources=tuple(replace(s, labels=tuple(map(change, s.labels))) for s in self.sources),
            params=tuple(replace(p, coordinates=tuple(map(change, p.coordinates))) for p in self.params),
        )

    def with_sources(self, sources: Iterable[Source]) -> Flow:
        """The same with other sources."""
        return replace(self, sources=tuple(sources))


CONSTANT = Flow()


# -- labels ------------------------------------------------------------------------------------------------------


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
