"""Following products of two activations: the scores of an attention, its means of values, a router's weights."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lit_symopt.infer.facts import Attention, HeadRows
from lit_symopt.infer.flow import CONSTANT, OPAQUE, Flow, Kind, Origin, Source
from lit_symopt.infer.following import Following
from lit_symopt.infer.labels import along, counting, rows
from lit_symopt.trace import Node, Value


def two_activations(state: Following, flows: tuple[Flow, Flow], values: tuple[Value, Value], output: Value) -> Flow:
    """Scores of queries and keys, a mean of values by scores, or experts' outputs weighed by a router."""
    weights = [flow.of(Kind.WEIGHTS) for flow in flows]
    if any(weights):
        return _mean(state, flows, values, weights, output)
    if any("chosen" in source.marks for flow in flows for source in flow.of(Kind.LINEAR)):
        return _weighed(state, flows, output)
    return _scores(state, flows, values, output)


def _mean(
    state: Following,
    flows: tuple[Flow, Flow],
    values: tuple[Value, Value],
    weights: list[tuple[Source, ...]],
    output: Value,
) -> Flow:
    """The weights of an attention, on either side, with values."""
    own, feature, other = (weights[0], -1, 1) if weights[0] else (weights[1], -2, 0)
    number = own[0].origin.key
    heads = [label.amax(feature, keepdim=True) for source in own for label in source.labels[:1]]
    record = state.facts.attentions[int(number)]
    return _attended(state, record, number, flows[other], values[other], feature, heads, output)


def _weighed(state: Following, flows: tuple[Flow, Flow], output: Value) -> Flow:
    """A sum of activations with weights that a router chose, on either side."""
    chosen = [[s for s in flow.of(Kind.LINEAR) if "chosen" in s.marks] for flow in flows]
    for source in [*chosen[0], *chosen[1]]:
        state.route(source)
    other, feature = (flows[1], -1) if chosen[0] else (flows[0], -2)
    spread = [1] * len(output.shape)
    spread[feature] = -1
    kept = []
    for source in other.sources:
        vectors = [along(label, feature) for label in source.labels]
        known = [vector for vector in vectors if vector is not None]
        labels = tuple(vector.view(spread).expand(output.shape) for vector in known)
        kept.append(replace(source, labels=labels if len(known) == len(vectors) else ()))
    return Flow(sources=tuple(kept))


def _scores(state: Following, flows: tuple[Flow, Flow], values: tuple[Value, Value], output: Value) -> Flow:
    """A product that may be queries and keys; the softmax and the values that make it an attention come later."""
    record = Attention(
        _head_rows(flows[0], -1),
        _head_rows(flows[1], -2 if len(values[1].shape) > 1 else -1),
        lost=any(map(_is_lost, flows)),
    )
    state.facts.attentions.append(record)
    number = str(len(state.facts.attentions) - 1)
    for flow in flows:
        state.facts.end(flow, "scores", number)
    found = _which_head(flows[0], -1)
    labels = () if found is None or len(output.shape) < 2 else (found.expand(output.shape),)
    return Flow(sources=(Source(Origin(Kind.SCORES, number), labels),))


def fused_attention(state: Following, node: Node) -> list[Flow]:
    """An attention in one operation: queries, keys and values `[B, H, T, h]`."""
    queries, keys, values = (state.flow(argument) for argument in node.args[:3])
    record = Attention(_head_rows(queries, -1), _head_rows(keys, -1), lost=_is_lost(queries) or _is_lost(keys))
    state.facts.attentions.append(record)
    number = str(len(state.facts.attentions) - 1)
    for flow in (queries, keys):
        state.facts.end(flow, "scores", number)
    scores = Flow(sources=(Source(Origin(Kind.SCORES, number)),))
    for argument in list(node.refs())[3:]:
        mask = state.flow(argument)
        for view in mask.params:  # a learned bias of the scores
            state.vector(view, "bias", scores)
        for source in mask.of(Kind.STREAM):
            for name in source.marks & state.facts.embeddings.keys():
                state.biases(name, scores)
    found = _which_head(queries, -1)
    output = state.output(node)
    attended = _attended(
        state, record, number, values, state.value(node.args[2]), -1, [] if found is None else [found], output
    )
    return [attended, *(CONSTANT for _ in node.outputs[1:])]


def _attended(
    state: Following,
    record: Attention,
    number: str,
    flow: Flow,
    value: Value,
    feature: int,
    heads: list[Tensor],
    output: Value,
) -> Flow:
    """The mean of values: entry (head, dimension) gets the label head·h + dimension."""
    record.values = _head_rows(flow, feature)
    record.width = value.shape[feature]
    state.facts.end(flow, "scores", number)
    if not heads:
        found = _which_head(flow, feature)
        heads = [] if found is None else [found]
    labels: tuple[Tensor, ...] = ()
    if heads:
        position = counting(output.shape, len(output.shape) + feature)
        labels = ((heads[0] * record.width + position),)
    return Flow(sources=(Source(Origin(Kind.ATTENDED, number), labels),))


def _head_rows(flow: Flow, feature: int) -> tuple[HeadRows, ...]:
    return tuple(
        HeadRows(source.origin, rows(source.labels, feature)[0], source.bend, source.marks)
        for source in flow.of(Kind.LINEAR, Kind.CONV)
        if source.labels and source.labels[0].numel()
    )


def _is_lost(flow: Flow) -> bool:
    """Whether it is not known, of queries or keys, which units of which map they are."""
    return any(s.origin == OPAQUE or (s.origin.kind is Kind.LINEAR and not s.labels) for s in flow.sources)


def _which_head(flow: Flow, feature: int) -> Tensor | None:
    """For each entry the number of its head, with size 1 along the features."""
    for source in flow.of(Kind.LINEAR, Kind.CONV):
        if source.labels and source.labels[0].numel():
            return rows(source.labels, feature)[1]
    return None
