"""Following operations that move entries: views, selections, writes into memory, concatenations, scatters."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_symopt.infer.arguments import named
from lit_symopt.infer.flow import CONSTANT, OPAQUE, STREAM, Flow, Kind, Origin, ParamView, Source
from lit_symopt.infer.following import Following
from lit_symopt.infer.labels import along, compact, constant_along
from lit_symopt.infer.operations import COMPLEX, SCATTERS, SELECTIONS
from lit_symopt.infer.replay import CannotReplay, mover, reread
from lit_symopt.trace import Node, Value


def view(state: Following, node: Node, position: int) -> Flow:
    """A tensor whose entries are those of another one, in other places."""
    flow = state.flow(node.args[0])
    if node.op in SELECTIONS:
        return _selected(state, node, flow)
    if node.op in COMPLEX:
        return _complex(node, flow, state)
    try:
        return flow.mapped(mover(node, state.trace, position))
    except CannotReplay:
        return lost(state, node, flow)


def lost(state: Following, node: Node, flow: Flow) -> Flow:
    """What is known after an operation that could not be followed: nothing, and that is noted."""
    state.strange(node, flow.params)
    state.facts.end(flow, "unknown", node.op)
    return Flow(sources=(Source(OPAQUE),)) if flow.active or flow.params else replace(flow, params=())


def _selected(state: Following, node: Node, flow: Flow) -> Flow:
    """Rows that integers select: a look-up, experts' tokens, a router's choice."""
    integers = frozenset().union(*(state.flow(ref).integers for ref in list(node.refs())[1:]))
    if flow.params and not flow.active:
        view = flow.params[0]
        looked_up = integers & {"tokens", "derived", "positions"} and "routed" not in integers
        if looked_up and len(view.coordinates) == 2 and node.op != "gather":
            state.facts.embeddings[view.name].add("positions" if "positions" in integers else "tokens")
            return Flow(sources=(Source(STREAM, marks=frozenset({view.name})),))
        flow = replace(flow, params=tuple(replace(p, selected=True, chosen_by=integers) for p in flow.params))
    elif not flow.active:
        return replace(flow, integers=flow.integers | (integers & {"routed"}))
    dims = _indexed_dims(node, len(state.value(node.args[0]).shape))
    sources = []
    for source in flow.sources:
        # Among the units of one map, and not among the outputs of several.
        told = not all(constant_along(label, [dim]) for label in source.labels for dim in dims)
        chosen = source.origin.kind is Kind.LINEAR and "routed" in integers and (told or not source.labels)
        if chosen or (told and integers & {"tokens", "derived"}):
            state.facts.end(Flow(sources=(source,)), "chosen" if chosen else "picked")
        sources.append(replace(source, labels=()).marked("chosen") if chosen else source)
    flow = flow.with_sources(sources)
    try:
        return flow.mapped(mover(node, state.trace))
    except CannotReplay:
        return lost(state, node, flow)


def _indexed_dims(node: Node, dims: int) -> list[int]:
    if node.op == "index":
        return [dim for dim, index in enumerate(node.args[1]) if index is not None]
    return [int(named(node, "dim", 0)) % dims]


def _complex(node: Node, flow: Flow, state: Following) -> Flow:
    """Pairs of entries as complex numbers and back: an entry of a product then comes from both."""
    if node.op == "view_as_complex":
        split = [replace(s, labels=tuple(label[..., i] for label in s.labels for i in (0, 1))) for s in flow.sources]
        return flow.with_sources(split)
    shape = state.output(node).shape
    return flow.mapped(lambda label: label.unsqueeze(-1).expand(shape))


def written_over(state: Following, node: Node) -> Flow:
    """Memory that others wrote to since it was last read whole."""
    flows = [state.flow(ref) for ref in node.args]
    values = [state.value(ref) for ref in node.args]
    if len(flows) == 1 and not flows[0].active and not flows[0].params:
        return flows[0]
    if any(flow.params and not flow.active for flow in flows):
        if len(flows) > 1:
            for flow in flows:
                lost(state, node, flow)
            return Flow(sources=(Source(OPAQUE),))
        return flows[0].mapped(lambda label: reread(values[0], [(values[0], label)], state.output(node)))
    integers = frozenset().union(*(flow.integers for flow in flows))
    sources: dict[Origin, Source] = {}
    for flow in flows:
        for source in flow.sources:
            known = sources.get(source.origin, source)
            sources[source.origin] = known.marked(*source.marks, bend=source.bend)
    merged = []
    for origin, source in sources.items():
        own = [next((s.labels for s in flow.sources if s.origin == origin), ()) for flow in flows]
        many = max(map(len, own))
        labels = tuple(
            compact(reread(values[0], _labels_in(values, own, number), state.output(node))) for number in range(many)
        )
        merged.append(replace(source, labels=labels))
    return Flow(sources=tuple(merged), integers=integers)


def _labels_in(values: list[Value], own: list[tuple[Tensor, ...]], number: int) -> list[tuple[Value, Tensor | None]]:
    return [
        (value, labels[min(number, len(labels) - 1)] if labels else None)
        for value, labels in zip(values, own, strict=True)
    ]


def concatenation(state: Following, node: Node) -> Flow:
    """`cat` and `stack`: the units of each origin, and -1 where another part lies."""
    parts = node.args[0]
    flows, values = [state.flow(part) for part in parts], [state.value(part) for part in parts]
    used = [i for i, value in enumerate(values) if value.shape != (0,)]
    flows, values = [flows[i] for i in used], [values[i] for i in used]
    integers = frozenset().union(*(flow.integers for flow in flows))
    if not any(flow.active for flow in flows):
        views = {view.name: view for flow in flows for view in flow.params}
        if len(views) == 1 and len(flows) == 1:
            return flows[0]
        return Flow(params=tuple(ParamView(name, ()) for name in views), integers=integers)
    rest = Flow(sources=tuple(source for flow in flows for source in flow.sources))
    for flow in flows:
        for view in () if flow.active else flow.params:
            state.vector(view, "beside", rest)
    if STREAM in rest.origins:
        return state.added([flow for flow in flows if flow.active])
    dim = named(node, "dim", 0)
    sources = []
    for origin in dict.fromkeys(source.origin for source in rest.sources):
        own = [[s for s in flow.sources if s.origin == origin] for flow in flows]
        first = next(each[0] for each in own if each)
        merged = first
        for each in own:
            for source in each:
                merged = merged.marked(*source.marks, bend=source.bend)
        many = max(len(each[0].labels) if each else 0 for each in own)
        whole = all(len(each) <= 1 and (not each or each[0].labels) for each in own)
        labels = []
        for number in range(many if whole else 0):
            pieces = [
                each[0].labels[min(number, len(each[0].labels) - 1)]
                if each
                else torch.full((1,) * len(value.shape), -1, dtype=torch.int32).expand(value.shape)
                for each, value in zip(own, values, strict=True)
            ]
            labels.append(compact(node.call(pieces, dim)))
        sources.append(replace(merged, labels=tuple(labels)))
    touched = frozenset().union(*(flow.touched for flow in flows))
    return Flow(sources=tuple(sources), touched=touched)


def scatter(state: Following, node: Node) -> Flow:
    """Writing some entries of a tensor: where experts' outputs come together."""
    target_at, source_at = SCATTERS[node.op]
    target = state.flow(node.args[target_at])
    source = state.flow(node.args[source_at]) if len(node.args) > source_at else CONSTANT
    index = frozenset().union(*(state.flow(ref).integers for ref in list(node.refs())[1:]))
    if not source.active:
        for view in source.params:
            state.facts.strange[view.name].add(node.op)
        return replace(target, integers=target.integers | source.integers | index)
    shape, value = state.output(node).shape, state.value(node.args[source_at])
    spread = []
    for each in source.sources:
        vectors = [along(label, -1) for label in each.labels] if value.shape and value.shape[-1:] == shape[-1:] else []
        known = [vector.expand(shape) for vector in vectors if vector is not None]
        spread.append(replace(each, labels=tuple(known) if known and len(known) == len(each.labels) else ()))
    written = replace(source, sources=tuple(spread))
    return state.added([target, written]) if target.active else written


def copy(state: Following, node: Node) -> Flow:
    """`target.copy_(source)`."""
    flow, shape = state.flow(node.args[1]), state.output(node).shape
    try:
        return flow.mapped(lambda label: label.expand(shape))
    except RuntimeError:
        return lost(state, node, flow)
