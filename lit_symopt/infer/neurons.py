"""Deciding MLPs: a linear map whose outputs pass through an activation into another one, with a gate or without."""

from __future__ import annotations

from lit_symopt.blocks import Action, Block, Role
from lit_symopt.infer.deciding import Deciding, by_columns, by_rows, counts, stored
from lit_symopt.infer.facts import Application, Reading
from lit_symopt.infer.flow import BENT, STRAIGHT, Kind
from lit_symopt.layout import GateUpOrder, Layout

_EXPERT = {Role.GATE: Role.EXPERT_GATE_UP, Role.UP: Role.EXPERT_GATE_UP, Role.GATE_UP: Role.EXPERT_GATE_UP}


def decide_neurons(deciding: Deciding) -> None:
    """Decide every MLP, in the order in which they ran."""
    for name, applications in deciding.facts.applications.items():
        if not deciding.free(name):
            continue
        readings = {each.readings for each in applications}
        if len(readings) == 1 and all(counts(each.inputs) for each in applications):
            _mlp(deciding, name, applications[0], readings.pop())


def _mlp(deciding: Deciding, down: str, application: Application, readings: tuple[Reading, ...]) -> None:
    neurons = deciding.shapes[down][application.in_axis]
    plain = all(
        reading.origin.kind is Kind.LINEAR
        and reading.units is not None
        and len(set(reading.units)) == len(reading.units) == neurons
        and -1 not in reading.units
        for reading in readings
    )
    writers = {reading.origin.key for reading in readings}
    if not plain or not all(_private(deciding, writer, down) for writer in writers):
        return
    if len(readings) == 1 and readings[0].bend == BENT:
        found = _ungated(deciding, readings[0])
    elif len(readings) == 2:
        found = _gated(deciding, *readings)
    else:
        return
    experts = len(deciding.shapes[down]) == 3
    if found is None or (experts and not deciding.facts.routed):  # nothing chooses among them
        return
    blocks, action = found
    for block in blocks:
        deciding.decide(block)
    layout = by_columns(application)
    deciding.decide(
        Block(
            down,
            role=Role.EXPERT_DOWN if experts else Role.DOWN,
            layout=Layout.experts(layout) if experts else layout,
            action=action,
        )
    )


def _private(deciding: Deciding, writer: str, reader: str) -> bool:
    """Whether nothing but one linear map reads a map's outputs, so that its units may change places with that map's."""
    allowed = {("into", reader), ("chosen", "")}
    return deciding.free(writer) and deciding.facts.ends[writer] <= allowed


def _ungated(deciding: Deciding, reading: Reading) -> tuple[list[Block], Action] | None:
    block = _writer(deciding, reading, Role.UP, Action.PERMUTATION)
    return None if block is None else ([block], Action.PERMUTATION)


def _gated(deciding: Deciding, first: Reading, second: Reading) -> tuple[list[Block], Action] | None:
    gate, up = (first, second) if first.bend >= second.bend else (second, first)
    # Linear in `up`: its neurons may also be scaled, `down`'s the other way. Not behind a norm or a clip.
    linear = up.bend == STRAIGHT and gate.bend == BENT and "normed" not in up.marks | gate.marks
    action = Action.MONOMIAL if linear else Action.PERMUTATION
    if gate.origin == up.origin:
        block = _fused(deciding, gate, up, action)
        return None if block is None else ([block], block.acts)
    blocks = [_writer(deciding, gate, Role.GATE, Action.PERMUTATION), _writer(deciding, up, Role.UP, action)]
    known = [block for block in blocks if block is not None]
    return (known, action) if len(known) == 2 else None


def _writer(deciding: Deciding, reading: Reading, role: Role, action: Action) -> Block | None:
    name = reading.origin.key
    application = deciding.application(name)
    if application is None or not counts(reading.units) or deciding.outputs(name) != len(reading.units or ()):
        return None
    experts = len(deciding.shapes[name]) == 3
    layout = by_rows(application)
    return Block(
        name,
        role=_EXPERT[role] if experts else role,
        layout=Layout.experts(layout) if experts else layout,
        action=action,
    )


def _fused(deciding: Deciding, gate: Reading, up: Reading, action: Action) -> Block | None:
    name = gate.origin.key
    application = deciding.application(name)
    if application is None or gate.units is None or up.units is None:
        return None
    neurons = len(gate.units)
    if deciding.outputs(name) != 2 * neurons:
        return None
    pairs: dict[GateUpOrder, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "stacked": (tuple(range(neurons)), tuple(range(neurons, 2 * neurons))),
        "interleaved": (tuple(range(0, 2 * neurons, 2)), tuple(range(1, 2 * neurons, 2))),
    }
    for order, expected in pairs.items():
        if expected in ((gate.units, up.units), (up.units, gate.units)):
            # With `up` first only what acts on both alike can be said.
            action = action if gate.units == expected[0] else Action.PERMUTATION
            layout = Layout.gate_up(order, stored=stored(application))
            experts = len(deciding.shapes[name]) == 3
            return Block(
                name,
                role=Role.EXPERT_GATE_UP if experts else Role.GATE_UP,
                layout=Layout.experts(layout) if experts else layout,
                action=action,
            )
    return None
