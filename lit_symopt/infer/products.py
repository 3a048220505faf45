"""Following matrix products: a parameter with an activation is a linear map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lit_symopt.infer.facts import Application, Reading
from lit_symopt.infer.flow import CONSTANT, OPAQUE, STREAM, Flow, Kind, Origin, ParamView, Source
from lit_symopt.infer.following import Following
from lit_symopt.infer.labels import along, varies
from lit_symopt.infer.operations import FACTORS
from lit_symopt.infer.scores import two_activations
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
        place = _Place(
            x=values[0],
            x_in=left_in,
            weight=values[1],
            weight_in=right_in,
            weight_out=right_out,
            output=output,
            out=-1,
        )
        return _linear(state, node, flows[0], flows[1], place, summand)
    if weights[0]:
        out_dim = -2 if len(values[1].shape) > 1 else -1
        place = _Place(
            x=values[1],
            x_in=right_in,
            weight=values[0],
            weight_in=left_in,
            weight_out=left_out,
            output=output,
            out=out_dim,
        )
        return _linear(state, node, flows[1], flows[0], place, summand)
    if not flows[0].active or not flows[1].active:
        return _with_constant(flows[0] if flows[0].active else flows[1])
    result = two_activations(state, flows, values, output)
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


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Which dimensions of input, weight and output a product sums over and keeps."""

    x: Value
    x_in: int
    weight: Value
    weight_in: int
    weight_out: int
    output: Value
    out: int


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
