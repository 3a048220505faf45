"""Architectures beyond the usual list, each for one thing that the others lack."""

from __future__ import annotations

from lit_symopt.blocks import Action, Block, Layout, Role
from tests.infer.answers.pieces import (
    attention,
    expert_stacks,
    gated_mlp,
    layer_norm,
    llama_attention,
    plain_mlp,
    rms_norms,
    router,
    untied,
    vector,
)

_LETTERS = ("q", "k", "v", "o")

# Neighboring pairs turn, half of a head; the head of the vocabulary has a bias.
_GPTJ = [
    *untied("transformer.wte.weight"),
    vector("lm_head.bias", "lm_head", shift_invariant=True),
    Block("*.q_proj.weight", role=Role.QUERY, layout=Layout.heads(3), action=Action.ROTARY_NEIGHBORS, rotary_dim=4),
    Block("*.k_proj.weight", role=Role.KEY, layout=Layout.heads(3), action=Action.ROTARY_NEIGHBORS, rotary_dim=4),
    Block("*.v_proj.weight", role=Role.VALUE, layout=Layout.heads(3)),
    Block("*.out_proj.weight", role=Role.ATTENTION_OUT, layout=Layout.heads(3, dim="columns")),
    *plain_mlp("*.fc_in", "*.fc_out", biases=True),
    *layer_norm("*.ln_[1f]"),
]

# A shared expert behind a gate of its own; biases of q, k, v and none of o.
_QWEN2_MOE = [
    *untied("model.embed_tokens.weight"),
    *llama_attention(4, 2, biases=("q", "k", "v")),
    router("*.mlp.gate.weight", softmax=True),
    *expert_stacks("*.mlp.experts"),
    *gated_mlp(*(f"*.shared_expert.{name}_proj" for name in ("gate", "up", "down"))),
    Block("*.shared_expert_gate.weight", role=Role.LINEAR),
    *rms_norms(),
]

# Positions are looked up with an offset, found by summing the mask; ReLU.
_OPT = [
    Block("*.embed_tokens.weight", role=Role.TIED_EMBEDDING),
    Block("*.embed_positions.weight", role=Role.POSITION),
    *attention(
        "*.q_proj",
        "*.k_proj",
        "*.v_proj",
        "*.out_proj",
        heads=3,
        kv_heads=3,
        action=Action.GENERAL_LINEAR,
        biases=_LETTERS,
    ),
    *plain_mlp("*.fc1", "*.fc2", biases=True),
    *layer_norm("*layer_norm"),
]

# Many queries, one key and value, without rotary embedding.
_GPT_BIGCODE = [
    Block("transformer.wte.weight", role=Role.TIED_EMBEDDING),
    Block("transformer.wpe.weight", role=Role.POSITION),
    Block(
        "*.c_attn.weight",
        role=Role.QKV,
        layout=Layout.qkv(3, 1, 8, order="stacked"),
        action=Action.GENERAL_LINEAR,
    ),
    vector("*.c_attn.bias", "qkv"),
    Block("*.attn.c_proj.weight", role=Role.ATTENTION_OUT, layout=Layout.heads(3, dim="columns")),
    vector("*.attn.c_proj.bias"),
    *plain_mlp("*.mlp.c_fc", "*.mlp.c_proj", biases=True),
    *layer_norm("*.ln_[12f]"),
]

# Neighboring pairs turn, 4 of the 6 dimensions of a head; gate and up are fused; biases of q, k, v.
_GLM = [
    *untied("model.embed_tokens.weight"),
    Block("*.q_proj.weight", role=Role.QUERY, layout=Layout.heads(4), action=Action.ROTARY_NEIGHBORS, rotary_dim=4),
    Block("*.k_proj.weight", role=Role.KEY, layout=Layout.heads(2), action=Action.ROTARY_NEIGHBORS, rotary_dim=4),
    Block("*.v_proj.weight", role=Role.VALUE, layout=Layout.heads(2)),
    Block("*.o_proj.weight", role=Role.ATTENTION_OUT, layout=Layout.heads(4, dim="columns")),
    *(vector(f"*.{name[0]}_proj.bias", name) for name in ("query", "key", "value")),
    Block("*.gate_up_proj.weight", role=Role.GATE_UP, layout=Layout.gate_up("stacked"), action=Action.MONOMIAL),
    Block("*.down_proj.weight", role=Role.DOWN, layout=Layout.transposed(), action=Action.MONOMIAL),
    *rms_norms(),
]

# Scores are soft-capped too: their softmax follows a tanh.
_GEMMA2 = [
    Block("model.embed_tokens.weight", role=Role.TIED_EMBEDDING),
    *llama_attention(4, 2),
    *gated_mlp("*.mlp.gate_proj", "*.mlp.up_proj", "*.mlp.down_proj"),
    vector("*layernorm.weight"),
    vector("model.norm.weight"),
]

# Queries straight from the stream; halves turn, after the dimensions that do not.
_DEEPSEEK_DIRECT = [
    *untied("model.embed_tokens.weight"),
    Block("*.q_proj.weight", role=Role.QUERY, layout=Layout.heads(3), action=Action.NONE),
    Block("*.kv_a_proj_with_mqa.weight", role=Role.LINEAR, layout=Layout.split((10, 4))),
    vector("*.kv_a_layernorm.weight", "linear"),
    Block("*.kv_b_proj.weight", role=Role.QKV, layout=Layout.split((8, 7) * 3), action=Action.GENERAL_LINEAR),
    Block("*.o_proj.weight", role=Role.ATTENTION_OUT, layout=Layout.heads(3, dim="columns")),
    *gated_mlp("*.mlp.gate_proj", "*.mlp.up_proj", "*.mlp.down_proj"),
    *rms_norms(),
]

# One layer that is run twice; the table is narrower than the stream, and maps lead in and out.
_ALBERT = [
    Block("*.word_embeddings.weight", role=Role.TIED_EMBEDDING),
    Block("*.position_embeddings.weight", role=Role.POSITION),
    Block("*.token_type_embeddings.weight", role=Role.EMBEDDING),
    vector("albert.embeddings.LayerNorm.*"),
    Block("*.embedding_hidden_mapping_in.weight", role=Role.LINEAR),
    vector("*.embedding_hidden_mapping_in.bias"),
    *attention(
        *(f"*.attention.{name}" for name in ("query", "key", "value", "dense")),
        heads=4,
        kv_heads=4,
        action=Action.GENERAL_LINEAR,
        biases=_LETTERS,
    ),
    *plain_mlp("*.ffn", "*.ffn_output", biases=True),
    *layer_norm("*.attention.LayerNorm"),
    *layer_norm("*.full_layer_layer_norm"),
    Block("predictions.dense.weight", role=Role.LINEAR),
    vector("predictions.dense.bias", "linear"),
    *layer_norm("predictions.LayerNorm"),
    vector("predictions.bias", "tied_embedding", shift_invariant=True),
]

ANSWERS = {
    "albert": _ALBERT,
    "gptj": _GPTJ,
    "qwen2_moe": _QWEN2_MOE,
    "opt": _OPT,
    "gpt_bigcode": _GPT_BIGCODE,
    "glm": _GLM,
    "gemma2": _GEMMA2,
    "deepseek_v3_direct": _DEEPSEEK_DIRECT,
}
