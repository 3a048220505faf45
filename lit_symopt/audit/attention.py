"""Attention: permutations of heads, invertible maps of values, and the maps of queries and keys that scores allow.

    heads    S_K ≀ S_G on queries, keys, values, outputs, sinks and full-width norm gains
    values   v_j → A_j v_j,   o_i → A_j^{-T} o_i for every query head i of the group of j
    scores   q_i → R_j q_i,   k_j → R_j^{-T} k_j; R_j turns the planes of the rotary embedding, or is any invertible
             matrix where there is none

Shape legend:  H query heads, K key and value heads, G = H / K, h head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn

from lit_symopt.audit.elements import haar, invertible, permutation, plane_rotations
from lit_symopt.audit.heads import Heads, Part
from lit_symopt.audit.moves import Change, Edit, Move, Refusal
from lit_symopt.audit.norms import probe
from lit_symopt.audit.sites import Anatomy, Site, Vector, inside
from lit_symopt.blocks import HEADS as ALONG_HEADS
from lit_symopt.blocks import Action, Block, Role
from lit_symopt.errors import TaxonomyError

HEADS, VALUES, SCORES = "heads", "values", "queries and keys"
_GAINED = (str(Role.QUERY), str(Role.KEY), str(Role.VALUE))
_ROTARY = (Action.ROTARY_HALVES, Action.ROTARY_NEIGHBORS)


class _DoesNotApply(Exception):
    """Raised with the reason by what would make a move."""


def attention(model: Anatomy, generator: Generator, module: nn.Module) -> list[Move | Refusal]:
    """Three elements for each attention: of its heads, of its values, of its queries and keys."""
    found: list[Move | Refusal] = []
    exchanges = _Exchanges(generator)
    for site in (site for site in model.sites if site.kind == "attention"):
        makers: dict[str, Callable[[], Move]] = {
            HEADS: lambda site=site: _permuted(model, site, exchanges),  # type: ignore[misc]
            VALUES: lambda site=site: _values(site, generator),  # type: ignore[misc]
            SCORES: lambda site=site: _scores(model, site, generator, module),  # type: ignore[misc]
        }
        for name, make in makers.items():
            try:
                if site.problem is not None:
                    raise _DoesNotApply(site.problem)
                found.append(make())
            except (TaxonomyError, _DoesNotApply) as reason:
                found.append(
                    Refusal(
                        symmetry=name,
                        site="attention",
                        where=site.where,
                        reason=str(reason),
                        fails=isinstance(reason, TaxonomyError),
                    )
                )
    return found


def marked(model: Anatomy) -> bool:
    """Whether parameters besides the projections lie along heads: they may be what is wrong with an exchange."""
    gates = any(site.gates for site in model.sites)
    return gates or any(v.along == ALONG_HEADS or (v.weight is None and v.along in _GAINED) for v in model.vectors)


def multiples(model: Anatomy) -> list[int]:
    """By how much heads could be larger than declared."""
    counts = {block.parts[0].count for block in model.blocks if block.role is Role.ATTENTION_OUT}
    return [times for times in range(2, max(counts, default=1) + 1) if any(count % times == 0 for count in counts)]


def coarser(model: Anatomy, generator: Generator, *, times: int) -> list[Move]:
    """Maps of the values of that many consecutive heads together; no symmetry unless the heads are pieces of larger."""
    moves = []
    for site in (site for site in model.sites if site.kind == "attention" and site.problem is None):
        heads = Heads(site)
        if heads.queries != heads.keys or heads.keys % times:
            continue
        a = invertible(times * heads.widths["v"], generator, batch=(heads.keys // times,))
        maps: dict[Part, Change] = {"v": _merged(a), "o": _merged(_dual(a))}
        moves.append(_move(VALUES, site, heads.edits(maps), {}))
    return moves


class _Exchanges:
    """The same permutation for every attention with equal numbers of heads: layers may share what heads look at."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def of(self, queries: int, keys: int) -> tuple[Tensor, Tensor]:
        """Orders `[H]` and `[K]`: groups change places, and the queries of each group among themselves."""
        if (queries, keys) not in self.known:
            outer = permutation(keys, self.generator)
            inner = torch.stack([permutation(queries // keys, self.generator) for _ in range(keys)])
            self.known[queries, keys] = ((outer[:, None] * (queries // keys) + inner).flatten(), outer)
        return self.known[queries, keys]


def _permuted(model: Anatomy, site: Site, exchanges: _Exchanges) -> Move:
    heads = Heads(site)
    if heads.queries == 1:
        raise _DoesNotApply("there is one head")
    _refuse_unplaced(model, site)
    queries, keys = exchanges.of(heads.queries, heads.keys)
    orders: dict[Part, Tensor] = {"q": queries, "k": keys, "v": keys, "o": queries}
    edits = heads.reordered(orders)
    return _move(HEADS, site, edits, {name: edit for name, edit in edits.items() if name != heads.owners["o"].name})


def _values(site: Site, generator: Generator) -> Move:
    heads = Heads(site)
    if gains := heads.gains("v"):
        raise _DoesNotApply(f"{_named(gains)} lies along the values and is not their bias")
    actions = [heads.owners["o"].acts, *([heads.owners["v"].acts] if heads.owners["v"].role == "value" else [])]
    action = next((action for action in actions if action is not Action.GENERAL_LINEAR), Action.GENERAL_LINEAR)
    a = _matrices(action, heads.widths["v"], heads.keys, generator)
    maps: dict[Part, Change] = {"v": _times(a), "o": _times(_dual(a), heads.queries // heads.keys)}
    edits = heads.edits(maps)
    return _move(f"{VALUES}: {_shown(action)}", site, edits, heads.edits({"v": maps["v"]}))


def _scores(model: Anatomy, site: Site, generator: Generator, module: nn.Module) -> Move:
    heads = Heads(site)
    if not heads.whole_keys:
        raise _DoesNotApply("a part of each key is shared by all heads and comes from another block")
    if "q" not in heads.owners or "k" not in heads.owners:
        raise _DoesNotApply("no block holds the queries, or the keys")
    query, key = heads.owners["q"], heads.owners["k"]
    if (query.acts, query.rotary_dim) != (key.acts, key.rotary_dim):
        raise TaxonomyError(
            f"{query.name!r} declares {query.acts} (rotary_dim={query.rotary_dim}) and {key.name!r} {key.acts} "
            f"(rotary_dim={key.rotary_dim}); what turns the one turns the other"
        )
    _refuse_unplaced(model, site)
    width, gains = heads.widths["q"], heads.gains("q", "k")
    planes = _planes(query, width) if query.acts in _ROTARY else []
    _refuse_norms(gains, planes, width, query.acts, module)
    if query.acts in _ROTARY:
        a = plane_rotations(width, planes, generator, batch=(heads.keys,))
    else:
        a = _matrices(query.acts, width, heads.keys, generator)
    maps: dict[Part, Change] = {"q": _times(a, heads.queries // heads.keys), "k": _times(_dual(a))}
    return _move(
        f"{SCORES}: {_shown(query.acts)}",
        site,
        heads.edits(maps),
        heads.edits({"q": maps["q"]}),
        keep=frozenset(vector.block.name for vector in gains),
    )


def _move(
    symmetry: str, site: Site, edits: dict[str, Edit], broken: dict[str, Edit], *, keep: frozenset[str] = frozenset()
) -> Move:
    return Move(
        symmetry=symmetry,
        site="attention",
        where=site.where,
        edits=edits,
        broken=broken,
        keep=keep,
        writes=(_last(site),),
    )


def _last(site: Site) -> str:
    return site.of(Role.ATTENTION_OUT)[0].name


def _planes(query: Block, width: int) -> list[tuple[int, int]]:
    turned = query.rotary_dim or width
    if turned > width or turned % 2:
        raise TaxonomyError(f"{query.name!r}: rotary_dim={turned} must be even and at most the head dimension {width}")
    if query.acts is Action.ROTARY_HALVES:
        return [(i, i + turned // 2) for i in range(turned // 2)]
    return [(2 * i, 2 * i + 1) for i in range(turned // 2)]


def _refuse_norms(
    gains: Sequence[Vector], planes: Sequence[tuple[int, int]], width: int, action: Action, module: nn.Module
) -> None:
    """A norm of queries and keys allows rotations only, and only where its gains are constant."""
    for vector in gains:
        name = vector.block.name
        if action is Action.GENERAL_LINEAR:
            raise _DoesNotApply(f"{name!r} normalizes: only orthogonal maps could be left")
        known = probe(module, name)
        if known is not None and known.subtracts_mean:
            raise _DoesNotApply(f"the norm of {name!r} subtracts the mean of a head")
        values = module.get_parameter(name).detach()
        if known is not None and not known.gain and bool((values != 0).any()):
            raise _DoesNotApply(f"{name!r} is added after the norm and not zero")
        rows = values.reshape(-1, width) if values.numel() % width == 0 else values.reshape(1, -1)
        rest = sorted(set(range(rows.shape[-1])) - {i for plane in planes for i in plane})
        groups = [list(plane) for plane in planes] + ([rest] if rest else [])
        if any(bool((rows[:, group] != rows[:, group[:1]]).any()) for group in groups):
            raise _DoesNotApply(f"{name!r} has learned gains that differ within a plane")


def _refuse_unplaced(model: Anatomy, site: Site) -> None:
    unplaced = [v for v in model.vectors if v.along is None and inside(v.block.name, site.where)]
    if unplaced:
        raise _DoesNotApply(f"where {_named(unplaced)} lies is not known (Block(along=...) says it)")


def _named(vectors: Sequence[Vector]) -> str:
    return ", ".join(repr(vector.block.name) for vector in vectors)


def _matrices(action: Action, width: int, count: int, generator: Generator) -> Tensor:
    """Elements `[K, h, h]` of what a block declares."""
    if action is Action.GENERAL_LINEAR:
        return invertible(width, generator, batch=(count,))
    if action is Action.ORTHOGONAL:
        return haar(width, generator, batch=(count,))
    if action is Action.PERMUTATION:
        eye = torch.eye(width, dtype=torch.float64)
        return torch.stack([eye[permutation(width, generator)] for _ in range(count)])
    raise _DoesNotApply(f"the block declares the action {action}")


def _shown(action: Action) -> str:
    return {Action.GENERAL_LINEAR: "GL(h)", Action.ROTARY_HALVES: "planes", Action.ROTARY_NEIGHBORS: "planes"}.get(
        action, str(action)
    )


def _dual(a: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.inv(a)
    return inverse.mT


def _times(a: Tensor, repeat: int = 1) -> Change:
    """x `[heads, h, d]` → A x, with the matrix of each group for all of its heads."""
    matrices = a.repeat_interleave(repeat, 0)
    return lambda x: matrices.to(x.device) @ x


def _merged(a: Tensor) -> Change:
    """x `[K, h, d]` → A x for the heads that each matrix of A covers."""
    return lambda x: (a.to(x.device) @ x.reshape(a.shape[0], a.shape[-1], -1)).reshape(x.shape)
