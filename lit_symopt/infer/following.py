"""The state while a graph is followed: flows of the tensors that are still needed, and the evidence so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_symopt.infer.facts import Facts, VectorUse
from lit_symopt.infer.flow import BENT, CONSTANT, INPUT, OPAQUE, STREAM, SUM, Flow, Kind, Origin, ParamView, Source
from lit_symopt.infer.labels import counting, same, united, varying
from lit_symopt.trace import Node, Ref, Trace, Value

# A sum of more linear maps than this is not told apart.
MOST_SUMMANDS = 4


class Following:
    """Flows by value, and what the rules of the operations share.

    Args:
        trace: the graph.
        varied: names of the integer buffers whose entries differ (positions, not a constant segment).
        frozen: names of the parameters that are not trained.
    """

    def __init__(self, trace: Trace, varied: frozenset[str], frozen: frozenset[str]) -> None:
        self.trace = trace
        self.facts = Facts()
        self.flows: dict[int, Flow] = {}
        self.needed = _reaching(trace)
        self.frozen = frozen
        self._varied = varied

    def flow(self, argument: Any) -> Flow:
        """What is known of an argument; of numbers and of None, that they are constant."""
        if not isinstance(argument, Ref):
            return CONSTANT
        known = self.flows.get(argument.index)
        return self._leaf(self.trace.values[argument.index]) if known is None else known

    def value(self, argument: Any) -> Value:
        """The tensor of an argument."""
        assert isinstance(argument, Ref)
        return self.trace.values[argument.index]

    def output(self, node: Node, position: int = 0) -> Value:
        """A tensor that a node made."""
        return self.trace.values[node.outputs[position]]

    def _leaf(self, value: Value) -> Flow:
        whole = not (value.dtype.is_floating_point or value.dtype.is_complex)
        if value.origin == "parameter":
            coordinates = tuple(counting(value.shape, dim) for dim in range(len(value.shape)))
            return Flow(params=(ParamView(value.name, coordinates),))
        if value.origin == "batch":
            if not whole:
                return Flow(sources=(Source(INPUT),))
            return Flow(integers=frozenset({"positions" if value.name.endswith("position_ids") else "tokens"}))
        if value.origin == "buffer" and whole and value.name in self._varied:
            return Flow(integers=frozenset({"positions"}))
        return CONSTANT

    # -- vectors -------------------------------------------------------------------------------------------------

    def vector(
        self, view: ParamView, what: str, flow: Flow, *, table: bool = False, bias_of: str | None = None
    ) -> Flow:
        """Note that a parameter acts on an activation; returns the activation after it."""
        origins = tuple((s.origin, _units(s), s.bend) for s in flow.sources)
        use = VectorUse(what, origins, table, bias_of)
        if use not in self.facts.vectors[view.name]:
            self.facts.vectors[view.name].append(use)
        return replace(flow, touched=flow.touched | {view.name})

    def strange(self, node: Node, params: Iterable[ParamView]) -> None:
        """Note that parameters are used in a way that says nothing."""
        for view in params:
            self.facts.strange[view.name].add(node.op)

    # -- sums and products of activations ------------------------------------------------------------------------

    def added(self, flows: list[Flow]) -> Flow:
        """The sum of activations: the residual stream, a rotary embedding, or several maps into one place."""
        touched = frozenset().union(*(flow.touched for flow in flows))
        scores = [source for flow in flows for source in flow.of(Kind.SCORES, Kind.WEIGHTS)]
        if scores:
            self._biases(flows, scores)
            return Flow(sources=_distinct(scores))
        origins = [flow.origins for flow in flows]
        everything = [source for flow in flows for source in flow.sources]
        running = any(s.origin == STREAM or (s.origin == SUM and s.bend != BENT) for s in everything)
        if all(each == origins[0] for each in origins) and STREAM not in origins[0]:
            return Flow(sources=_summed(everything), touched=touched)
        if running or (INPUT in {s.origin for s in everything} and OPAQUE not in {s.origin for s in everything}):
            return self._join(flows)
        known = {origin for each in origins for origin in each}
        if OPAQUE in known or any(source.bend == BENT for source in everything):
            return Flow(sources=(Source(OPAQUE), *_summed([s for s in everything if s.origin != OPAQUE])))
        if len(known) > MOST_SUMMANDS:
            return self._join(flows)
        for flow in flows:
            self.facts.end(flow, "sum")
        return Flow(sources=(Source(SUM), *_summed(everything)), touched=touched)

    def _join(self, flows: list[Flow]) -> Flow:
        """The residual stream: whatever is added to it, straight, writes to it."""
        for flow in flows:
            self.facts.end(flow, "stream")
            self.facts.writers |= {s.origin for s in flow.sources if s.bend != BENT}
        return Flow(sources=(Source(STREAM),))

    def _biases(self, flows: list[Flow], scores: list[Source]) -> None:
        """A table of positions that is added to scores is a table of biases."""
        for flow in flows:
            for source in flow.of(Kind.STREAM):
                for name in source.marks & self.facts.embeddings.keys():
                    self.biases(name, Flow(sources=tuple(scores)))

    def biases(self, name: str, scores: Flow) -> None:
        """Note that a table that was looked up is added to scores."""
        self.facts.tables.add(name)
        self.vector(ParamView(name, ()), "bias", scores)

    def multiplied(self, flows: list[Flow], values: list[Value], output: Value) -> Flow:
        """The product of activations: a gate, or experts weighted by a router."""
        touched = frozenset().union(*(flow.touched for flow in flows))
        scores = [source for flow in flows for source in flow.of(Kind.SCORES, Kind.WEIGHTS)]
        if scores:
            return Flow(sources=_distinct(scores))
        if len(flows) == 2 and flows[0].origins == flows[1].origins:
            for source in flows[0].sources:
                if "logsumexp" in source.marks and output.index in self.needed:
                    self.facts.squared.add(source.origin.key)
        self._gates(flows)
        kept: list[Source] = []
        for position, (flow, value) in enumerate(zip(flows, values, strict=True)):
            others = frozenset().union(*(f.origins for i, f in enumerate(flows) if i != position))
            narrow = bool(output.shape) and output.shape[-1] > 1 and (not value.shape or value.shape[-1] == 1)
            for source in flow.sources:
                chooses = source.origin.kind is Kind.LINEAR and "chosen" in source.marks and others - {source.origin}
                if chooses and (narrow or not source.labels):
                    self.route(source)
                elif not narrow or not others:
                    kept.append(source)
                else:
                    self.facts.end(flow, "weighs")
        if any(source.origin == STREAM for source in kept):
            self.facts.end(Flow(sources=tuple(kept)), "weighs")
            return Flow(sources=(Source(STREAM),))
        return Flow(sources=_product(kept) or (Source(OPAQUE),), touched=touched)

    def _gates(self, flows: list[Flow]) -> None:
        """Note linear maps that multiply the heads of an attention entry by entry, or each head with one number."""
        attended = [s for flow in flows for s in flow.of(Kind.ATTENDED) if len(s.labels) == 1]
        linear = [s for flow in flows for s in flow.of(Kind.LINEAR) if len(s.labels) == 1]
        for mean in attended:
            entries, width = mean.labels[0], self.facts.attentions[int(mean.origin.key)].width
            for gate in linear:
                if any(torch.equal(gate.labels[0], each) for each in (entries, entries // width)):
                    self.facts.gates.add(gate.origin.key)

    def route(self, source: Source) -> None:
        """Note that chosen outputs of a linear map weigh other activations."""
        name = source.origin.key
        self.facts.routed[name] = self.facts.routed.get(name, frozenset()) | source.marks


def _units(source: Source) -> frozenset[int] | None:
    if not source.labels:
        return None
    units: set[int] = set()
    for label in source.labels:
        small = label
        moving = varying(label)
        for dim in range(label.dim()):
            if label.shape[dim] and dim not in moving:
                small = small.narrow(dim, 0, 1)
        units |= set(torch.unique(small).tolist())
    return frozenset(units - {-1})


def _distinct(sources: list[Source]) -> tuple[Source, ...]:
    return tuple({source.origin: source for source in reversed(sources)}.values())


def _summed(sources: list[Source]) -> tuple[Source, ...]:
    """Sources of a sum: the units of one origin are united."""
    by_origin: dict[Origin, Source] = {}
    for source in sources:
        known = by_origin.get(source.origin)
        if known is None:
            by_origin[source.origin] = source
        else:
            united_labels = united(known.labels, source.labels)
            merged = known.marked(*source.marks, bend=source.bend)
            by_origin[source.origin] = replace(merged, labels=united_labels)
    return tuple(by_origin.values())


def _product(sources: list[Source]) -> tuple[Source, ...]:
    """Sources of a product: an entry that is multiplied with a function of itself is bent."""
    kept: list[Source] = []
    for source in sources:
        for position, known in enumerate(kept):
            if known.origin == source.origin and same(known.labels, source.labels):
                kept[position] = known.marked(*source.marks, bend=BENT)
                break
        else:
            kept.append(source)
    return tuple(kept)


def _reaching(trace: Trace) -> set[int]:
    """Values that something returned depends on."""
    needed = set(trace.outputs.values())
    for node in reversed(trace.nodes):
        if needed.intersection(node.outputs):
            needed.update(ref.index for ref in node.refs())
    return needed


def broadcast(flow: Flow, value: Value, output: Value) -> Flow:
    """A flow as its tensor is broadcast to an output's shape; without labels if it does not fit."""

    def expanded(label: Tensor) -> Tensor:
        return label.expand(output.shape)

    if value.shape == output.shape:
        return flow
    try:
        return flow.mapped(expanded)
    except RuntimeError:
        return flow.with_sources(replace(s, labels=()) for s in flow.sources)
