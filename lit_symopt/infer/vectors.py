"""Deciding vectors: what the entries of gains, biases and sinks lie along."""

from __future__ import annotations

from math import prod

from lit_symopt.blocks import HEADS, RESIDUAL, Block, Role
from lit_symopt.infer.deciding import Deciding
from lit_symopt.infer.facts import VectorUse
from lit_symopt.infer.flow import STRAIGHT, Kind, Origin
from lit_symopt.layout import Layout

# Their outputs go where they go: to the residual stream, or to another map.
_OUTWARD = (Role.LINEAR, Role.CONV, Role.DOWN, Role.EXPERT_DOWN, Role.ATTENTION_OUT)
_LOGITS = (Role.LM_HEAD, Role.TIED_EMBEDDING, Role.ROUTER)


def decide_tables(deciding: Deciding) -> None:
    """Decide parameters of two and more dimensions that are added to or put beside activations."""
    for name, uses in deciding.facts.vectors.items():
        shape = deciding.shapes[name]
        if not deciding.free(name) or len(shape) < 2 or name in deciding.facts.strange:
            continue
        tokens = [size for size in shape[:-1] if size > 1]
        table = any((use.what == "bias" and use.table) or use.what == "beside" for use in uses)
        if table and len(tokens) == 1 and len(shape) <= 3 and shape[-2] > 1:
            layout = Layout.matrix() if len(shape) == 2 else Layout.experts(Layout.matrix())
            deciding.decide(Block(name, role=Role.POSITION, layout=layout))
        else:
            deciding.decide(_vector(deciding, name))


def decide_vectors(deciding: Deciding) -> None:
    """Decide parameters of one dimension or none; every role of the others is known by now."""
    for name, shape in deciding.shapes.items():
        if deciding.free(name) and len(shape) <= 1:
            deciding.decide(_vector(deciding, name))


def _vector(deciding: Deciding, name: str) -> Block:
    uses = deciding.facts.vectors.get(name, [])
    lies = {_along(deciding, use) for use in uses}
    if len(lies) > 1 and lies <= {"query", "key", "value", str(Role.QKV)}:
        lies = {str(Role.QKV)}  # one bias for all three
    known = lies.pop() if len(lies) == 1 and not _is_number(deciding, name, uses) else None
    covered = {len(own) for use in uses for _, own, _ in use.origins if own is not None}
    if known in (str(Role.LINEAR), str(Role.CONV)) and covered - {prod(deciding.shapes[name])}:
        known = None  # one entry for several outputs
    if known in (None, str(Role.LINEAR)) and _meets_stream(deciding, name, uses):
        known = RESIDUAL
    widths = _widths(deciding)
    if known == RESIDUAL and widths and not widths.intersection(deciding.shapes[name]):
        known = None  # entries of several tokens side by side
    shift, z_loss = _shift(deciding, uses)
    return Block(name, role=Role.VECTOR, along=known, shift_invariant=shift, z_loss=z_loss)


def _widths(deciding: Deciding) -> set[int]:
    """How wide the residual stream is: what is looked up into it, and what is added to it."""
    tables = {deciding.shapes[name][-1] for name in deciding.facts.embeddings if name not in deciding.facts.tables}
    linear = {deciding.outputs(origin.key) for origin in deciding.facts.writers if origin.kind is Kind.LINEAR}
    conv = {deciding.shapes[origin.key][0] for origin in deciding.facts.writers if origin.kind is Kind.CONV}
    return (tables | linear | conv) - {0}


def _is_number(deciding: Deciding, name: str, uses: list[VectorUse]) -> bool:
    """Whether it is one number for all the units it acts on: it lies along none."""
    units = [own for use in uses for _, own, _ in use.origins if own is not None]
    return prod(deciding.shapes[name]) == 1 and not any(len(own) == 1 for own in units)


def _meets_stream(deciding: Deciding, name: str, uses: list[VectorUse]) -> bool:
    """Whether it acts on what is multiplied with the columns of a tied embedding, and is no bias of a linear map."""
    if any(use.bias_of is not None for use in uses):
        return False
    tied = (table for table, block in deciding.blocks.items() if block.role is Role.TIED_EMBEDDING)
    return any(name in deciding.facts.touched.get(table, ()) for table in tied)


def _along(deciding: Deciding, use: VectorUse) -> str | None:
    found = {_lies(deciding, use, origin, units, bend) for origin, units, bend in use.origins}
    if RESIDUAL in found:
        return RESIDUAL
    if found == {str(Role.GATE), str(Role.UP)}:
        return str(Role.UP)
    return found.pop() if len(found) == 1 else None


def _lies(deciding: Deciding, use: VectorUse, origin: Origin, units: frozenset[int] | None, bend: int) -> str | None:
    if origin.kind in (Kind.SCORES, Kind.WEIGHTS):
        return HEADS if deciding.facts.attentions[int(origin.key)].width else None
    if origin.kind is Kind.STREAM or (origin.kind is Kind.INPUT and origin in deciding.facts.writers):
        return RESIDUAL
    block = deciding.blocks.get(origin.key) if origin.kind in (Kind.LINEAR, Kind.CONV) else None
    if block is None:
        return None
    if block.role is Role.QKV:
        for part, own in deciding.rows.get(origin.key, {}).items():
            if units is not None and units and units <= own:
                return part
        return str(block.role)
    if block.role not in _OUTWARD:
        return str(block.role)
    if origin in deciding.facts.writers:
        return RESIDUAL
    whole = bend == STRAIGHT and _covers(deciding, origin.key, block, units)
    return str(block.role) if whole or block.role not in (Role.LINEAR, Role.CONV) else None


def _covers(deciding: Deciding, name: str, block: Block, units: frozenset[int] | None) -> bool:
    """Whether units are all rows of a map, or all of one matrix of its layout."""
    if units is None:
        return False
    if block.role is Role.CONV:
        return len(units) == deciding.shapes[name][0]
    start, pieces = 0, [frozenset(range(deciding.outputs(name)))]
    for size in getattr(block.layout, "sizes", ()):
        pieces.append(frozenset(range(start, start + size)))
        start += size
    return units in pieces


def _shift(deciding: Deciding, uses: list[VectorUse]) -> tuple[bool | None, bool]:
    """Whether the loss cannot see a number added to every entry, as with the bias of a softmax; and of a z-loss."""
    for use in uses:
        if use.what != "bias" or len(use.origins) != 1:
            continue
        origin, units, bend = use.origins[0]
        block = deciding.blocks.get(origin.key)
        if block is None or block.role not in _LOGITS or bend != STRAIGHT or units is None:
            continue
        if len(units) != deciding.outputs(origin.key):
            continue
        if block.role is Role.TIED_EMBEDDING:
            return origin.key in deciding.plain, False
        return block.symmetry.shift_invariant, block.z_loss
    return None, False
