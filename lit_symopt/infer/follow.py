"""Following a graph from the parameters on, node by node, collecting evidence about each parameter."""

from __future__ import annotations

from collections.abc import Callable

from lit_symopt.errors import TaxonomyError
from lit_symopt.infer.elementwise import elementwise, is_elementwise, power
from lit_symopt.infer.facts import Facts
from lit_symopt.infer.flow import CONSTANT, Flow, Kind
from lit_symopt.infer.following import Following
from lit_symopt.infer.labels import varies
from lit_symopt.infer.layers import convolution, dropout, embedding, glu, norm, positional, recurrent, unknown
from lit_symopt.infer.operations import (
    ADDITIONS,
    ATTENTIONS,
    CHOICES,
    CONVOLUTIONS,
    FACTORS,
    FILLS,
    NORMS,
    POSITIONAL,
    RECURRENT,
    REDUCTIONS,
    SCATTERS,
    SOFTMAXES,
    VIEWS,
)
from lit_symopt.infer.places import concatenation, copy, scatter, view, written_over
from lit_symopt.infer.products import product
from lit_symopt.infer.reductions import choice, logsumexp, reduction, softmax
from lit_symopt.infer.scores import fused_attention
from lit_symopt.trace import WRITE, Node, Ref, Trace


def follow(trace: Trace, *, varied: frozenset[str] = frozenset(), frozen: frozenset[str] = frozenset()) -> Facts:
    """Collect the evidence in a graph.

    Args:
        trace: what `record` recorded.
        varied: names of the integer buffers whose entries differ.
        frozen: names of the parameters that are not trained.
    """
    state = Following(trace, varied, frozen)
    last = {ref.index: number for number, node in enumerate(trace.nodes) for ref in node.refs()}
    kept = set(trace.outputs.values())
    for number, node in enumerate(trace.nodes):
        flows = _followed(state, node)
        for index, flow in zip(node.outputs, flows, strict=True):
            if index in kept or last.get(index, -1) > number:
                state.flows[index] = flow
        for ref in node.refs():
            if last[ref.index] == number and ref.index not in kept:
                state.flows.pop(ref.index, None)
    for path, index in trace.outputs.items():
        _returned(state, path, index)
    return state.facts


def _followed(state: Following, node: Node) -> list[Flow]:
    try:
        return _node(state, node)
    except (RuntimeError, IndexError, TypeError, ValueError, AssertionError) as error:
        shapes = ", ".join(str(state.value(ref).shape) for ref in node.refs())
        raise TaxonomyError(
            f"the operation {node.op!r} of tensors {shapes} could not be followed ({type(error).__name__}: {error}), "
            "so that no block is inferred; give the module a method block_taxonomy() that returns its blocks"
        ) from error


def _returned(state: Following, path: str, index: int) -> None:
    flow, shape = state.flow(Ref(index)), state.trace.values[index].shape
    state.facts.end(flow, "output", path)
    for source in flow.of(Kind.LINEAR):
        if shape and any(varies(label, len(shape) - 1) for label in source.labels):
            state.facts.returned[source.origin.key].append((path, source.bend, source.marks))


def _node(state: Following, node: Node) -> list[Flow]:
    outputs = len(node.outputs)
    if not outputs:
        return []
    if node.op in FILLS:
        return [CONSTANT] * outputs
    if node.op == WRITE:
        return [written_over(state, node)]
    if node.op in VIEWS:
        return [view(state, node, position) for position in range(outputs)]
    if node.op in FACTORS:
        return [product(state, node)]
    if node.op in ATTENTIONS:
        return fused_attention(state, node)
    several = _MANY.get(node.op)
    if several is not None or (node.op in CHOICES and outputs == 2):
        return (several or choice)(state, node)[:outputs]
    one = _ONE.get(node.op)
    if one is None and node.op in REDUCTIONS:
        one = reduction
    if one is None and is_elementwise(node):
        one = elementwise
    return [one(state, node)] * outputs if one is not None else [unknown(state, node)] * outputs


_ONE: dict[str, Callable[[Following, Node], Flow]] = {
    **dict.fromkeys(("cat", "stack", "concat"), concatenation),
    **dict.fromkeys(SCATTERS, scatter),
    **dict.fromkeys(SOFTMAXES, softmax),
    **dict.fromkeys(POSITIONAL, positional),
    **dict.fromkeys(CONVOLUTIONS, convolution),
    **dict.fromkeys(ADDITIONS, elementwise),
    **dict.fromkeys(RECURRENT, recurrent),
    "copy": copy,
    "embedding": embedding,
    "glu": glu,
    "logsumexp": logsumexp,
    "pow": power,
}
_MANY: dict[str, Callable[[Following, Node], list[Flow]]] = {
    **dict.fromkeys(NORMS, norm),
    "native_dropout": dropout,
}
