"""Sites: the blocks on which one group element acts jointly.

An attention, an MLP or a mixture of experts is found from its last block (the output projection, the down projection,
the router) and the smallest module around it that also holds its partners. Vectors belong to a site as the bias of a
weight, by their names, or by what their block declares in `along`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from lit_symopt.blocks import HEADS, RESIDUAL, Block, Role

ATTENTION_ROLES = (Role.QUERY, Role.KEY, Role.VALUE, Role.QKV, Role.ATTENTION_OUT)
MLP_ROLES = (Role.GATE, Role.UP, Role.GATE_UP, Role.DOWN)
EXPERT_ROLES = (Role.EXPERT_GATE_UP, Role.EXPERT_DOWN)
VOCABULARY_ROLES = (Role.EMBEDDING, Role.LM_HEAD, Role.TIED_EMBEDDING)
_WRITES_RESIDUAL = (Role.DOWN, Role.ATTENTION_OUT, Role.EXPERT_DOWN)
_UNKNOWN_OUTPUTS = (Role.LINEAR, Role.CONV)


@dataclass(frozen=True, kw_only=True)
class Vector:
    """A vector and its place.

    Attributes:
        block: the vector's block.
        along: a role, `"residual"`, `"heads"`, or None if nothing says it.
        weight: the weight whose bias it is, if it is one.
        contradicts: it declares to lie along something else than the outputs of the weight whose bias it is by name.
    """

    block: Block
    along: str | None
    weight: Block | None
    contradicts: bool = False


@dataclass(frozen=True, kw_only=True)
class Site:
    """Blocks that belong together.

    Attributes:
        kind: `attention`, `mlp` or `mixture`.
        where: the module's name.
        blocks: its weights.
        vectors: biases, gains and sinks along its units.
        gates: linear maps whose outputs multiply those of the heads of an attention.
        experts: for a mixture whose experts are modules of their own, their MLPs in order.
        problem: why the blocks cannot act together, if they cannot.
    """

    kind: str
    where: str
    blocks: tuple[Block, ...]
    vectors: tuple[Vector, ...] = ()
    gates: tuple[Block, ...] = ()
    experts: tuple[Site, ...] = ()
    problem: str | None = None

    def of(self, *roles: Role) -> list[Block]:
        """The weights with one of these roles."""
        return [block for block in self.blocks if block.role in roles]

    def along(self, *names: str) -> list[Vector]:
        """The vectors along one of these."""
        return [vector for vector in self.vectors if vector.along in names]


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The blocks of a module, sorted into sites."""

    blocks: tuple[Block, ...]
    vectors: tuple[Vector, ...]
    sites: tuple[Site, ...]
    frozen: tuple[str, ...] = ()
    lost: tuple[Block, ...] = field(default=())

    def of(self, *roles: Role) -> list[Block]:
        """The weights with one of these roles."""
        return [block for block in self.blocks if block.role in roles]


def anatomy(blocks: Sequence[Block], *, frozen: Sequence[str] = ()) -> Anatomy:
    """Sort blocks into sites.

    Args:
        blocks: assigned blocks.
        frozen: parameters that no block claims.
    """
    # How a rule groups gate and up is its own affair: here they are two matrices.
    weights = [
        replace(block, layout=None if block.layout is None else block.layout.with_pairs(False))
        for block in blocks
        if block.role is not Role.VECTOR
    ]
    vectors = [place(block, weights) for block in blocks if block.role is Role.VECTOR]
    mlps = _around(weights, Role.DOWN, (Role.UP, Role.GATE_UP), (Role.GATE,), "mlp")
    attentions = _around(weights, Role.ATTENTION_OUT, (Role.VALUE, Role.QKV), (Role.QUERY, Role.KEY), "attention")
    mixtures = [_mixture(router, weights, mlps) for router in weights if router.role is Role.ROUTER]
    attentions = _with_gates(attentions, weights)
    sites = _with_vectors([*attentions, *mlps, *mixtures], vectors)
    used = {block.name for site in sites for block in (*site.blocks, *site.gates)}
    lost = [
        block for block in weights if block.role in (*ATTENTION_ROLES, *MLP_ROLES, *EXPERT_ROLES) or gates_heads(block)
    ]
    return Anatomy(
        blocks=tuple(weights),
        vectors=tuple(vectors),
        sites=tuple(sites),
        frozen=tuple(frozen),
        lost=tuple(block for block in lost if block.name not in used),
    )


def place(vector: Block, weights: Iterable[Block]) -> Vector:
    """Where a vector lies: as it declares, else along the outputs of the weight whose bias it is by its name.

    A declaration that contradicts the name is taken at its word: the vector is no bias then, and the audit will tell.
    """
    weight = next((w for w in weights if any(vector.name in _bias_names(name) for name in (w.name, *w.aliases))), None)
    outputs = None if weight is None else _outputs(weight)
    declared = _along(vector.along)
    contradicts = declared is not None and outputs is not None and declared != outputs
    return Vector(
        block=vector, along=declared or outputs, weight=None if contradicts else weight, contradicts=contradicts
    )


def gates_heads(block: Block) -> bool:
    """Whether a block is a linear map with one output or more for each query head, in their order."""
    return block.role is Role.LINEAR and block.along == HEADS


def _outputs(weight: Block) -> str | None:
    if gates_heads(weight):
        return HEADS
    return None if weight.role in _UNKNOWN_OUTPUTS else _along(str(weight.role))


def _along(name: str | None) -> str | None:
    """One name for each place: what several roles write to, or read from, is one."""
    if name is not None and name in map(str, _WRITES_RESIDUAL):
        return RESIDUAL
    return str(Role.LM_HEAD) if name in (str(Role.TIED_EMBEDDING), str(Role.EMBEDDING)) else name


def _bias_names(name: str) -> tuple[str, ...]:
    names = [f"{name}_bias"]
    if name.endswith("weight"):
        names.append(name.removesuffix("weight") + "bias")
    return tuple(names)


def prefixes(name: str) -> list[str]:
    """The modules around a parameter, the nearest first, the root (`""`) last.

    >>> prefixes("layers.0.mlp.weight")
    ['layers.0.mlp', 'layers.0', 'layers', '']
    """
    pieces = name.split(".")[:-1]
    return [".".join(pieces[:length]) for length in range(len(pieces), -1, -1)]


def inside(name: str, prefix: str) -> bool:
    """Whether a name lies below a module."""
    return not prefix or name.startswith(f"{prefix}.")


def _around(
    weights: Sequence[Block], anchor: Role, partners: Sequence[Role], others: Sequence[Role], kind: str
) -> list[Site]:
    """One site around each anchor: the smallest module that holds one of the partners, with everything else in it."""
    sites = []
    for last in (block for block in weights if block.role is anchor):
        for prefix in prefixes(last.name):
            held = [
                block for block in weights if inside(block.name, prefix) and block.role in (anchor, *partners, *others)
            ]
            if any(block.role in partners for block in held):
                anchors = [block.name for block in held if block.role is anchor]
                problem = (
                    f"{' and '.join(map(repr, anchors))} lie in the same module as their partners; which belongs to "
                    "which cannot be told"
                    if len(anchors) > 1
                    else None
                )
                sites.append(
                    Site(
                        kind=kind,
                        where=prefix,
                        blocks=(last,) if problem else tuple(held),
                        problem=problem,
                    )
                )
                break
    return sites


def _mixture(router: Block, weights: Sequence[Block], mlps: Sequence[Site]) -> Site:
    for prefix in prefixes(router.name):
        stacks = [block for block in weights if block.role in EXPERT_ROLES and inside(block.name, prefix)]
        listed = _listed([site for site in mlps if inside(f"{site.where}.", prefix)])
        if not stacks and not listed:
            continue
        routers = [block.name for block in weights if block.role is Role.ROUTER and inside(block.name, prefix)]
        problem = f"{' and '.join(map(repr, routers))} route to the same experts" if len(routers) > 1 else None
        blocks = (router, *stacks, *(block for site in listed for block in site.blocks))
        return Site(
            kind="mixture",
            where=prefix,
            blocks=(router,) if problem else blocks,
            experts=tuple(listed),
            problem=problem,
        )
    return Site(kind="mixture", where=prefixes(router.name)[0], blocks=(router,), problem="no experts are around it")


def _listed(mlps: Sequence[Site]) -> list[Site]:
    """The MLPs that are members 0, 1, 2, ... of one list of modules, in order; the longest such list."""
    lists: dict[str, dict[int, Site]] = {}
    for site in mlps:
        found = re.fullmatch(r"(.*\.|)(\d+)", site.where)
        if found and site.problem is None:
            lists.setdefault(found[1], {})[int(found[2])] = site
    complete = [[of[i] for i in range(len(of))] for of in lists.values() if sorted(of) == list(range(len(of)))]
    return max(complete, key=len, default=[])


def _with_gates(attentions: Sequence[Site], weights: Sequence[Block]) -> list[Site]:
    """The attentions with their gates: each goes to the one attention in the smallest module around it."""
    held: dict[int, list[Block]] = {}
    for gate in (block for block in weights if gates_heads(block)):
        for prefix in prefixes(gate.name):
            near = [n for n, site in enumerate(attentions) if _overlap(site.where, prefix)]
            if near:
                if len(near) == 1:
                    held.setdefault(near[0], []).append(gate)
                break
    return [replace(site, gates=tuple(held.get(index, ()))) for index, site in enumerate(attentions)]


def _with_vectors(sites: Sequence[Site], vectors: Iterable[Vector]) -> list[Site]:
    """The sites with the vectors along their units: each goes to the one site in the smallest module around it."""
    held: dict[int, list[Vector]] = {}
    for vector in vectors:
        for index in _homes(vector, sites):
            held.setdefault(index, []).append(vector)
    return [
        replace(
            site,
            vectors=tuple(held.get(index, ())),
            experts=tuple(
                replace(expert, vectors=tuple(v for v in held.get(index, ()) if inside(v.block.name, expert.where)))
                for expert in site.experts
            ),
        )
        for index, site in enumerate(sites)
    ]


def _homes(vector: Vector, sites: Sequence[Site]) -> list[int]:
    """The numbers of the sites a vector acts in.

    More than one for an expert's bias, its MLP and its mixture, and for a table along heads around several attentions.
    """
    if vector.weight is not None:
        name = vector.weight.name
        owned = [n for n, site in enumerate(sites) if name in {block.name for block in (*site.blocks, *site.gates)}]
        if owned:
            return owned
    kinds = {
        **dict.fromkeys(map(str, ATTENTION_ROLES), "attention"),
        HEADS: "attention",
        **dict.fromkeys(map(str, MLP_ROLES), "mlp"),
        **dict.fromkeys(map(str, (*EXPERT_ROLES, Role.ROUTER)), "mixture"),
    }
    # A stack of expert biases lies along the residual stream and the experts.
    kind = (
        "mixture" if vector.along == RESIDUAL and len(vector.block.shape or ()) == 2 else kinds.get(vector.along or "")
    )
    for prefix in prefixes(vector.block.name):
        near = [n for n, site in enumerate(sites) if site.kind == kind and _overlap(site.where, prefix)]
        if near:
            return near if len(near) == 1 or vector.along == HEADS else []
    return []


def _overlap(site: str, prefix: str) -> bool:
    """Whether the module around a vector is the site, or holds it."""
    return site == prefix or inside(f"{site}.", prefix) or inside(f"{prefix}.", site)
