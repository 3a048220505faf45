"""What following the graph finds out about each parameter: evidence, from which roles are decided afterwards."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch import Tensor

from lit_symopt.infer.flow import Flow, Kind, Origin


@dataclass(frozen=True)
class Reading:
    """One origin of what a linear map reads.

    Attributes:
        units: for each input of the map the unit of the origin that it reads; None if it is not one unit each, the
            same for every token.
    """

    origin: Origin
    units: tuple[int, ...] | None
    bend: int
    marks: frozenset[str]


@dataclass(frozen=True)
class Application:
    """A parameter as a linear map `y = W x`.

    Attributes:
        out_axis, in_axis: its dimensions that count outputs and inputs.
        readings: the origins of x.
        inputs: for each entry of x the index in `in_axis` it meets.
    """

    out_axis: int
    in_axis: int
    readings: tuple[Reading, ...]
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class HeadRows:
    """What one linear map contributes to the queries, keys or values of an attention: `[heads, h, K]`, -1 elsewhere."""

    origin: Origin
    rows: Tensor
    bend: int
    marks: frozenset[str]


@dataclass
class Attention:
    """One attention: who writes its queries, keys and values, how wide a value is, and whether scores lost track."""

    queries: tuple[HeadRows, ...] = ()
    keys: tuple[HeadRows, ...] = ()
    values: tuple[HeadRows, ...] = ()
    width: int = 0
    lost: bool = False


@dataclass(frozen=True)
class VectorUse:
    """A parameter that is added to, multiplied into or put beside an activation.

    Attributes:
        what: "bias", "gain", "beside" (concatenated) or "norm".
        origins: of the activation, with the units it covers (None: not told apart) and how bent it is.
        table: it differs along the tokens too: a table of positions.
        bias_of: the parameter of the linear map or convolution that adds it itself.
    """

    what: str
    origins: tuple[tuple[Origin, frozenset[int] | None, int], ...]
    table: bool
    bias_of: str | None = None


@dataclass(frozen=True)
class Normalized:
    """A linear map's outputs under a softmax, logarithmic or not."""

    log: bool
    bend: int
    marks: frozenset[str]


@dataclass
class Facts:
    """All evidence, by parameter name.

    Attributes:
        embeddings: "tokens" or "positions", for each look-up.
        ends: what becomes of the outputs of a linear map or convolution: ("into", parameter), ("scores", number),
            ("stream", ""), ("softmax", ""), ("output", path), ...
        writers: origins that are added to the residual stream.
        routed: linear maps whose chosen outputs multiply other activations, with the marks of that path.
        squared: linear maps the square of whose logsumexp is part of what is returned: a z-loss.
        returned: linear maps whose outputs are returned, with the path, bend and marks.
        recurrent: parameters of recurrent layers that are one operation.
        tables: look-ups whose rows are added to the scores of an attention.
        touched: for each linear map the vectors that acted on what it reads; see `Flow.touched`.
        gates: linear maps that multiply the outputs of an attention, whose rows lie head by head.
        strange: uses that nothing above covers, in words.
    """

    applications: dict[str, list[Application]] = field(default_factory=lambda: defaultdict(list))
    convolutions: set[str] = field(default_factory=set)
    embeddings: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    attentions: list[Attention] = field(default_factory=list)
    vectors: dict[str, list[VectorUse]] = field(default_factory=lambda: defaultdict(list))
    normalized: dict[str, list[Normalized]] = field(default_factory=lambda: defaultdict(list))
    ends: dict[str, set[tuple[str, str]]] = field(default_factory=lambda: defaultdict(set))
    writers: set[Origin] = field(default_factory=set)
    routed: dict[str, frozenset[str]] = field(default_factory=dict)
    squared: set[str] = field(default_factory=set)
    returned: dict[str, list[tuple[str, int, frozenset[str]]]] = field(default_factory=lambda: defaultdict(list))
    recurrent: set[str] = field(default_factory=set)
    tables: set[str] = field(default_factory=set)
    touched: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    gates: set[str] = field(default_factory=set)
    strange: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def seen(self, name: str) -> bool:
        """Whether the parameter took part in the pass at all."""
        known = (self.applications, self.embeddings, self.vectors, self.strange)
        return name in self.convolutions | self.recurrent or any(name in facts for facts in known)

    def end(self, flow: Flow, what: str, key: str = "") -> None:
        """Note what becomes of a tensor."""
        for source in flow.of(Kind.LINEAR, Kind.CONV):
            self.ends[source.origin.key].add((what, key))
