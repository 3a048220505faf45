"""Neurons: permutations of the hidden units of an MLP or of each expert, and rescaling where `up` is linear.

    gate → P gate,   up → P C up,   down → P C⁻¹ down   (rows are neurons)

C has negative entries, so that gate and up cannot be taken for each other. Where nothing is gated, or the block says
`permutation`, C = 1.

Shape legend:  I neurons, d residual width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from lit_symopt.audit.elements import permutation, scales
from lit_symopt.audit.moves import Change, Edit, Move, Refusal, without
from lit_symopt.audit.sites import Anatomy, Site, Vector
from lit_symopt.audit.views import bias, sizes, units
from lit_symopt.blocks import Action, Block, Role
from lit_symopt.errors import TaxonomyError

_GATES = (Role.GATE, Role.GATE_UP, Role.EXPERT_GATE_UP)
_UPS = (Role.UP, Role.GATE_UP, Role.EXPERT_GATE_UP)
_DOWNS = (Role.DOWN, Role.EXPERT_DOWN)
_FUSED = (Role.GATE_UP, Role.EXPERT_GATE_UP)
_ALONG = (*map(str, (Role.GATE, Role.UP, *_FUSED)),)


def neurons(model: Anatomy, generator: Generator) -> list[Move | Refusal]:
    """One element for each MLP, and one for all experts of each mixture together, with permutations of their own."""
    inside_mixtures = {expert.where for site in model.sites for expert in site.experts}
    found: list[Move | Refusal] = []
    for site in model.sites:
        if site.kind == "mixture" and site.experts:
            found.append(_together(site, [_move(expert, generator) for expert in site.experts]))
        elif (site.kind == "mlp" and site.where not in inside_mixtures) or site.of(*_DOWNS):
            found.append(_move(site, generator))
    return found


def _together(site: Site, moves: Sequence[Move | Refusal]) -> Move | Refusal:
    refused = next((move for move in moves if isinstance(move, Refusal)), None)
    if refused is not None:
        return Refusal(**{**refused.__dict__, "site": "experts"})
    edits = {name: edit for move in moves if isinstance(move, Move) for name, edit in move.edits.items()}
    broken = {name: edit for move in moves if isinstance(move, Move) for name, edit in move.broken.items()}
    return Move(
        symmetry=moves[0].symmetry,
        site="experts",
        where=site.where,
        edits=edits,
        broken=broken,
        writes=tuple(block.name for block in site.of(*_DOWNS)),
    )


def _move(site: Site, generator: Generator) -> Move | Refusal:
    kind = "experts" if site.kind == "mixture" else site.kind
    if site.problem is not None:
        return Refusal(symmetry="neurons", site=kind, where=site.where, reason=site.problem)
    downs, ups = site.of(*_DOWNS), site.of(*_UPS)
    if len(downs) != 1 or len(ups) != 1:
        reason = f"{len(ups)} up and {len(downs)} down projections; one of each makes an MLP"
        return Refusal(symmetry="neurons", site=kind, where=site.where, reason=reason)
    try:
        gates = [block for block in site.of(*_GATES) if block.role is not Role.EXPERT_GATE_UP or _paired(block)]
        count, many = _agree([*gates, *ups, *downs])
    except TaxonomyError as error:
        return Refusal(symmetry="neurons", site=kind, where=site.where, reason=str(error), fails=True)
    scaled = bool(gates) and all(block.acts is Action.MONOMIAL for block in (*ups, *downs))
    order = torch.stack([permutation(count, generator) for _ in range(many)])
    factor = torch.stack([scales(count, generator) if scaled else torch.ones(count).double() for _ in range(many)])
    element = _Element(order, factor)
    edits = {}
    for block in {block.name: block for block in (*gates, *ups, *downs)}.values():
        edits[block.name] = Edit(source=block.name, change=units(block, element.of(block)))
    for vector in site.vectors:
        weight, name = vector.weight, vector.block.name
        if weight is not None and weight.role in (*_GATES, *_UPS):
            edits[name] = Edit(source=name, change=bias(weight, _each(element.of(weight))))
        elif _is_gain(vector, count, many):
            edits[name] = Edit(source=name, change=_of_column(element.gain()))
    return Move(
        symmetry="neurons: monomial" if scaled else "neurons: permutation",
        site=kind,
        where=site.where,
        edits=edits,
        broken=without(edits, downs[0].name),
        writes=(downs[0].name,),
    )


class _Element:
    """One permutation and one set of factors for each expert: `order`, `factor` `[E or 1, I]`."""

    def __init__(self, order: Tensor, factor: Tensor) -> None:
        self.order, self.factor = order, factor

    def of(self, block: Block) -> _Rows:
        """How it acts on the rows of a block, `[..., I, d]`, with `[E, 2, I, d]` where gate and up are fused."""
        if _paired(block):
            return _Rows(self.order, torch.stack([torch.ones_like(self.factor), self.factor], 1), fused=True)
        if block.role is Role.GATE:
            return self.gain()
        return _Rows(self.order, 1 / self.factor if block.role in _DOWNS else self.factor)

    def gain(self) -> _Rows:
        """How it acts on what is not rescaled."""
        return _Rows(self.order, torch.ones_like(self.factor))


def _paired(block: Block) -> bool:
    """Whether a block holds the gate and the up of each neuron; experts without a gate hold one matrix each."""
    return block.role in _FUSED and len(block.parts[0].batch) == 1 + (len(block.shape or ()) == 3)


def _is_gain(vector: Vector, count: int, many: int) -> bool:
    """Whether a vector that is no bias has one number a neuron, such as the gains of a norm before `down`."""
    shape = vector.block.shape or ()
    fits = shape == (many, count) or (many == 1 and shape == (count,))
    return vector.weight is None and not vector.contradicts and vector.along in _ALONG and fits


def _of_column(change: Change) -> Change:
    return lambda x: change(x.unsqueeze(-1)).squeeze(-1)


def _each(change: Change) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda matrices: [change(matrix) for matrix in matrices]


class _Rows:
    def __init__(self, order: Tensor, factor: Tensor, *, fused: bool = False) -> None:
        self.order, self.factor, self.fused = order, factor, fused

    def __call__(self, x: Tensor) -> Tensor:
        # A single MLP is a stack of one expert.
        single = x.dim() == (3 if self.fused else 2)
        stack = x.unsqueeze(0) if single else x
        order = self.order.unsqueeze(1).expand(-1, 2, -1) if self.fused else self.order
        index = order.to(x.device).unsqueeze(-1).expand(stack.shape)
        moved = self.factor.to(x.device).unsqueeze(-1) * stack.gather(-2, index)
        return moved.squeeze(0) if single else moved


def _agree(blocks: Sequence[Block]) -> tuple[int, int]:
    """The number of neurons and of experts that all blocks have.

    Raises:
        TaxonomyError: naming two blocks that disagree.
    """
    seen: list[tuple[Block, int, int]] = []
    for block in blocks:
        parts = sizes(block)
        batch = [size for part in block.parts for size in part.batch]
        fused = block.role is Role.GATE_UP or _paired(block)
        if (
            len(parts) != 1
            or len(batch) != (1 if fused else 0) + (len(block.shape or ()) == 3)
            or (fused and batch[-1] != 2)
        ):
            raise TaxonomyError(
                f"{block.name!r} {block.shape}: the layout {block.layout} does not hold what role {block.role} needs"
            )
        seen.append((block, parts[0][0], batch[0] if len(block.shape or ()) == 3 else 1))
        first = seen[0]
        if (first[1], first[2]) != seen[-1][1:]:
            shown = [f"{b.name!r} {b.shape} as {b.layout} has {m} neurons" for b, m, _ in (first, seen[-1])]
            raise TaxonomyError(f"{' and '.join(shown)}; they must have equally many")
    return seen[0][1], seen[0][2]
