"""Following operations that act entry by entry."""

from __future__ import annotations

from dataclasses import replace

import torch

from lit_symopt.infer.arguments import named
from lit_symopt.infer.flow import BENT, SHIFTED, STREAM, Flow, Kind, Origin, ParamView, Source
from lit_symopt.infer.following import Following, broadcast
from lit_symopt.infer.labels import varying
from lit_symopt.infer.operations import ACTIVATIONS, ADDITIONS, CLIPS, PRODUCTS, STRAIGHT_OPS
from lit_symopt.trace import Node, Ref


def is_elementwise(node: Node) -> bool:
    """Whether an operation acts entry by entry."""
    known = ADDITIONS | PRODUCTS | CLIPS | STRAIGHT_OPS | ACTIVATIONS
    return node.op in known or torch.Tag.pointwise in node.call.tags


def elementwise(state: Following, node: Node) -> Flow:
    """What is known of the output of an elementwise operation."""
    output = state.output(node)
    refs = list(dict.fromkeys(node.refs())) if node.op not in PRODUCTS else list(node.refs())
    flows = {position: broadcast(state.flow(ref), state.value(ref), output) for position, ref in enumerate(refs)}
    active = [position for position, flow in flows.items() if flow.active]
    params = [view for flow in flows.values() if not flow.active for view in flow.params]
    if not active:
        return _of_constants(node, list(flows.values()), params)
    if not (output.dtype.is_floating_point or output.dtype.is_complex):
        return Flow(integers=frozenset({"derived", "routed", "compared"}))
    if len(active) == 1:
        constants = [flow for flow in flows.values() if not flow.active]
        return _one(state, node, flows[active[0]], constants, params, refs[active[0]])
    state.strange(node, params)
    several = [flows[position] for position in active]
    if node.op in PRODUCTS:
        if node.op != "mul":
            several[1:] = [f.with_sources(s.marked("reciprocal", bend=BENT) for s in f.sources) for f in several[1:]]
        return state.multiplied(several, [state.value(refs[position]) for position in active], output)
    joined = state.added(several)
    compared = any("compared" in flow.integers for flow in flows.values())
    if node.op in ADDITIONS and not compared:
        return joined
    return joined.with_sources(source.marked(node.op, bend=BENT) for source in joined.sources)


def _of_constants(node: Node, flows: list[Flow], params: list[ParamView]) -> Flow:
    integers = frozenset().union(*(flow.integers for flow in flows))
    statistics = frozenset().union(*(flow.statistic_of for flow in flows))
    whole = sorted(params, key=lambda view: len(view.coordinates))  # a parameter over its own norm is the parameter
    views = tuple({view.name: view for view in whole}.values())
    if node.op not in ("where", "masked_fill"):
        integers = frozenset("derived" if kind == "tokens" else kind for kind in integers)
    return Flow(params=views, integers=integers, statistic_of=statistics)


def _one(state: Following, node: Node, flow: Flow, constants: list[Flow], params: list[ParamView], ref: Ref) -> Flow:
    """One activation with parameters, constants and numbers."""
    if params:
        return _with_params(state, node, flow, params)
    statistics = frozenset().union(*(constant.statistic_of for constant in constants))
    integers = frozenset().union(*(constant.integers for constant in constants))
    sources = [_after(node, source, ref, statistics, "routed" in integers) for source in flow.sources]
    if "compared" in integers:  # an activation function by hand: `x * (x > 0)`, `where(x > 0, x, 0)`
        sources = [source.marked("compared", bend=BENT) for source in sources]
    if node.op in PRODUCTS and _by_features(state, node, ref):
        sources = [source.marked("weighted") for source in sources]
    after = flow.with_sources(sources)
    return after if _smooth(node, ref) else replace(after, touched=frozenset())


def _by_features(state: Following, node: Node, ref: Ref) -> bool:
    """Whether a constant differs (may differ) from feature to feature, as cosines do."""
    shapes = [state.value(other).shape for other in node.refs() if other != ref]
    return any(shape and shape[-1] > 1 for shape in shapes)


def _with_params(state: Following, node: Node, flow: Flow, params: list[ParamView]) -> Flow:
    if node.op not in ADDITIONS | PRODUCTS:
        state.strange(node, params)
        return flow.with_sources(source.marked(node.op, bend=BENT) for source in flow.sources)
    for view in params:
        table = _is_table(view, len(state.output(node).shape))
        flow = state.vector(view, "gain" if node.op in PRODUCTS else "bias", flow, table=table)
        if table and node.op in ADDITIONS and not flow.of(Kind.SCORES, Kind.WEIGHTS):
            flow = state.added([flow, Flow(sources=(Source(STREAM),))])  # a table of positions: the stream begins
    return flow


def _smooth(node: Node, ref: Ref) -> bool:
    return node.op in ADDITIONS | STRAIGHT_OPS | CLIPS or (node.op in PRODUCTS and node.args[0] == ref)


def _after(node: Node, source: Source, ref: Ref, statistics: frozenset[Origin], chosen: bool) -> Source:
    if source.origin in statistics:
        return source.marked("normed")
    if node.op in PRODUCTS:
        if node.args[0] != ref and node.op != "mul":
            return source.marked("reciprocal", bend=BENT)
        return source.marked("chosen") if chosen and source.origin.kind is Kind.LINEAR else source
    if node.op in STRAIGHT_OPS:
        return source
    if node.op in ("where", "masked_fill"):
        return source
    if node.op in ADDITIONS:
        return source.marked("shifted", bend=SHIFTED)
    if node.op in CLIPS:
        halved = node.op in ("clamp", "clamp_min") and named(node, "min") == 0 and named(node, "max") is None
        return source.marked("clipped", bend=BENT if halved else SHIFTED)
    return source.marked(node.op, bend=BENT)


def _is_table(view: ParamView, dims: int) -> bool:
    """Whether a parameter differs along the tokens too, not only along the features."""
    if len(view.coordinates) < 2 or "routed" in view.chosen_by or dims < 2:
        return False
    return any(dim != dims - 1 for label in view.coordinates for dim in varying(label))


def power(state: Following, node: Node) -> Flow:
    """`x**n`: the square of a logsumexp is a z-loss."""
    flow = elementwise(state, node)
    for source in flow.sources:
        if "logsumexp" in source.marks and state.output(node).index in state.needed:
            state.facts.squared.add(source.origin.key)
    return flow
