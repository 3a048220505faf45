"""Vocabulary: the same permutation of token ids in embedding, head and batch; and of classes in a classifier.

Shape legend:  V vocabulary or classes, d residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Generator, Tensor, nn

from lit_symopt.audit.elements import permutation
from lit_symopt.audit.moves import Change, Edit, Move, Refusal, without
from lit_symopt.audit.sites import Anatomy, Vector
from lit_symopt.audit.views import sizes, units
from lit_symopt.blocks import Block, Role
from lit_symopt.errors import TaxonomyError

_SYMMETRY = "vocabulary"
Tables = Callable[[Sequence[str], Tensor], list[str]]


def vocabulary(
    model: Anatomy,
    generator: Generator,
    *,
    tables: Tables,
    fixed: frozenset[int] = frozenset(),
    joined: bool = False,
) -> list[Move | Refusal]:
    """Rows of embeddings and head with the batch's ids; a head of other rows is that of a classifier.

    Args:
        model: the sites.
        generator: random numbers.
        tables: which of some tables are looked up with the batch's token ids; it is given a permutation of them.
        fixed: token ids that stay where they are.
        joined: heads of other rows than the embeddings score the first or more of the token ids too.
    """
    embeddings, heads = model.of(Role.EMBEDDING, Role.TIED_EMBEDDING), model.of(Role.LM_HEAD)
    try:
        rows = {block.name: sizes(block)[0][0] for block in (*embeddings, *heads)}
    except TaxonomyError as error:
        return [Refusal(symmetry=_SYMMETRY, site="vocabulary", where="", reason=str(error), fails=True)]
    found: list[Move | Refusal] = []
    if not rows:
        return found
    order = nested(sorted(set(rows.values())), generator, fixed=fixed)
    indexed = set(tables([block.name for block in embeddings], order)) if embeddings else set()
    counts = {rows[name] for name in indexed}
    if joined and indexed:
        counts |= {rows[head.name] for head in heads if not _stays(order[: rows[head.name]])}
    joint = [b for b in (*embeddings, *heads) if b.name in indexed or (b in heads and rows[b.name] in counts)]
    if indexed:
        found.append(_move(model, joint, rows, nested(sorted(counts), generator, fixed=fixed)))
    found += [
        Refusal(
            symmetry=_SYMMETRY,
            site="vocabulary",
            where=block.name,
            reason=f"its {rows[block.name]} rows are not looked up with the batch's token ids",
        )
        for block in embeddings
        if block.name not in indexed
    ]
    others = [head for head in heads if head not in joint]
    return found + [
        _move(model, [head], rows, permutation(rows[head.name], generator), of_classes=True) for head in others
    ]


def nested(counts: Sequence[int], generator: Generator, *, fixed: frozenset[int] = frozenset()) -> Tensor:
    """A permutation of all ids that maps the first `count` onto themselves, for the size of each vocabulary.

    >>> nested([1, 5], Generator().manual_seed(0), fixed=frozenset({3})).tolist()
    [0, 2, 4, 3, 1]
    """
    order, start = torch.arange(counts[-1]), 0
    stays = torch.isin(order, torch.tensor(sorted(fixed), dtype=order.dtype))
    for count in counts:
        free = start + (~stays[start:count]).nonzero().flatten()
        order[free] = free[permutation(len(free), generator)]
        start = count
    return order


def padding(module: nn.Module) -> frozenset[int]:
    """The ids that a module's parts and configs say are padding: masks and positions may be computed from them."""
    found: set[object] = set()
    for child in module.modules():
        config = getattr(child, "config", None)
        found |= {getattr(child, "padding_idx", None)}
        found |= (
            {getattr(config, name, None) for name in ("pad_token_id", "pad_index")} if config is not None else set()
        )
    return frozenset(value for value in found if isinstance(value, int) and value >= 0)


def _move(
    model: Anatomy, blocks: list[Block], rows: Mapping[str, int], order: Tensor, *, of_classes: bool = False
) -> Move | Refusal:
    if _stays(order):
        reason = "it has one row" if len(order) == 1 else "none of its rows can change places"
        return Refusal(symmetry=_SYMMETRY, site="vocabulary", where=blocks[0].name, reason=reason)
    edits = {
        block.name: Edit(source=block.name, change=units(block, _permuted(order[: rows[block.name]])))
        for block in blocks
    }
    names = {name: rows[block.name] for block in blocks for name in (block.name, *block.aliases)}
    scored = any(block.role is not Role.EMBEDDING for block in blocks)
    for vector in model.vectors:
        count = (vector.block.shape or (0,))[-1]
        if _along(vector, names) and count in names.values():
            change = _permuted(order[:count])
            edits[vector.block.name] = Edit(source=vector.block.name, change=_of_column(change))
    return Move(
        symmetry=_SYMMETRY,
        site="classes" if of_classes else "vocabulary",
        where=blocks[-1].name,
        edits=edits,
        broken=without(edits, blocks[0].name) if len(blocks) > 1 else edits,
        labels=order,
        relabels="classes" if of_classes else "both" if scored else "tokens",
        broken_labels=len(blocks) > 1,
    )


def _stays(order: Tensor) -> bool:
    return torch.equal(order, torch.arange(len(order)))


def _permuted(order: Tensor) -> Change:
    inverse = torch.argsort(order)  # row order[t] of the new table is row t of the old one
    return lambda x: x[..., inverse.to(x.device), :]


def _of_column(change: Change) -> Change:
    return lambda x: change(x.unsqueeze(-1)).squeeze(-1)


def _along(vector: Vector, names: Mapping[str, int]) -> bool:
    if vector.weight is not None:
        return vector.weight.name in names
    return vector.along == str(Role.LM_HEAD)
