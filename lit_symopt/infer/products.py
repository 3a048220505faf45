"""Following matrix products: a parameter with an activation is a linear map, two activations are an attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from lit_symopt.infer.facts import Application, Attention, HeadRows, Reading
from lit_symopt.infer.flow import (
    CONSTANT,
    OPAQUE,
    STREAM,
    Flow,
    Kind,
    Origin,
    ParamView,
    Source,
    along,
    counting,
    rows,
    varies,
)
from lit_symopt.infer.following import Following
from lit_symopt.infer.operations import FACTORS
from lit_symopt.trace import Node, Value


def product(state: Following, node: Node) -> Flow:
    """`x W`, `b + x W`, `W x`, or a product of two activations."""
    left_at, right_at, summand_at = FACTORS[node.op]
    left, right = node.args[left_at], node.args[right_at]
    flows = state.flow(left), state.flow(right)
    values = state.value(left), state.value(right)
    summand = node.args[summand_at] if summand_at is not None and summand_at < len(node.args) else None
    output = state.output(node)
    # Dimensions that are summed over, and those that remain, of the left and the right factor.
    right_in, right_out = (-1, -2) if node.op == "linear" else (-2 if len(values[1].shape) > 1 else 0, -1)
    left_in, left_out = -1, -2
    weights = [bool(flow.params) and not flow.active for flow in flows]
    if all(weights):
        return _two_parameters(state, node, flows)
    if weights[1]:
        place = _Place(values[0], left_in, values[1], right_in, right_out, output, -1)
        return _linear(state, node, flows[0], flows[1], place, summand)
    if weights[0]:
        out_dim = -2 if len(values[1].shape) > 1 else -1
        place = _Place(values[1], right_in, values[0], left_in, left_out, output, out_dim)
        return _linear(state, node, flows[1], flows[0], place, summand)
    if not flows[0].active or not flows[1].active:
        return _with_constant(flows[0] if flows[0].active else flows[1])
    result = _two_activations(state, flows, values, output)
    extra = state.flow(summand) if summand is not None else CONSTANT
    for view in extra.params:
        result = state.vector(view, "bias", result)
    return result


def _two_parameters(state: Following, node: Node, flows: tuple[Flow, Flow]) -> Flow:
    for flow in flows:
        for view in flow.params:
            state.facts.strange[view.name].add(f"{node.op} with another parameter")
    return Flow(params=tuple(ParamView(view.name, ()) for flow in flows for view in flow.params))


def _with_constant(flow: Flow) -> Flow:
    """A mean over positions with fixed weights, or a fixed transform."""
    if flow.of(Kind.STREAM):
        return Flow(sources=(Source(STREAM),))
    return Flow(sources=(Source(OPAQUE),)) if flow.active else CONSTANT


# -- linear maps -------------------------------------------------------------------------------------------------


class _Place:
    """Which dimensions of input, weight and output a product sums over and keeps."""

    def __init__(
        self, x: Value, x_in: int, weight: Value, weight_in: int, weight_out: int, output: Value, out: int
    ) -> None:
        self.x, self.x_in = x, x_in
        self.weight, self.weight_in, self.weight_out = weight, weight_in, weight_out
        self.output, self.out = output, out


def _linear(state: Following, node: Node, x: Flow, weight: Flow, place: _Place, summand: Any) -> Flow:
    view = weight.params[0]
    axes = _axes(view, place) if len(weight.params) == 1 else None
    if axes is None:
        for each in weight.params:
            mixed = "made of several parameters" if len(weight.params) > 1 else "its dimensions are merged or split"
            state.facts.strange[each.name].add(f"{node.op} ({mixed})")
        state.facts.end(x, "unknown", node.op)
        return Flow(sources=(Source(OPAQUE),))
    out_axis, in_axis, units, inputs = axes
    readings = tuple(_reading(source, place.x_in) for source in x.sources)
    application = Application(out_axis, in_axis, readings, inputs)
    if application not in state.facts.applications[view.name]:
        state.facts.applications[view.name].append(application)
    state.facts.touched[view.name] |= x.touched
    state.facts.end(x, "into", view.name)

    shape, dims = place.output.shape, len(place.output.shape)
    spread = [1] * dims
    spread[place.out % dims] = len(units)
    origin = Origin(Kind.LINEAR, view.name)
    result = Flow(sources=(Source(origin, (units.view(spread).expand(shape),)),))
    added = state.flow(summand) if summand is not None else CONSTANT
    for bias in () if added.active else added.params:
        result = state.vector(bias, "bias", result, bias_of=view.name)
    return state.added([result, added]) if added.active else result


def _axes(view: ParamView, place: _Place) -> tuple[int, int, Tensor, tuple[int, ...]] | None:
    """Which dimensions of a parameter count outputs and inputs, and the indices of both in order."""
    found: dict[int, list[int]] = {place.weight_in: [], place.weight_out: []}
    for axis, label in enumerate(view.coordinates):
        for dim, axes in found.items():
            if varies(label, dim):
                axes.append(axis)
    for axes in found.values():
        if len(axes) > 1 and view.selected and 0 in axes:
            axes.remove(0)  # rows of several experts side by side
    lone = [axis for axis, label in enumerate(view.coordinates) if label.numel() and int(label.max()) == 0]
    for axes in found.values():
        if not axes and lone:
            axes.append(lone.pop())
    if any(len(axes) != 1 for axes in found.values()):
        return None
    in_axis, out_axis = found[place.weight_in][0], found[place.weight_out][0]
    units = along(view.coordinates[out_axis], place.weight_out)
    inputs = along(view.coordinates[in_axis], place.weight_in)
    if in_axis == out_axis or units is None or inputs is None:
        return None
    return out_axis, in_axis, units, tuple(inputs.tolist())


def _reading(source: Source, dim: int) -> Reading:
    units = along(source.labels[0], dim) if len(source.labels) == 1 else None
    return Reading(source.origin, None if units is None else tuple(units.tolist()), source.bend, source.marks)


# -- attention ---------------------------------------------------------------------------------------------------


def _two_activations(state: Following, flows: tuple[Flow, Flow], values: tuple[Value, Value], output: Value) -> Flow:
    weights = [flow.of(Kind.WEIGHTS) for flow in flows]
    dims = len(output.shape)
    if any(weights):
        on_left = bool(weights[0])
        record = state.facts.attentions[int((weights[0] or weights[1])[0].origin.key)]
        values_flow, value, feature = (flows[1], values[1], -1) if on_left else (flows[0], values[0], -2)
        heads = [
            label.amax(-1 if on_left else -2, keepdim=True)
            for source in weights[0] or weights[1]
            for label in source.labels[:1]
        ]
        return _attended(
            state, record, (weights[0] or weights[1])[0].origin.key, values_flow, value, feature, heads, output
        )
    chosen = [[s for s in flow.of(Kind.LINEAR) if "chosen" in s.marks] for flow in flows]
    if any(chosen):
        for source in [*chosen[0], *chosen[1]]:
            state.route(source)
        other, feature = (flows[1], -1) if chosen[0] else (flows[0], -2)
        kept = []
        for source in other.sources:
            vectors = [along(label, feature) for label in source.labels]
            known = [vector for vector in vectors if vector is not None]
            spread = [1] * dims
            spread[feature] = -1
            labels = tuple(vector.view(spread).expand(output.shape) for vector in known)
            kept.append(replace(source, labels=labels if len(known) == len(vectors) else ()))
        return Flow(sources=tuple(kept))
    record = Attention(
        _head_rows(flows[0], -1),
        _head_rows(flows[1], -2 if len(values[1].shape) > 1 else -1),
    )
    state.facts.attentions.append(record)
    number = str(len(state.facts.attentions) - 1)
    for flow in flows:
        state.facts.end(flow, "scores", number)
    found = _which_head(flows[0], -1)
    labels = () if found is None or dims < 2 else (found.expand(output.shape),)
    return Flow(sources=(Source(Origin(Kind.SCORES, number), labels),))


def fused_attention(state: Following, node: Node) -> list[Flow]:
    """An attention in one operation: queries, keys and values `[B, H, T, h]`."""
    queries, keys, values = (state.flow(argument) for argument in node.args[:3])
    record = Attention(_head_rows(queries, -1), _head_rows(keys, -1))
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


def _which_head(flow: Flow, feature: int) -> Tensor | None:
    """For each entry the number of its head, with size 1 along the features."""
    for source in flow.of(Kind.LINEAR, Kind.CONV):
        if source.labels and source.labels[0].numel():
            return rows(source.labels, feature)[1]
    return None
