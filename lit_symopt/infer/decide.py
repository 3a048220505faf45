"""Deciding a role for every parameter from the evidence."""

from __future__ import annotations

import re
from collections import Counter

from lit_symopt.blocks import HEADS, Block, Role
from lit_symopt.infer.attention import decide_attention
from lit_symopt.infer.deciding import Deciding, Shape, stored
from lit_symopt.infer.facts import Facts
from lit_symopt.infer.flow import BENT, Kind
from lit_symopt.infer.neurons import decide_neurons
from lit_symopt.infer.vectors import decide_tables, decide_vectors
from lit_symopt.layout import Layout


def decide(facts: Facts, shapes: dict[str, Shape]) -> Deciding:
    """A block for every parameter whose place the evidence decides, and a reason for every other one.

    Args:
        facts: what following the graph found.
        shapes: of all parameters, by first name, frozen ones too.
    """
    deciding = Deciding(facts, shapes)
    for name, uses in facts.strange.items():
        if len(shapes[name]) > 1:
            deciding.ask(name, f"is used by {', '.join(sorted(uses))}")
    _vocabulary(deciding)
    _routers(deciding)
    _convolutions(deciding)
    decide_attention(deciding)
    decide_neurons(deciding)
    _others(deciding)
    decide_tables(deciding)
    decide_vectors(deciding)
    return deciding


# -- the two ends ------------------------------------------------------------------------------------------------


def _vocabulary(deciding: Deciding) -> None:
    facts = deciding.facts
    for name in facts.applications:
        if name not in facts.routed and _is_head(deciding, name) and _plain_softmax(deciding, name):
            deciding.plain.add(name)
    for name, kinds in facts.embeddings.items():
        if name in facts.tables or not deciding.free(name):
            continue  # biases of scores, or strange
        if len(deciding.shapes[name]) != 2:
            deciding.ask(name, "is looked up by integers and has not two dimensions")
        elif name in facts.applications:
            deciding.decide(Block(name, role=Role.TIED_EMBEDDING))
        else:
            deciding.decide(Block(name, role=Role.EMBEDDING if "tokens" in kinds else Role.POSITION))
    for name in facts.applications:
        application = deciding.application(name)
        if application is None or not deciding.free(name) or name in facts.routed or not _is_head(deciding, name):
            continue
        if len(deciding.shapes[name]) == 2 and deciding.outputs(name) > 1:
            layout = Layout.matrix() if stored(application) == "out_in" else Layout.transposed(stored="in_out")
            plain = name in deciding.plain
            deciding.decide(Block(name, role=Role.LM_HEAD, layout=layout, shift_invariant=plain))


def _is_head(deciding: Deciding, name: str) -> bool:
    """Whether a map's outputs are logits: under a logarithmic softmax, or returned as such."""
    facts = deciding.facts
    if any(use.log and "chosen" not in use.marks for use in facts.normalized.get(name, [])):
        return True
    if {("logsumexp", ""), ("picked", "")} <= facts.ends.get(name, set()):  # log Σ exp(z) - z[label] by hand
        return True
    sizes = {deciding.shapes[table][0] for table, kinds in facts.embeddings.items() if "tokens" in kinds}
    return any(
        path.split(".")[-1] == "logits" or (path == "" and deciding.outputs(name) in sizes)
        for path, _, _ in facts.returned.get(name, [])
    )


def _plain_softmax(deciding: Deciding, name: str) -> bool:
    """Whether nothing between the map and the softmax, and no z-loss, sees a shift of all logits."""
    facts = deciding.facts
    if name in facts.squared:
        return False
    paths = [(use.bend, use.marks) for use in facts.normalized.get(name, []) if use.log]
    paths = paths or [(bend, marks) for _, bend, marks in facts.returned.get(name, [])]
    return all(bend < BENT and not marks & {"clipped", "normed"} for bend, marks in paths)


# -- routers, convolutions, the rest -----------------------------------------------------------------------------


def _routers(deciding: Deciding) -> None:
    for name, marks in deciding.facts.routed.items():
        application = deciding.application(name)
        if not deciding.free(name):
            continue
        if application is None or len(deciding.shapes[name]) != 2:
            deciding.ask(name, "chooses among experts, but is not one matrix")
            continue
        if deciding.outputs(name) not in _experts(deciding, name):
            _ask_for_experts(deciding, name)
            continue
        layout = Layout.matrix() if stored(application) == "out_in" else Layout.transposed(stored="in_out")
        z_loss = name in deciding.facts.squared
        shift = "softmax" in marks and _is_blind(deciding.facts, name) and not z_loss
        deciding.decide(Block(name, role=Role.ROUTER, layout=layout, shift_invariant=shift, z_loss=z_loss))


def _experts(deciding: Deciding, router: str) -> set[int]:
    """The numbers of matrices in the stacks that are applied, and of members in the lists nearest to a router."""
    stacks = {deciding.shapes[name][0] for name in deciding.facts.applications if len(deciding.shapes[name]) == 3}
    around = ["", *(router[: number.end() + 1] for number in re.finditer(r"\d+", router))]
    for scope in reversed(around):
        members = Counter(
            (name[: number.start()], name[number.end() :], shape)
            for name, shape in deciding.shapes.items()
            if name.startswith(scope)
            for number in re.finditer(r"\d+", name)
            if not router.startswith(name[: number.start()])
        )
        if max(members.values(), default=0) > 1:
            return stacks | set(members.values())
    return stacks


def _ask_for_experts(deciding: Deciding, name: str) -> None:
    outputs = deciding.outputs(name)
    deciding.ask(
        name,
        f"weighs activations by those of its {outputs} outputs that a top-k chooses, but {outputs} experts that belong "
        "to them are not seen",
    )
    softmax = "softmax" in deciding.facts.routed[name]
    deciding.suggestions[name] = f"role=Role.ROUTER, shift_invariant={softmax}"


def _is_blind(facts: Facts, name: str) -> bool:
    """Whether every softmax of a router's logits sees them straight: a threshold or a cap before it sees a shift."""
    first = [use for use in facts.normalized.get(name, []) if "softmax" not in use.marks]
    return all(use.bend < BENT and not use.marks & {"clipped", "normed"} for use in first)


def _convolutions(deciding: Deciding) -> None:
    for name in deciding.facts.convolutions:
        if deciding.free(name):
            if len(deciding.shapes[name]) > 2:
                deciding.decide(Block(name, role=Role.CONV, layout=Layout.flatten()))
            else:
                deciding.ask(name, "is the kernel of a convolution, but has fewer than three dimensions")


def _others(deciding: Deciding) -> None:
    for name in deciding.facts.recurrent:
        if deciding.free(name) and len(deciding.shapes[name]) == 2:
            deciding.decide(Block(name, role=Role.LINEAR))
    for name in deciding.facts.applications:
        if not deciding.free(name):
            continue
        application = deciding.application(name)
        if application is None:
            deciding.ask(name, "is applied as a linear map in more than one way")
        elif any(what == "chosen" for what, _ in deciding.facts.ends[name]) and name not in deciding.facts.routed:
            deciding.ask(name, "has outputs that a top-k chooses among, and what becomes of those is not seen")
        elif len(deciding.shapes[name]) == 2:
            layout = Layout.matrix(stored=stored(application))
            along = HEADS if name in deciding.facts.gates else None
            deciding.decide(Block(name, role=Role.LINEAR, layout=layout, along=along))
        else:
            read = {reading.origin.kind for each in deciding.facts.applications[name] for reading in each.readings}
            what = " and ".join(sorted(kind.value for kind in read - {Kind.OPAQUE})) or "an unknown activation"
            deciding.ask(name, f"is a stack of linear maps (reading {what}) that is no mixture of experts")
