"""Experts: the same permutation of router rows, router bias, expert stacks or modules, and routing buffers.

Routing that first chooses groups of experts leaves only permutations that keep the groups together; `grouped` are the
elements to try where the full group fails.

Shape legend:  E experts, d residual width.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Generator, Tensor, nn

from lit_symopt.audit.elements import permutation, wreath
from lit_symopt.audit.moves import Change, Edit, Move, Refusal, without
from lit_symopt.audit.sites import EXPERT_ROLES, Anatomy, Site, inside
from lit_symopt.audit.views import sizes, units
from lit_symopt.blocks import Role
from lit_symopt.errors import TaxonomyError

SYMMETRY = "experts"


def experts(
    model: Anatomy, generator: Generator, *, buffers: Mapping[str, tuple[int, ...]], groups: int = 1
) -> list[Move | Refusal]:
    """One permutation for each mixture.

    Args:
        model: the sites.
        generator: random numbers.
        buffers: shapes of what is not trained, by name (see `untrained`); those `[E]` inside a mixture take part.
        groups: permute this many groups of experts, and the experts in each, instead of all of them.
    """
    return [_move(site, generator, buffers, groups) for site in model.sites if site.kind == "mixture"]


def divisors(model: Anatomy) -> list[int]:
    """The numbers of groups into which the experts of every mixture can be divided, besides one and all."""
    counts = [site.blocks[0].shape[0] for site in model.sites if site.kind == "mixture" and site.blocks[0].shape]
    smallest = min(counts, default=0)
    return [groups for groups in range(2, smallest) if all(count % groups == 0 for count in counts)]


def _move(site: Site, generator: Generator, buffers: Mapping[str, tuple[int, ...]], groups: int) -> Move | Refusal:
    def refusal(reason: str, *, fails: bool = False) -> Refusal:
        return Refusal(symmetry=SYMMETRY, site="experts", where=site.where, reason=reason, fails=fails)

    if site.problem is not None:
        return refusal(site.problem)
    (router,) = site.of(Role.ROUTER)
    try:
        count = sizes(router)[0][0]
    except TaxonomyError as error:
        return refusal(str(error), fails=True)
    stacks = site.of(*EXPERT_ROLES)
    others = [(block.name, (block.shape or (0,))[0]) for block in stacks]
    others += [(f"{site.where}.*", len(site.experts))] if site.experts else []
    for name, found in others:
        if found != count:
            return refusal(f"{router.name!r} has {count} rows and {name!r} has {found} experts", fails=True)
    if count == 1:
        return refusal("there is one expert")
    order = wreath(groups, count // groups, generator) if groups > 1 else permutation(count, generator)
    edits = {router.name: Edit(source=router.name, change=units(router, lambda x: x[..., order.to(x.device), :]))}

    def along(x: Tensor) -> Tensor:
        return x[order.to(x.device)]

    # Expert i becomes what expert order[i] was, whichever way it is stored.
    edits |= {block.name: Edit(source=block.name, change=along) for block in stacks}
    stacked = {block.name for block in (*stacks, router)}
    for vector in site.vectors:
        name, shape = vector.block.name, vector.block.shape or ()
        if (vector.weight is None or vector.weight.name in stacked) and shape[:1] == (count,):
            edits[name] = Edit(source=name, change=along)
    for name in routing(site, buffers):
        edits[name] = Edit(source=name, change=_along(order, buffers[name].index(count)))
    edits |= _exchanged(site, order)
    return Move(
        symmetry=SYMMETRY,
        site="experts",
        where=site.where,
        edits=edits,
        broken=without(edits, router.name),
        writes=written(site),
    )


def written(site: Site) -> tuple[str, ...]:
    """The weights by which a mixture writes to the stream."""
    return tuple(block.name for block in site.of(Role.DOWN, Role.EXPERT_DOWN))


def routing(site: Site, buffers: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is not trained and has one number an expert, such as a bias that only the selection sees."""
    try:
        count = sizes(site.of(Role.ROUTER)[0])[0][0]
    except TaxonomyError:  # the finding on this mixture says so
        return []
    return [
        name
        for name, shape in buffers.items()
        if inside(name, site.where) and count in shape and prod(shape) == count > 1
    ]


def untrained(model: Anatomy, module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's floating buffers, and of the frozen parameters whose place no block says."""
    placed = {block.name for block in model.blocks}
    placed |= {vector.block.name for vector in model.vectors if vector.along is not None}
    frozen = [(name, p) for name, p in module.named_parameters() if not p.requires_grad and name not in placed]
    return {name: tuple(x.shape) for name, x in (*module.named_buffers(), *frozen) if x.is_floating_point()}


def _along(order: Tensor, dim: int) -> Change:
    return lambda x: x.index_select(dim, order.to(x.device))


def _exchanged(site: Site, order: Tensor) -> dict[str, Edit]:
    """Experts that are modules: the parameters of module i become those of module order[i]."""
    edits = {}
    for expert, chosen in zip(
        site.experts, [site.experts[i] for i in order.tolist()] if site.experts else [], strict=True
    ):
        for name in [block.name for block in expert.blocks] + [vector.block.name for vector in expert.vectors]:
            source = chosen.where + name.removeprefix(expert.where)
            edits[name] = Edit(source=source, change=torch.clone)
    return edits
