"""Following sums and means, softmaxes and choices of the largest."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lit_symopt.infer.arguments import named
from lit_symopt.infer.facts import Normalized
from lit_symopt.infer.flow import BENT, CONSTANT, OPAQUE, Flow, Kind, Origin, ParamView, Source
from lit_symopt.infer.following import Following
from lit_symopt.infer.labels import constant_along, varies, varying
from lit_symopt.trace import Node


def reduction(state: Following, node: Node) -> Flow:
    """A sum, mean, maximum or the like over dimensions."""
    flow, value = state.flow(node.args[0]), state.value(node.args[0])
    if flow.params and not flow.active:
        return Flow(params=tuple(ParamView(view.name, ()) for view in flow.params))
    if not flow.active:
        return replace(flow, params=())
    dims = named(node, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(len(value.shape)))
    dims = [dim % len(value.shape) for dim in dims] if value.shape else []
    keep, last = bool(named(node, "keepdim", False)), len(value.shape) - 1
    kept = []
    for source in flow.sources:
        if source.labels and all(constant_along(label, dims) for label in source.labels):
            labels = tuple(label.amax(dims, keepdim=keep) for label in source.labels) if dims else source.labels
            kept.append(replace(source, labels=labels))
        elif not source.labels and last not in dims:
            kept.append(source)
    if not kept or len(kept) < len(flow.sources):
        return Flow(statistic_of=flow.origins)
    return flow.with_sources(kept)


def logsumexp(state: Following, node: Node) -> Flow:
    """The logarithm of a softmax's denominator."""
    flow = state.flow(node.args[0])
    state.facts.end(flow, "logsumexp")
    kept = (Source(s.origin, bend=BENT, marks=s.marks | {"logsumexp"}) for s in flow.of(Kind.LINEAR))
    return Flow(sources=tuple(kept) or ((Source(OPAQUE),) if flow.active else ()))


def softmax(state: Following, node: Node) -> Flow:
    """Of scores: the weights of an attention. Of a linear map's outputs: a head or a router."""
    flow, dim, log = state.flow(node.args[0]), named(node, "dim", -1), "log" in node.op
    if not flow.active:
        state.strange(node, flow.params)
        return CONSTANT
    sources = []
    for source in flow.sources:
        if source.origin.kind is Kind.SCORES:
            sources.append(replace(source, origin=Origin(Kind.WEIGHTS, source.origin.key)))
            continue
        if source.origin.kind is Kind.LINEAR:
            told = any(varies(label, dim) for label in source.labels) or "chosen" in source.marks
            if told:
                state.facts.normalized[source.origin.key].append(Normalized(log, source.bend, source.marks))
                state.facts.end(Flow(sources=(source,)), "softmax")
        sources.append(source.marked("softmax", bend=BENT))
    return Flow(sources=tuple(sources))


def choice(state: Following, node: Node) -> list[Flow]:
    """The largest of several entries, and which they are."""
    flow, dim = state.flow(node.args[0]), named(node, "dim", -1)
    chosen = Flow(integers=frozenset({"routed"}) if flow.active else flow.integers)
    if not flow.active:
        return [replace(flow, params=()), chosen]
    sources: list[Source] = []
    for source in flow.sources:
        told = any(varies(label, dim) or (label.shape[dim] == 1 and not varying(label)) for label in source.labels)
        if source.origin.kind is Kind.LINEAR and (told or "chosen" in source.marks):
            state.facts.end(Flow(sources=(source,)), "chosen")
            sources.append(replace(source, labels=()).marked("chosen"))
        elif source.origin.kind is Kind.LINEAR:  # of one unit the largest in time: nothing is chosen among units
            kept = tuple(_without(label, dim, state.output(node).shape) for label in source.labels)
            sources.append(replace(source, labels=kept).marked(node.op, bend=BENT))
        else:
            sources.append(source if source.origin.kind in (Kind.SCORES, Kind.WEIGHTS) else Source(OPAQUE))
    return [Flow(sources=tuple(sources)), chosen]


def _without(label: Tensor, dim: int, shape: tuple[int, ...]) -> Tensor:
    """A label that is constant along a dimension, with the size that a choice leaves there, or none."""
    small = label.amax(dim, keepdim=True)
    return small.expand(shape) if len(shape) == label.dim() else small.squeeze(dim)
