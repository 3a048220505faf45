"""Fused projections: GPT-NeoX and Bloom a head at a time, Falcon in three ways, Phi-3 stacked with a fused gate."""

from __future__ import annotations

from lit_symopt.blocks import Action, Block, Layout, Role
from tests.infer.answers.pieces import layer_norm, plain_mlp, rms_norms, untied, vector


def _attention(
    layout: Layout, heads: int, action: Action, *, biases: bool, rotary_dim: int | None = None
) -> list[Block]:
    blocks = [
        Block("*.query_key_value.weight", role=Role.QKV, layout=layout, action=action, rotary_dim=rotary_dim),
        Block("*.dense.weight", role=Role.ATTENTION_OUT, layout=Layout.heads(heads, dim="columns")),
    ]
    return blocks + ([vector("*.query_key_value.bias", "qkv"), vector("*.dense.bias")] if biases else [])


_MLP = ("*.mlp.dense_h_to_4h", "*.mlp.dense_4h_to_h")

_GPT_NEOX = [
    *untied("gpt_neox.embed_in.weight"),
    # Half of the 8 dimensions of a head turn.
    *_attention(Layout.qkv(3, 3, 8, order="per_head"), 3, Action.ROTARY_HALVES, biases=True, rotary_dim=4),
    *plain_mlp(*_MLP, biases=True),
    *layer_norm("*layer*norm"),
]

_BLOOM = [
    Block("transformer.word_embeddings.weight", role=Role.TIED_EMBEDDING),
    # Distances enter as biases of the scores, not by rotation.
    *_attention(Layout.qkv(3, 3, 8, order="per_head"), 3, Action.GENERAL_LINEAR, biases=True),
    *plain_mlp(*_MLP, biases=True),
    *layer_norm("*layernorm"),
    *layer_norm("transformer.ln_f"),
]

_TIED = Block("transformer.word_embeddings.weight", role=Role.TIED_EMBEDDING)

_FALCON_MULTI_QUERY = [
    _TIED,
    # Six queries, one key, one value: the one group is the whole stack.
    *_attention(Layout.qkv(6, 1, 4, order="stacked"), 6, Action.ROTARY_HALVES, biases=False),
    *plain_mlp(*_MLP, biases=False),
    *layer_norm("*.input_layernorm"),
    *layer_norm("transformer.ln_f"),
]

_FALCON_GROUPED = [
    _TIED,
    *_attention(Layout.qkv(6, 2, 4, order="per_group"), 6, Action.ROTARY_HALVES, biases=False),
    *plain_mlp(*_MLP, biases=False),
    *layer_norm("*.ln_attn"),
    *layer_norm("*.ln_mlp"),
    *layer_norm("transformer.ln_f"),
]

_FALCON_PER_HEAD = [
    *untied("transformer.word_embeddings.weight"),
    *_attention(Layout.qkv(6, 6, 4, order="per_head"), 6, Action.ROTARY_HALVES, biases=True),
    *plain_mlp(*_MLP, biases=True),
    *layer_norm("*layernorm"),
    *layer_norm("transformer.ln_f"),
]

_PHI3 = [
    *untied("model.embed_tokens.weight"),
    Block(
        "*.qkv_proj.weight",
        role=Role.QKV,
        layout=Layout.qkv(4, 2, 6, order="stacked"),
        action=Action.ROTARY_HALVES,
    ),
    Block("*.o_proj.weight", role=Role.ATTENTION_OUT, layout=Layout.heads(4, dim="columns")),
    Block("*.gate_up_proj.weight", role=Role.GATE_UP, layout=Layout.gate_up("stacked"), action=Action.MONOMIAL),
    Block("*.down_proj.weight", role=Role.DOWN, layout=Layout.transposed(), action=Action.MONOMIAL),
    *rms_norms(),
]

ANSWERS = {
    "gpt_neox": _GPT_NEOX,
    "bloom": _BLOOM,
    "falcon_multi_query": _FALCON_MULTI_QUERY,
    "falcon_grouped": _FALCON_GROUPED,
    "falcon_per_head": _FALCON_PER_HEAD,
    "phi3": _PHI3,
}
