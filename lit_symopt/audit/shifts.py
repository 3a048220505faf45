"""The shift that a softmax does not see: one vector added to every unit, W → W + 1aᵀ, and one number to every bias.

It moves the logits by ten times their size, and the bias by enough to pass any soft cap. The control adds it to every
other unit only.

Shape legend:  m units (vocabulary, experts), d features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from lit_symopt.audit.experts import written
from lit_symopt.audit.moves import Edit, Move, Refusal
from lit_symopt.audit.sites import Anatomy, Site
from lit_symopt.audit.views import units
from lit_symopt.blocks import Block, Role

SYMMETRY = "shared shift"
TIMES = 10.0
"""The shift is this many times as long as a row of the weight (root mean square)."""

BEYOND_A_CAP = 200.0
"""At least how far the logits of a head move for features with entries of about one, as a norm leaves them."""

BEYOND_A_TIE = 10.0
"""The same for a router, which no cap follows, and whose softmax transformers computes in float32."""


def shifts(model: Anatomy, generator: Generator) -> list[Move | Refusal]:
    """One shift for each weight that declares it, with its bias, and for each other vector that does."""
    moves: list[Move | Refusal] = []
    for weight in (block for block in model.blocks if block.symmetry.shift_invariant):
        if weight.parts[0].m == 1:
            moves.append(_refusal(weight))
            continue
        edits: dict[str, Edit] = {}
        broken: dict[str, Edit] = {}
        direction = torch.randn(weight.parts[0].n, dtype=torch.float64, generator=generator)
        direction = direction / direction.norm()
        for every, chosen in ((1, edits), (2, broken)):
            chosen[weight.name] = Edit(
                source=weight.name, change=units(weight, _added(direction, every, _least(weight)))
            )
        for vector in model.vectors:
            if vector.weight is weight and vector.block.symmetry.shift_invariant:
                edits[vector.block.name] = _raised(vector.block, 1, _least(weight))
                broken[vector.block.name] = _raised(vector.block, 2, _least(weight))
        moves.append(_move(model, weight, edits, broken))
    for vector in model.vectors:
        block, weight_of = vector.block, vector.weight
        if block.symmetry.shift_invariant and (weight_of is None or not weight_of.symmetry.shift_invariant):
            least = _least(weight_of or block)
            edits, broken = ({block.name: _raised(block, every, least)} for every in (1, 2))
            one = block.parts[0].m == 1
            moves.append(_refusal(block) if one else _move(model, block, edits, broken))
    return moves


def _move(model: Anatomy, block: Block, edits: dict[str, Edit], broken: dict[str, Edit]) -> Move:
    site = next((site for site in model.sites if site.kind == "mixture" and block.name in _names(site)), None)
    return Move(
        symmetry=SYMMETRY,
        site=str(block.role),
        where=block.name,
        edits=edits,
        broken=broken,
        writes=() if site is None else written(site),
    )


def _names(site: Site) -> set[str]:
    return {block.name for block in site.blocks} | {vector.block.name for vector in site.vectors}


def _refusal(block: Block) -> Refusal:
    return Refusal(symmetry=SYMMETRY, site=str(block.role), where=block.name, reason="it has one unit")


def _least(weight: Block) -> float:
    return BEYOND_A_TIE if weight.role is Role.ROUTER or weight.along == str(Role.ROUTER) else BEYOND_A_CAP


def _added(direction: Tensor, every: int, least: float) -> Callable[[Tensor], Tensor]:
    def change(matrix: Tensor) -> Tensor:
        # Features that a norm has passed have entries of about one: x·a is then about ‖a‖.
        length = max(TIMES * float(matrix.square().sum(-1).mean().sqrt()), least)
        moved = matrix.clone()
        moved[..., ::every, :] += length * direction.to(matrix)
        return moved

    return change


def _raised(block: Block, every: int, least: float) -> Edit:
    def change(bias: Tensor) -> Tensor:
        moved = bias.clone()
        moved[..., ::every] += max(TIMES * float(bias.abs().max()), least)
        return moved

    return Edit(source=block.name, change=change)
