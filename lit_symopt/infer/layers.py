"""Following look-ups, convolutions, norms and whatever no rule knows."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from lit_symopt.infer.arguments import named
from lit_symopt.infer.flow import BENT, CONSTANT, OPAQUE, STREAM, Flow, Kind, Origin, Source
from lit_symopt.infer.following import Following
from lit_symopt.infer.labels import counting
from lit_symopt.infer.operations import NORMS
from lit_symopt.trace import Node


def embedding(state: Following, node: Node) -> Flow:
    """A look-up of rows."""
    weight, indices = state.flow(node.args[0]), state.flow(node.args[1])
    if weight.active:
        return Flow(sources=(Source(OPAQUE),))
    # Positions that ids of the batch are put beside are those of a prompt in the same table.
    positions = "positions" in indices.integers and "tokens" not in indices.integers
    for view in weight.params:
        if "routed" in indices.integers:
            state.facts.strange[view.name].add("a look-up of rows that activations choose")
        state.facts.embeddings[view.name].add("positions" if positions else "tokens")
    if positions and all(view.name in state.frozen for view in weight.params):
        return CONSTANT  # fixed sines and cosines
    names = frozenset(view.name for view in weight.params)
    return Flow(sources=(Source(STREAM, marks=names),)) if names else CONSTANT


def convolution(state: Following, node: Node) -> Flow:
    """A convolution: its outputs are the channels."""
    x, weight, bias = (state.flow(argument) for argument in node.args[:3])
    if weight.active or len(weight.params) != 1:
        for view in weight.params:
            state.facts.strange[view.name].add(f"{node.op} (made of several parameters)")
        return Flow(sources=(Source(OPAQUE),))
    name = weight.params[0].name
    state.facts.convolutions.add(name)
    state.facts.end(x, "into", name)
    label = counting(state.output(node).shape, len(state.output(node).shape) - len(state.value(node.args[1]).shape) + 1)
    flow = Flow(sources=(Source(Origin(Kind.CONV, name), (label,)),))
    for view in bias.params:
        flow = state.vector(view, "bias", flow, bias_of=name)
    return flow


def recurrent(state: Following, node: Node) -> Flow:
    """A recurrent layer in one operation: its matrices are linear maps of inputs and of its state."""
    for ref in node.refs():
        flow = state.flow(ref)
        state.facts.recurrent |= {view.name for view in flow.params if not flow.active}
        state.facts.end(flow, "recurrent")
    return Flow(sources=(Source(OPAQUE),))


def glu(state: Following, node: Node) -> Flow:
    """`a * sigmoid(b)` with a, b the halves of a tensor."""
    flow, dim = state.flow(node.args[0]), named(node, "dim", -1)
    if not flow.active:
        return unknown(state, node)

    def half(label: Tensor, number: int) -> Tensor:
        return label.chunk(2, dim)[number]

    up, gate = (flow.mapped(partial(half, number=number)) for number in (0, 1))
    gate = gate.with_sources(source.marked("sigmoid", bend=BENT) for source in gate.sources)
    output = state.output(node)
    return state.multiplied([up, gate], [output, output], output)


def norm(state: Following, node: Node) -> list[Flow]:
    """A norm in one operation."""
    x_at, gain_at, bias_at = NORMS[node.op]
    flow = state.flow(node.args[x_at])
    flow = flow.with_sources(source.marked("normed") for source in flow.sources)
    for position in (gain_at, bias_at):
        argument = node.args[position] if position is not None and position < len(node.args) else None
        for view in state.flow(argument).params:
            flow = state.vector(view, "norm", flow)
    return [flow, *(CONSTANT for _ in node.outputs[1:])]


def dropout(state: Following, node: Node) -> list[Flow]:
    """A dropout in one operation."""
    return [state.flow(node.args[0]), *(CONSTANT for _ in node.outputs[1:])]


def positional(state: Following, node: Node) -> Flow:
    """Counting: positions."""
    flow = state.flow(node.args[0]) if node.args else CONSTANT
    if flow.active:
        return unknown(state, node)
    return Flow(integers=flow.integers - {"tokens"} | {"positions"})


def unknown(state: Following, node: Node) -> Flow:
    """An operation no rule knows: what goes in is lost, and said to be."""
    flows = [state.flow(ref) for ref in node.refs()]
    for flow in flows:
        state.facts.end(flow, "unknown", node.op)
        state.strange(node, flow.params)
    if any(flow.active or flow.params for flow in flows):
        whole = not state.output(node).dtype.is_floating_point
        return Flow(integers=frozenset({"derived", "routed", "compared"})) if whole else Flow(sources=(Source(OPAQUE),))
    integers = frozenset().union(*(flow.integers for flow in flows))
    return Flow(integers=frozenset("derived" if kind == "tokens" else kind for kind in integers))
