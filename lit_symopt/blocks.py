"""Blocks: which parameter is what, and which group acts on it.

A *block* is one parameter with a declared place in the architecture. A *taxonomy* declares the blocks of one
architecture by patterns and is total and disjoint: a trainable parameter that no block claims, or two claim, is an
error that names it. Nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase
from pkgutil import resolve_name

from torch import Tensor, nn

from lit_symopt.errors import TaxonomyError
from lit_symopt.layout import Layout, Part

__all__ = ["Action", "Block", "BlockTaxonomy", "Layout", "Part", "Role", "Symmetry"]


class Role(str, Enum):
    """The place of a block in a transformer."""

    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    TIED_EMBEDDING = "tied_embedding"
    POSITION = "position"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    ATTENTION_OUT = "attention_out"
    QKV = "qkv"
    GATE = "gate"
    UP = "up"
    GATE_UP = "gate_up"
    DOWN = "down"
    EXPERT_GATE_UP = "expert_gate_up"
    EXPERT_DOWN = "expert_down"
    ROUTER = "router"
    LINEAR = "linear"
    CONV = "conv"
    VECTOR = "vector"

    def __str__(self) -> str:
        return self.value


class Action(str, Enum):
    """How a group acts on the units of a block, always jointly with the blocks on the other side of those units.

    `permutation`: units change places. `monomial`: they also change length and sign, as those of `up` and `down` do in
    an MLP that multiplies `up` into an activated `gate`. `general_linear`: any invertible map within a head.
    `rotary_halves`, `rotary_neighbors`: rotations of the planes (i, i + r/2), or (2i, 2i + 1), that a rotary position
    embedding of dimension r turns. `orthogonal`: the group of the update alone, where nothing is known about the
    neighbors. `none`: the identity.
    """

    NONE = "none"
    PERMUTATION = "permutation"
    MONOMIAL = "monomial"
    GENERAL_LINEAR = "general_linear"
    ROTARY_HALVES = "rotary_halves"
    ROTARY_NEIGHBORS = "rotary_neighbors"
    ORTHOGONAL = "orthogonal"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, kw_only=True)
class Symmetry:
    """The group that acts on a block's units and features, and the direction the loss cannot see.

    Attributes:
        units: the group on the units, such as `S_V` (permutations), `GL(h)` or `1` (none).
        features: the group on the features, such as `O(d)`.
        joint: the roles that the same element must act on for the loss to stay the same; empty if none.
        shift_invariant: whether adding one vector to every unit (`W + 1aᵀ`, with the bias) leaves the loss unchanged.
            Such a block's update is centered.
        z_loss: whether a z-loss is the one part of the loss that sees that shift. Then the update is not centered.
    """

    units: str
    features: str
    joint: tuple[str, ...] = ()
    shift_invariant: bool = False
    z_loss: bool = False

    def __str__(self) -> str:
        seen = " / shift" if self.shift_invariant else ", z-loss" if self.z_loss else ""
        return f"{self.units} × {self.features}{seen}"


def _symmetry(units: str, features: str, *joint: str, shift: bool = False) -> Symmetry:
    return Symmetry(units=units, features=features, joint=joint, shift_invariant=shift)


# Lau & Su 2026, arXiv:2605.18106, for the residual width d, the vocabulary V, head dimension h, neurons I, experts E.
SYMMETRIES: dict[Role, Symmetry] = {
    Role.EMBEDDING: _symmetry("S_V", "O(d)"),
    Role.LM_HEAD: _symmetry("S_V", "O(d)", shift=True),
    Role.TIED_EMBEDDING: _symmetry("S_V", "O(d)"),
    Role.POSITION: _symmetry("1", "O(d)"),
    Role.QUERY: _symmetry("SO(2)^(h/2)", "O(d)", "key"),
    Role.KEY: _symmetry("SO(2)^(h/2)", "O(d)", "query"),
    Role.VALUE: _symmetry("GL(h)", "O(d)", "attention_out"),
    Role.ATTENTION_OUT: _symmetry("O(d)", "GL(h)", "value"),
    Role.QKV: _symmetry("per head", "O(d)", "attention_out"),
    Role.GATE: _symmetry("S_I", "O(d)", "up", "down"),
    Role.UP: _symmetry("S_I", "O(d)", "gate", "down"),
    Role.GATE_UP: _symmetry("S_I", "O(d)", "down"),
    Role.DOWN: _symmetry("S_I", "O(d)", "gate", "up"),
    Role.EXPERT_GATE_UP: _symmetry("S_E ≀ S_I", "O(d)", "expert_down", "router"),
    Role.EXPERT_DOWN: _symmetry("S_E ≀ S_I", "O(d)", "expert_gate_up", "router"),
    Role.ROUTER: _symmetry("S_E", "O(d)", "expert_gate_up", "expert_down", shift=True),
    Role.LINEAR: _symmetry("O(m)", "O(n)"),
    Role.CONV: _symmetry("O(m)", "O(n)"),
    Role.VECTOR: _symmetry("S_m", "1"),
}

# How the group acts on the units where a block does not say it. An `up` and `down` without a gate beside them have an
# activation of their own between them: only permutations are left.
ACTIONS: dict[Role, Action] = {
    **dict.fromkeys(Role, Action.PERMUTATION),
    Role.POSITION: Action.NONE,
    **dict.fromkeys((Role.QUERY, Role.KEY, Role.QKV), Action.ROTARY_HALVES),
    **dict.fromkeys((Role.VALUE, Role.ATTENTION_OUT), Action.GENERAL_LINEAR),
    **dict.fromkeys((Role.UP, Role.GATE_UP, Role.DOWN, Role.EXPERT_GATE_UP, Role.EXPERT_DOWN), Action.MONOMIAL),
    **dict.fromkeys((Role.LINEAR, Role.CONV), Action.ORTHOGONAL),
}

# What a vector's entries lie along besides the units of a role: the residual stream, or the query heads.
RESIDUAL, HEADS = "residual", "heads"


@dataclass(frozen=True)
class Block:
    """One parameter, or a pattern for several, with its role, storage and symmetry.

    Args:
        name: full parameter name, or a glob over full names (`*` also crosses dots): `"*.q_proj.weight"`.
        role: its place in the architecture.
        layout: how the tensor holds its matrices; default: one matrix (a column for `Role.VECTOR`).
        shift_invariant: whether the loss cannot see `W + 1aᵀ`. The default is the role's: true for an untied head with
            plain softmax and for a softmax router, false elsewhere. Say `False` for a head with logit soft-capping or
            z-loss and for a sigmoid router; say `True` for the bias of a plain head or softmax router.
        z_loss: a z-loss penalizes the logsumexp of these logits, so that it alone sees the shift. Such a block is
            centered only if a config asks for it, and a warning says why that is a bad idea.
        action: how the group acts on the units; default: the role's, see `ACTIONS`. Say `permutation` for an MLP that
            is not linear in `up` (gpt-oss), `general_linear` for queries and keys without rotary embedding.
        rotary_dim: r, the leading dimensions of each head that the rotary embedding turns; default: all of them.
        along: what the entries of a `Role.VECTOR` lie along: `"residual"` (gains of the residual stream's norms, biases
            of what writes to it), `"heads"` (sinks), or a role (`"query"` for the bias of the query projection or the
            gain of the query norm). Default: the block whose bias it is by its name, else unknown. A `Role.LINEAR` that
            gates the outputs of an attention says `"heads"`: its rows are one or more for each head, in their order.

    Attributes:
        shape: shape of the parameter, once assigned.
        aliases: its other names, when it is tied.

    Example:
        >>> Block("*.router.weight", role=Role.ROUTER).symmetry.shift_invariant
        True
    """

    name: str
    role: Role
    layout: Layout | None = None
    shift_invariant: bool | None = None
    z_loss: bool = False
    action: Action | None = None
    rotary_dim: int | None = None
    along: str | None = None
    shape: tuple[int, ...] | None = None
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "role", _role(self.role))
        if self.z_loss and self.role not in (Role.ROUTER, Role.VECTOR):
            raise TaxonomyError(f"{self.name!r}: z_loss is a fact about routers, not about role {self.role}")
        if self.z_loss and self.shift_invariant:
            raise TaxonomyError(f"{self.name!r}: its z-loss sees the shift, so shift_invariant=True cannot be")
        if self.along is not None and self.along not in (RESIDUAL, HEADS, *map(str, Role)):
            known = ", ".join((RESIDUAL, HEADS, *map(str, Role)))
            raise TaxonomyError(f"{self.name!r}: along={self.along!r} is nothing a vector lies along; known: {known}")
        if self.layout is None:
            object.__setattr__(self, "layout", Layout.column() if self.role is Role.VECTOR else Layout.matrix())

    @property
    def symmetry(self) -> Symmetry:
        """The symmetry of the role, with what this block declares of its own."""
        symmetry = SYMMETRIES[self.role]
        if self.role in (Role.QUERY, Role.KEY) and self.acts is Action.GENERAL_LINEAR:
            symmetry = replace(symmetry, units="GL(h)")
        shift = symmetry.shift_invariant if self.shift_invariant is None else self.shift_invariant
        return replace(symmetry, shift_invariant=shift and not self.z_loss, z_loss=self.z_loss)

    @property
    def acts(self) -> Action:
        """How the group acts on the units: as declared, else as the role says."""
        return ACTIONS[self.role] if self.action is None else Action(self.action)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The matrices of an assigned block.

        Raises:
            TaxonomyError: if the layout does not fit the shape, or the block is a pattern without a shape.
        """
        if self.layout is None or self.shape is None:
            raise TaxonomyError(f"the block {self.name!r} is a pattern: only a block from `assign` has a shape")
        return self.layout.parts(self.shape)

    def matches(self, names: Iterable[str]) -> bool:
        """Whether the pattern matches one of a parameter's names."""
        return any(fnmatchcase(name, self.name) for name in names)


def _role(role: Role | str) -> Role:
    try:
        return Role(role)
    except ValueError:
        raise TaxonomyError(f"unknown role {str(role)!r}; known: {', '.join(map(str, Role))}") from None


# Architectures with a taxonomy of their own, by transformers' `model_type`: where to find `taxonomy(config)`.
KNOWN_TAXONOMIES = {
    "qwen3": "lit_symopt.models.qwen3:taxonomy",
    "gemma3_text": "lit_symopt.models.gemma3:taxonomy",
    "olmoe": "lit_symopt.models.olmoe:taxonomy",
    "gpt_oss": "lit_symopt.models.gpt_oss:taxonomy",
}


class BlockTaxonomy:
    """The declared blocks of one architecture: total and disjoint over the trainable parameters of a module.

    Args:
        blocks: one `Block` for each kind of parameter, with patterns as names.
        name: what errors call it, such as `"Qwen3"`.

    Example:
        >>> from torch import nn
        >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> taxonomy = BlockTaxonomy([Block("*.weight", role=Role.LINEAR), Block("*.bias", role=Role.VECTOR)])
        >>> [(block.name, str(block.role)) for block in taxonomy.assign(mlp)][:2]
        [('0.weight', 'linear'), ('0.bias', 'vector')]
    """

    def __init__(self, blocks: Sequence[Block], *, name: str = "BlockTaxonomy") -> None:
        self.blocks = tuple(blocks)
        self.name = name

    def __repr__(self) -> str:
        return f"BlockTaxonomy({len(self.blocks)} blocks, name={self.name!r})"

    def under(self, prefix: str) -> BlockTaxonomy:
        """The same taxonomy for a module that lies below another: every pattern gets the prefix."""
        return BlockTaxonomy([replace(block, name=prefix + block.name) for block in self.blocks], name=self.name)

    def assign(self, module: nn.Module) -> list[Block]:
        """One block for every trainable parameter of `module`, in the order of `named_parameters`.

        A tied parameter is one block under its first name, with the others as `aliases`. Frozen parameters are left
        out; `frozen` lists them.

        Raises:
            TaxonomyError: naming every unclaimed and every doubly claimed trainable parameter, every pattern that
                matches nothing, and every layout that does not fit its shape.
        """
        parameters = _parameters(module)
        assigned, unclaimed, doubled, misfits = [], [], [], []
        for names, parameter in parameters:
            if not parameter.requires_grad:
                continue
            shape = shape_of(parameter)
            claims = [block for block in self.blocks if block.matches(names)]
            label = f"{' = '.join(map(repr, names))} {shape}"
            if not claims:
                unclaimed.append(label)
            elif len(claims) > 1:
                doubled.append(f"{label} by {' and '.join(f'{block.name!r} ({block.role})' for block in claims)}")
            else:
                block = replace(claims[0], name=names[0], shape=shape, aliases=names[1:])
                try:
                    _ = block.parts
                except TaxonomyError as error:
                    misfits.append(f"{names[0]!r}: {error}")
                assigned.append(block)
        idle = [
            f"{block.name!r} ({block.role})"
            for block in self.blocks
            if not any(block.matches(names) for names, _ in parameters)
        ]
        self._complain(unclaimed, doubled, idle, misfits)
        return assigned

    def frozen(self, module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of every parameter that `assign` skips because it does not require a gradient."""
        return [(names[0], shape_of(p)) for names, p in _parameters(module) if not p.requires_grad]

    @staticmethod
    def of(module: nn.Module) -> BlockTaxonomy:
        """The taxonomy a module declares by `block_taxonomy()`, or that of the known architecture found inside it.

        Raises:
            TaxonomyError: if the module declares none and contains no known architecture.
        """
        declared = getattr(module, "block_taxonomy", None)
        return declared() if callable(declared) else known_taxonomy(module)

    @staticmethod
    def infer(module: nn.Module, example_batch: object, *, known: Sequence[Block] = ()) -> BlockTaxonomy:
        """The taxonomy of a module that declares none, from its structure; see `lit_symopt.infer`.

        Args:
            module: any module; its weights and its training mode are left as they are.
            example_batch: what its forward or `training_step` takes: one pass is run and followed.
            known: blocks, as patterns, for parameters that the structure does not decide.

        Raises:
            TaxonomyError: naming every parameter whose place the structure does not decide.
            ConfigError: if the module cannot be called with the batch.
        """
        from lit_symopt.infer import infer

        return infer(module, example_batch, known=known)

    def _complain(self, unclaimed: list[str], doubled: list[str], idle: list[str], misfits: list[str]) -> None:
        complaints = []
        if unclaimed:
            complaints.append(
                f"{len(unclaimed)} trainable parameter(s) belong to no block: {', '.join(unclaimed)}. "
                f"Add a Block for them to {self.name}, or freeze them."
            )
        if doubled:
            complaints.append(
                f"{len(doubled)} parameter(s) are claimed more than once: {'; '.join(doubled)}. "
                f"Narrow the patterns of {self.name}; a tied embedding is one Block with Role.TIED_EMBEDDING."
            )
        if idle:
            complaints.append(
                f"{len(idle)} pattern(s) match no parameter: {', '.join(idle)}. Correct or remove them in {self.name}."
            )
        if misfits:
            complaints.append(f"{len(misfits)} layout(s) do not fit: {'; '.join(misfits)}.")
        if complaints:
            raise TaxonomyError("\n".join(complaints))


def known_taxonomy(module: nn.Module) -> BlockTaxonomy:
    """The taxonomy of the transformers architecture that `module` is or contains.

    Raises:
        TaxonomyError: if no known architecture is found.
    """
    for prefix, child in module.named_modules():
        config = getattr(child, "config", None)
        where = KNOWN_TAXONOMIES.get(getattr(config, "model_type", ""))
        if where is not None and hasattr(child, "lm_head"):
            taxonomy: BlockTaxonomy = resolve_name(where)(config)
            return taxonomy.under(f"{prefix}." if prefix else "")
    raise TaxonomyError(
        f"{type(module).__name__} declares no blocks and contains no known architecture "
        f"({', '.join(sorted(KNOWN_TAXONOMIES))}). Pass taxonomy=BlockTaxonomy([Block(...), ...]) or "
        f"taxonomy=BlockTaxonomy.infer(module, example_batch), or give the module a method block_taxonomy() that "
        f"returns one."
    )


def _parameters(module: nn.Module) -> list[tuple[tuple[str, ...], nn.Parameter]]:
    """Every parameter once, with all of its names, the first one first."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [(tuple(known), parameter) for parameter, known in names.items()]


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, wherever its parts lie."""
    # DeepSpeed's ZeRO 3 leaves an empty tensor in place of the parameter and keeps its shape beside it.
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
