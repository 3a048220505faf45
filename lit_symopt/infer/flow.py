"""What is known of a tensor while a graph is followed: what made it, and by which units (`labels`) each entry."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor

# How far a value is from a linear function of what the linear map wrote.
STRAIGHT, SHIFTED, BENT = 0, 1, 2


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
