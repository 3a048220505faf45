"""Deciding attention: which rows of which parameter are queries, keys and values of which head."""

from __future__ import annotations

from collections import defaultdict
from itertools import groupby

import torch
from torch import Tensor

from lit_symopt.blocks import Action, Block, Role
from lit_symopt.infer.deciding import Deciding, counts, stored
from lit_symopt.infer.facts import HeadRows
from lit_symopt.infer.flow import STRAIGHT, Kind
from lit_symopt.layout import Layout, QKVOrder, Stored

ORDERS: tuple[QKVOrder, ...] = ("stacked", "per_head", "per_group")
_ROLES = {"query": Role.QUERY, "key": Role.KEY, "value": Role.VALUE}
_Parts = dict[str, list[HeadRows]]


def decide_attention(deciding: Deciding) -> None:
    """Decide the projections into and out of every attention."""
    bent = _bent(deciding)
    for name, parts in _parts(deciding).items():
        if deciding.free(name):
            _projection(deciding, name, parts, mixing=name not in bent)
    for name in list(deciding.facts.applications):
        if deciding.free(name):
            _output(deciding, name, bent)


def _parts(deciding: Deciding) -> dict[str, _Parts]:
    """By parameter, what it contributes to queries, keys and values; equal contributions once."""
    found: dict[str, _Parts] = defaultdict(lambda: defaultdict(list))
    for record in deciding.facts.attentions:
        if record.width == 0:
            continue  # its scores never met values
        for part, contributions in (("query", record.queries), ("key", record.keys), ("value", record.values)):
            for each in contributions:
                known = found[each.origin.key][part]
                if each.origin.kind is Kind.LINEAR and not any(torch.equal(each.rows, k.rows) for k in known):
                    known.append(each)
    return {name: parts for name, parts in found.items() if name in deciding.facts.applications}


def _bent(deciding: Deciding) -> frozenset[str]:
    """Attentions (by number) and value projections where something else sees the values, or sees them bent."""
    found = set()
    for number, record in enumerate(deciding.facts.attentions):
        gated = any(
            reading.origin.key == str(number) and (len(each.readings) > 1 or reading.bend or "normed" in reading.marks)
            for applications in deciding.facts.applications.values()
            for each in applications
            for reading in each.readings
            if reading.origin.kind is Kind.ATTENDED
        )
        seen = any(
            value.bend != STRAIGHT or "normed" in value.marks or _is_read_elsewhere(deciding, value.origin.key)
            for value in record.values
        )
        if gated or seen:
            found |= {str(number), *(value.origin.key for value in record.values)}
    return frozenset(found)


def _is_read_elsewhere(deciding: Deciding, name: str) -> bool:
    """Whether something but attentions reads a projection's outputs."""
    return any(what not in ("scores", "sum") for what, _ in deciding.facts.ends[name])


# -- into the attention ------------------------------------------------------------------------------------------


def _projection(deciding: Deciding, name: str, parts: _Parts, *, mixing: bool) -> None:
    application = deciding.application(name)
    if application is None or len(deciding.shapes[name]) != 2:
        deciding.ask(name, "is a stack of maps, not one matrix, that writes queries, keys or values")
        return
    if any(len(each) > 1 for each in parts.values()):
        deciding.ask(name, "writes different heads in different attentions")
        return
    way, width = stored(application), deciding.outputs(name)
    heads = {part: _heads(each[0].rows) for part, each in parts.items() if each}
    deciding.rows[name] = {part: frozenset(i for head in each for i in head) for part, each in heads.items()}
    action: Action | None
    action, rotary_dim = _action([each[0] for part, each in parts.items() if part != "value"], heads)
    if _is_read_elsewhere(deciding, name):
        action, rotary_dim = Action.NONE, None
    if set(heads) == {"value"}:
        action, rotary_dim = (Action.GENERAL_LINEAR if mixing else Action.NONE), None
    block = _layout(name, heads, width, way)
    if block is None:
        block = _latent(deciding, name, heads, width)
        action, rotary_dim = None, None
    if block is None:
        deciding.ask(name, f"its rows are {_described(heads)} in an order that no layout says")
        deciding.suggestions[name] = _one_matrix_a_head(heads, width, way)
        return
    role, layout = block
    deciding.decide(Block(name, role=role, layout=layout, action=action, rotary_dim=rotary_dim))


def _heads(rows: Tensor) -> list[list[int]]:
    """For each head the sorted rows it reads."""
    found = [sorted(set(head.flatten().tolist()) - {-1}) for head in rows]
    return [head for head in found if head]


def _layout(name: str, heads: dict[str, list[list[int]]], width: int, way: Stored) -> tuple[Role, Layout] | None:
    if len(heads) == 1:
        ((part, each),) = heads.items()
        if [row for head in each for row in head] == list(range(width)) and len({len(head) for head in each}) == 1:
            dim = "rows" if way == "out_in" else "columns"
            return _ROLES[part], Layout.heads(len(each), dim=dim, stored=way)  # type: ignore[arg-type]
        return None
    if len(heads) == 3:
        for order in ORDERS:
            layout = _qkv(heads, order, way)
            if layout is not None:
                return Role.QKV, layout
        return None
    pieces = sorted(head for each in heads.values() for head in each)
    if [row for piece in pieces for row in piece] == list(range(width)):
        return Role.QKV, Layout.split([len(piece) for piece in pieces], dim="rows" if way == "out_in" else "columns")
    return None


def _qkv(heads: dict[str, list[list[int]]], order: QKVOrder, way: Stored) -> Layout | None:
    """The fused layout in this order, if it puts every row where it was seen."""
    queries, keys, values = heads["query"], heads["key"], heads["value"]
    sizes = {len(head) for each in heads.values() for head in each}
    if len(sizes) != 1 or len(keys) != len(values) or len(queries) % len(keys):
        return None
    if order == "per_head" and len(queries) != len(keys):
        return None
    head_dim = sizes.pop()
    rows = torch.arange((len(queries) + 2 * len(keys)) * head_dim).unsqueeze(-1)
    layout = Layout.qkv(len(queries), len(keys), head_dim, order=order)
    seen = [[row for head in each for row in head] for each in (queries, keys, values)]
    laid = [part.flatten().tolist() for part in layout.whole().to_matrices(rows)]
    if laid != seen:
        return None
    return Layout.qkv(len(queries), len(keys), head_dim, order=order, stored=way)


def _latent(deciding: Deciding, name: str, heads: dict[str, list[list[int]]], width: int) -> tuple[Role, Layout] | None:
    """A map of whose rows some are a key shared by all heads, and the others are read by another linear map."""
    if len(heads) != 1 or not any(what == "into" for what, _ in deciding.facts.ends[name]):
        return None
    used = [row for each in heads.values() for head in each for row in head]
    if len(used) == width or used != list(range(used[0], used[-1] + 1)):
        return None
    sizes = [size for size in (used[0], len(used), width - used[-1] - 1) if size]
    return Role.LINEAR, Layout.split(sizes)


def _one_matrix_a_head(heads: dict[str, list[list[int]]], width: int, way: Stored) -> str:
    """The arguments of a block that at least keeps heads apart: one piece for each run of rows with the same use."""
    use = dict.fromkeys(range(width), "")
    for part, each in heads.items():
        for number, head in enumerate(each):
            use.update(dict.fromkeys(head, f"{part} {number}"))
    sizes = [len(list(run)) for _, run in groupby(use[row] for row in range(width))]
    dim = "" if way == "out_in" else ', dim="columns"'
    role = "QKV" if len(heads) > 1 else "LINEAR"
    return f"role=Role.{role}, layout=Layout.split({tuple(sizes)}{dim}), action=Action.NONE"


def _action(rotated: list[HeadRows], heads: dict[str, list[list[int]]]) -> tuple[Action, int | None]:
    """What acts on queries and keys, by the planes that a rotary embedding turns."""
    planes, width = set(), 0
    for each in rotated:
        for head in each.rows:
            start = min((row for row in head.flatten().tolist() if row >= 0), default=0)
            entries = [sorted({row - start for row in entry if row >= 0}) for entry in head.tolist()]
            width = max(width, len({row for entry in entries for row in entry}))
            planes.add(frozenset(tuple(entry) for entry in entries if len(entry) > 1))
    if any(each.bend != STRAIGHT for each in rotated):
        return Action.NONE, None
    if len(planes) != 1:
        return Action.NONE, None
    turned = planes.pop()
    if not turned:
        # A norm between projection and product leaves only rotations that keep its gains; fixed weights not even these.
        seen = any(each.marks & {"normed", "weighted"} for each in rotated)
        return (Action.NONE if seen else Action.GENERAL_LINEAR), None
    dims = 2 * len(turned)
    rotary_dim = dims if dims < width else None
    if turned == {(i, i + dims // 2) for i in range(dims // 2)}:
        return Action.ROTARY_HALVES, rotary_dim
    if turned == {(2 * i, 2 * i + 1) for i in range(dims // 2)}:
        return Action.ROTARY_NEIGHBORS, rotary_dim
    return Action.NONE, None


def _described(heads: dict[str, list[list[int]]]) -> str:
    return " and ".join(f"the {part} of {len(each)} head(s)" for part, each in heads.items())


# -- out of it ---------------------------------------------------------------------------------------------------


def _output(deciding: Deciding, name: str, bent: frozenset[str]) -> None:
    readings = [
        (each, reading)
        for each in deciding.facts.applications[name]
        for reading in each.readings
        if reading.origin.kind is Kind.ATTENDED
    ]
    if not readings:
        return
    application = deciding.application(name)
    layouts = set()
    for each, reading in readings:
        record = deciding.facts.attentions[int(reading.origin.key)]
        if record.lost:
            deciding.ask(name, "reads an attention whose queries or keys could not be followed")
            return
        width = record.width
        if application is None or not counts(reading.units) or not counts(each.inputs):
            deciding.ask(name, "reads the heads of an attention in an order that no layout says")
            return
        heads = len(each.inputs) // width
        way = stored(application)
        layouts.add(Layout.heads(heads, dim="columns" if way == "out_in" else "rows", stored=way))
    if len(layouts) > 1:
        deciding.ask(name, "reads attentions with different heads")
        return
    mixed = all(reading.origin.key not in bent for _, reading in readings)
    action = Action.GENERAL_LINEAR if mixed else Action.NONE
    deciding.decide(Block(name, role=Role.ATTENTION_OUT, layout=layouts.pop(), action=action))
