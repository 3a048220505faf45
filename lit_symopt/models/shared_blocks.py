"""The blocks that the families have in common: attention, the vocabulary's two ends, norms of the residual stream."""

from __future__ import annotations

from lit_symopt.blocks import HEADS, RESIDUAL, Action, Block, Role
from lit_symopt.layout import Layout

RESIDUAL_NORMS = [
    Block("*layernorm.weight", role=Role.VECTOR, along=RESIDUAL),
    Block("*.norm.weight", role=Role.VECTOR, along=RESIDUAL),  # the last one
]
"""Gains of the norms of layers and of the last norm; patterns that leave norms of queries and keys alone."""

GATED_MLP = [
    Block("*gate_proj.weight", role=Role.GATE),
    Block("*up_proj.weight", role=Role.UP, action=Action.MONOMIAL),
    Block("*down_proj.weight", role=Role.DOWN, action=Action.MONOMIAL, layout=Layout.transposed()),
]
"""`down(act(gate x) ⊙ up x)` with Linear layers: linear in `up`; the neurons of `down` are its columns."""


def attention_blocks(
    heads: int,
    kv_heads: int,
    *,
    bias: bool,
    norms: bool = False,
    sinks: bool = False,
    planes: Action = Action.ROTARY_HALVES,
    mixing: Action = Action.GENERAL_LINEAR,
) -> list[Block]:
    """Projections `q_proj`, `k_proj`, `v_proj`, `o_proj` as Linear layers, one matrix a head.

    Args:
        heads: query heads.
        kv_heads: key and value heads.
        bias: whether all four have a bias.
        norms: whether there are gains `q_norm` and `k_norm`, of one head or of all of them.
        sinks: whether there is a logit `sinks` for each query head.
        planes: what acts on queries and keys.
        mixing: what acts on values and the output projection.
    """
    rows = {"q": Layout.heads(heads, dim="rows"), "kv": Layout.heads(kv_heads, dim="rows")}
    columns = Layout.heads(heads, dim="columns")
    blocks = [
        Block("*q_proj.weight", role=Role.QUERY, layout=rows["q"], action=planes),
        Block("*k_proj.weight", role=Role.KEY, layout=rows["kv"], action=planes),
        Block("*v_proj.weight", role=Role.VALUE, layout=rows["kv"], action=mixing),
        Block("*o_proj.weight", role=Role.ATTENTION_OUT, layout=columns, action=mixing),
    ]
    if bias:
        along = {"q": Role.QUERY, "k": Role.KEY, "v": Role.VALUE, "o": RESIDUAL}
        blocks += [Block(f"*{name}_proj.bias", role=Role.VECTOR, along=str(what)) for name, what in along.items()]
    if norms:
        blocks.append(Block("*q_norm.weight", role=Role.VECTOR, along=str(Role.QUERY)))
        blocks.append(Block("*k_norm.weight", role=Role.VECTOR, along=str(Role.KEY)))
    if sinks:
        blocks.append(Block("*.sinks", role=Role.VECTOR, along=HEADS))
    return blocks


def vocabulary_blocks(*, tied: bool, plain_softmax: bool = True) -> list[Block]:
    """`embed_tokens` and `lm_head`, or the one parameter that is both.

    Args:
        tied: the head is the embedding. Its shift is visible: it moves the inputs as well.
        plain_softmax: the logits enter the softmax as they are. A soft cap `c·tanh(logits/c)` sees a shared shift.
    """
    if tied:
        return [Block("*embed_tokens.weight", role=Role.TIED_EMBEDDING)]
    return [
        Block("*embed_tokens.weight", role=Role.EMBEDDING),
        Block("*lm_head.weight", role=Role.LM_HEAD, shift_invariant=None if plain_softmax else False),
    ]
