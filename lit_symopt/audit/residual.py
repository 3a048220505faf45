"""The residual stream: one orthogonal map of its features in every block that reads or writes it.

RMSNorm leaves signed permutations (the gains of norms are permuted, everything added to the stream changes sign too)
and, where all gains are constant, rotations. LayerNorm subtracts the mean of the features, which leaves permutations.

Shape legend:  d residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from lit_symopt.audit.elements import permutation, rotation, signs
from lit_symopt.audit.moves import Change, Edit, Move, Refusal, without
from lit_symopt.audit.norms import Vectors, probe
from lit_symopt.audit.sites import VOCABULARY_ROLES, Anatomy
from lit_symopt.audit.views import sizes, units
from lit_symopt.blocks import RESIDUAL, Role
from lit_symopt.errors import TaxonomyError

SYMMETRY = "residual stream"
Kind = Literal["signed permutations", "permutations", "rotations"]


def kinds(model: Anatomy, module: nn.Module) -> tuple[list[Kind], list[Refusal]]:
    """The groups to try, the largest discrete one first, and those that do not apply."""
    norms = _norms(model, module)
    if any(known is not None and known.subtracts_mean for known in norms.values()):
        why = "LayerNorm subtracts the mean of the features"
        return ["permutations"], [_refusal("signed permutations", why), _refusal("rotations", why)]
    unknown = [name for name, known in norms.items() if known is None]
    if unknown:
        why = f"whether {unknown[0]!r} multiplies or is added cannot be seen"
        return ["permutations"], [_refusal("signed permutations", why), _refusal("rotations", why)]
    learned = [name for name, known in norms.items() if known is not None and known.gain and not known.constant]
    if learned:
        return ["signed permutations"], [_refusal("rotations", f"the gains of {learned[0]!r} are not constant")]
    return ["signed permutations", "rotations"], []


def _refusal(kind: Kind, reason: str, *, fails: bool = False) -> Refusal:
    return Refusal(symmetry=f"{SYMMETRY}: {kind}", site="residual", where="", reason=reason, fails=fails)


def residual(model: Anatomy, generator: Generator, module: nn.Module, *, kind: Kind) -> Move | Refusal:
    """One element for the whole stream."""
    if blocker := _blocker(model):
        return _refusal(kind, blocker)
    try:
        width = _width(model)
    except TaxonomyError as error:
        return _refusal(kind, str(error), fails=True)
    norms = _norms(model, module)
    map_of, gains = _element(kind, width, generator)
    edits = {block.name: Edit(source=block.name, change=units(block, map_of)) for block in model.blocks}
    for vector in (vector for vector in model.vectors if vector.along == RESIDUAL):
        name, known = vector.block.name, norms.get(vector.block.name)
        edits[name] = Edit(source=name, change=gains if known is not None and known.gain else map_of)
    left_out = next((block for block in model.blocks if block.role not in VOCABULARY_ROLES), model.blocks[0])
    last = next((block for block in model.blocks[::-1] if block.role in VOCABULARY_ROLES), left_out)
    return Move(
        symmetry=f"{SYMMETRY}: {kind}",
        site="residual",
        where="",
        edits=edits,
        broken=without(edits, last.name),
        keep=frozenset(norms) if kind == "rotations" else frozenset(),
    )


def _element(kind: Kind, width: int, generator: Generator) -> tuple[Change, Change]:
    """How the stream's features and the gains of its norms change."""
    if kind == "rotations":
        return rotation(width, generator), torch.clone
    order = permutation(width, generator)
    factor = signs(width, generator) if kind == "signed permutations" else torch.ones(width, dtype=torch.float64)
    return _signed(order, factor), _signed(order, factor.abs())


def _signed(order: Tensor, factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: factor.to(x.device) * x[..., order.to(x.device)]


def _norms(model: Anatomy, module: nn.Module) -> Mapping[str, Vectors | None]:
    """What is known of the vectors along the stream that are not biases of a weight; tokens are simply added."""
    return {
        vector.block.name: probe(module, vector.block.name)
        for vector in model.vectors
        if vector.along == RESIDUAL and vector.weight is None and len(vector.block.shape or ()) == 1
    }


def _blocker(model: Anatomy) -> str | None:
    """Why the stream's blocks are not all known, naming one that is not."""
    unknown = [block.name for block in model.blocks if block.role in (Role.LINEAR, Role.CONV)]
    if unknown:
        return f"which side of {_and_more(unknown)} the stream is on is not known ({Role.LINEAR} or {Role.CONV})"
    unplaced = [vector.block.name for vector in model.vectors if vector.along is None]
    if unplaced:
        return f"where {_and_more(unplaced)} lies is not known (Block(along=...) says it)"
    if model.frozen:
        return f"{_and_more(model.frozen)} is frozen, and no block says what it is"
    if not model.of(Role.EMBEDDING, Role.TIED_EMBEDDING):
        return "no embedding: the stream comes from the batch, which no block transforms"
    if not model.of(Role.LM_HEAD, Role.TIED_EMBEDDING):
        return "no head: the stream is the output, which no block transforms back"
    return None


def _width(model: Anatomy) -> int:
    """The width of the stream, which all blocks share.

    Raises:
        TaxonomyError: naming two blocks that disagree.
    """
    found: list[tuple[str, str, int]] = []
    for block in model.blocks:
        found += [(block.name, f"{block.shape} as {block.layout}", size[1]) for size in sizes(block)]
    for vector in model.vectors:
        if vector.along == RESIDUAL:
            shape = vector.block.shape or (1,)
            found.append((vector.block.name, f"{shape}", shape[-1]))
    first = found[0]
    for other in found:
        if other[2] != first[2]:
            raise TaxonomyError(
                f"{first[0]!r} {first[1]} has {first[2]} features of the residual stream and {other[0]!r} {other[1]} "
                f"has {other[2]}"
            )
    return first[2]


def _and_more(names: Sequence[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
