"""Stacks: one published method each, as a table from role to update, with its source.

Default rates of `symmetric` are those that its study on the tiny recipes started from (`profiles/records/studies`), of
`muon` and `adamw` the best of a comparison on the quickstart recipe (`profiles/records/quickstart-comparison`), of the
others those of a coarse scan there; at another size tune them anew.

Weight decay, for every stack: 0.1 on matrices and 0 on vectors (norm gains, biases, sinks), except where the method
says otherwise (stochastic spectral descent and unconstrained Scion have none).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lit_symopt.blocks import Block, Role
from lit_symopt.config import RoleConfig, SymOptConfig
from lit_symopt.errors import ConfigError
from lit_symopt.layout import Layout
from lit_symopt.rules import get_rule
from lit_symopt.rules.scale import NUCLEAR

VOCABULARY = (Role.EMBEDDING, Role.LM_HEAD, Role.TIED_EMBEDDING)
ATTENTION = (Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUT, Role.QKV)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A method as a role → update table.

    Attributes:
        name: what `SymOptConfig.stack` calls it.
        lr: base learning rate when none is given.
        table: what each role gets; every role is present.
        source: where the method was published, and what was filled in where it is silent.
    """

    name: str
    lr: float
    table: Mapping[Role, RoleConfig]
    source: str


ADAMW = RoleConfig(
    rule="adamw",
    centered=False,
    momentum=0.0,
    momentum_kind="ema",
    scale="none",
    alpha=None,
    eps=1e-8,
    row_damping=0.0,
    radius=1.0,
    betas=(0.9, 0.95),
    lr_multiplier=1.0,
    weight_decay=0.1,
    heads="separate",
    pairs=False,
)


def _table(hidden: RoleConfig, vector: RoleConfig, **others: RoleConfig) -> dict[Role, RoleConfig]:
    """`hidden` for every matrix role, `vector` for vectors, and what `others` say by role name."""
    table = dict.fromkeys(Role, hidden) | {Role.VECTOR: replace(vector, weight_decay=0.0)}
    return table | {Role(name): config for name, config in others.items()}


def _symmetric() -> Stack:
    # centered=None: as the block's own symmetry says. Head rule, damping and the short averages that look ahead are the
    # best of the study `roles` (a momentum of 0.95 ends 0.09 above), rates those `learning` started from.
    spectral = replace(ADAMW, rule="spectral", centered=None, momentum=0.9, momentum_kind="nesterov", scale="rms")
    # Rows of tokens not seen for long fade instead of moving on at full length.
    rows = replace(spectral, rule="row_norm", row_damping=0.1)
    head = replace(rows, rule="row_then_spectral", lr_multiplier=6.0)
    return Stack(
        name="symmetric",
        lr=5e-3,
        table=_table(
            spectral,
            replace(ADAMW, centered=None, lr_multiplier=4.0),
            embedding=replace(rows, momentum=0.8, lr_multiplier=16.0),
            lm_head=head,
            tied_embedding=head,
            position=rows,
            router=replace(spectral, rule="left_spectral"),
        ),
        source="Lau & Su 2026, arXiv:2605.18106; the `rms` scale after Moonlight, arXiv:2502.16982",
    )


def _hidden_only(name: str, lr: float, hidden: RoleConfig, source: str) -> Stack:
    """A method for hidden matrices, with AdamW elsewhere at rates that do not depend on the method's own."""

    def adamw(rate: float) -> RoleConfig:
        return replace(ADAMW, lr_multiplier=rate / lr)

    table = _table(
        hidden,
        adamw(3e-3),
        embedding=adamw(0.16),
        lm_head=adamw(8e-3),
        tied_embedding=adamw(8e-3),
        position=adamw(3e-3),
        router=adamw(3e-3),
    )
    return Stack(name=name, lr=lr, table=table, source=f"{source}; AdamW on all but hidden matrices")


def _muon() -> Stack:
    nesterov = replace(ADAMW, rule="spectral", momentum=0.95, momentum_kind="nesterov", heads="whole")
    source = "Jordan et al. 2024, https://kellerjordan.github.io/posts/muon"
    return _hidden_only("muon", 0.02, replace(nesterov, scale="spectral"), source)


def _polargrad() -> Stack:
    polar = replace(ADAMW, rule="spectral", momentum=0.95, scale="nuclear", alpha=1.0, heads="whole")
    return _hidden_only("polargrad", 0.2, polar, "Lau, Long & Su 2025, arXiv:2505.21799: U = ‖M‖_* polar(M)")


def _ssd() -> Stack:
    descent = replace(ADAMW, rule="spectral", scale="nuclear", alpha=1.0, momentum=0.0, heads="whole", weight_decay=0.0)
    return Stack(
        name="ssd",
        lr=0.2,
        table=_table(descent, replace(ADAMW, lr_multiplier=0.015)),
        source="Carlson et al. 2015, Stochastic Spectral Descent: U = ‖G‖_* polar(G) on every matrix, no momentum; "
        "vectors, on which the paper is silent, get AdamW",
    )


def _scion() -> Stack:
    # The published momentum 0.1 is the weight of the new gradient: β = 0.9. Radii as in the published nanoGPT runs.
    spectral = replace(
        ADAMW, rule="spectral", momentum=0.9, scale="aspect", radius=50.0, heads="whole", weight_decay=0.0
    )
    rows = replace(spectral, rule="row_norm", scale="row_rms")
    sign = replace(spectral, rule="sign", scale="inverse_fan_in", radius=3000.0)
    return Stack(
        name="scion",
        lr=4e-4,
        table=_table(spectral, rows, embedding=rows, position=rows, lm_head=sign, tied_embedding=sign),
        source="Pethick et al. 2025, arXiv:2502.07529: spectral norm on hidden matrices, 1→RMS norm on one-hot inputs, "
        "1→∞ norm on the head, RMS norm on vectors. weight_decay=0 is the unconstrained method, "
        "W ← W − γρU; weight_decay=1 the constrained one, W ← (1−γ)W − γρU",
    )


def _adamw() -> Stack:
    return Stack(
        name="adamw",
        lr=2.5e-3,
        table=_table(ADAMW, ADAMW),
        source="Loshchilov & Hutter 2019, arXiv:1711.05101, on everything",
    )


STACKS: dict[str, Stack] = {
    stack.name: stack for stack in (_symmetric(), _muon(), _polargrad(), _ssd(), _scion(), _adamw())
}


def get_stack(name: str) -> Stack:
    """The stack of that name.

    Raises:
        ConfigError: for an unknown one, naming the known ones.
    """
    if name not in STACKS:
        raise ConfigError(f"unknown stack {name!r}; known: {', '.join(STACKS)}")
    return STACKS[name]


def settings_for(block: Block, config: SymOptConfig) -> dict[str, Any]:
    """The full vocabulary of a parameter group, without its parameters and name, that a block gets under a config.

    Raises:
        ConfigError: if the block is to be centered although the loss sees its shift.
    """
    stack = get_stack(config.stack)
    entry, override = stack.table[block.role], config.roles.get(str(block.role), RoleConfig())
    given = {key: value for key, value in asdict(override).items() if value is not None}

    usual = asdict(entry if override.rule in (None, entry.rule) else _usual(override.rule or ""))
    usual |= {"lr_multiplier": entry.lr_multiplier, "weight_decay": entry.weight_decay}  # the role's, not the rule's
    if config.weight_decay is not None and block.role is not Role.VECTOR:
        usual["weight_decay"] = config.weight_decay
    if override.scale is not None:
        usual["alpha"] = 1.0 if override.scale in NUCLEAR else None

    chosen = usual | given
    if override.lr is None:
        chosen["lr"] = (stack.lr if config.lr is None else config.lr) * chosen["lr_multiplier"]
    chosen["role"] = str(block.role)
    chosen["layout"] = _layout(block, chosen)
    chosen["centered"] = _centered(block, chosen["centered"])
    chosen["precision"] = chosen["precision"] or config.precision
    chosen["backend"] = chosen["backend"] or config.backend
    chosen["scratch"], chosen["capturable"] = config.scratch, config.capturable
    return {key: value for key, value in chosen.items() if key not in ("lr_multiplier", "heads", "pairs")}


def _usual(rule: str) -> RoleConfig:
    """What a rule comes with when a role gets another one than its stack's: the average that the methods publish."""
    if rule == "adamw":
        return replace(ADAMW, centered=None)
    scale = "none" if get_rule(rule).kind == "coordinate" else "rms"
    return replace(ADAMW, rule=rule, centered=None, momentum=0.95, scale=scale)


def _layout(block: Block, chosen: Mapping[str, Any]) -> Layout:
    if block.role is Role.VECTOR and get_rule(chosen["rule"]).kind != "coordinate":
        return Layout.row()
    layout = block.layout or Layout.matrix()
    layout = layout.whole() if chosen["heads"] == "whole" else layout
    return layout.with_pairs(True) if chosen["pairs"] else layout


def _centered(block: Block, asked: bool | None) -> bool:
    visible = not block.symmetry.shift_invariant
    if asked and block.z_loss:
        warnings.warn(
            f"roles.{block.role}.centered=true: a z-loss penalizes the shift 1aᵀ of {block.name!r}, and a centered "
            "update can never follow it: the z-loss will act through the other directions only",
            stacklevel=2,
        )
    elif asked and visible:
        raise ConfigError(
            f"roles.{block.role}.centered=true: the loss sees the shift 1aᵀ of {block.name!r} (symmetry "
            f"{block.symmetry}), so a centered update could never learn it. Remove `centered`, or declare the Block "
            f"with shift_invariant=True if its softmax is plain and it is not tied."
        )
    return not visible if asked is None else asked
