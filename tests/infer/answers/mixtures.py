"""Mixtures of transformers: Mixtral, Qwen3-MoE, DeepSeek-V3."""

from __future__ import annotations

from lit_symopt.blocks import Action, Block, Layout, Role
from tests.infer.answers.pieces import (
    expert_stacks,
    gated_mlp,
    llama_attention,
    rms_norms,
    router,
    untied,
    vector,
)

_MIXTRAL = [
    *untied("model.embed_tokens.weight"),
    *llama_attention(4, 2),
    router("*.mlp.gate.weight", softmax=True),
    *expert_stacks("*.mlp.experts"),
    *rms_norms(),
]

_QWEN3_MOE = [
    *untied("model.embed_tokens.weight"),
    *llama_attention(4, 2),
    vector("*.q_norm.weight", "query"),
    vector("*.k_norm.weight", "key"),
    *gated_mlp("*.mlp.gate_proj", "*.mlp.up_proj", "*.mlp.down_proj"),  # the first layer is dense
    router("*.mlp.gate.weight", softmax=True),
    *expert_stacks("*.mlp.experts"),
    *rms_norms(),
]

# Three heads: 8 dimensions without and then 4 with rotary embedding in queries and keys, 7 in values.
_H, _NOPE, _ROPE, _V, _LATENT = 3, 8, 4, 7, 10
_DEEPSEEK_V3 = [
    *untied("model.embed_tokens.weight"),
    Block("*.q_a_proj.weight", role=Role.LINEAR),
    vector("*.q_a_layernorm.weight", "linear"),
    # A head's dimensions are of two kinds, and those that turn come last: no action on the whole head describes them.
    Block("*.q_b_proj.weight", role=Role.QUERY, layout=Layout.heads(_H), action=Action.NONE),
    Block("*.kv_a_proj_with_mqa.weight", role=Role.LINEAR, layout=Layout.split((_LATENT, _ROPE))),
    vector("*.kv_a_layernorm.weight", "linear"),
    # Its keys are those without rotary embedding.
    Block("*.kv_b_proj.weight", role=Role.QKV, layout=Layout.split((_NOPE, _V) * _H), action=Action.GENERAL_LINEAR),
    Block("*.o_proj.weight", role=Role.ATTENTION_OUT, layout=Layout.heads(_H, dim="columns")),
    *gated_mlp("*.layers.0.mlp.gate_proj", "*.layers.0.mlp.up_proj", "*.layers.0.mlp.down_proj"),
    router("*.mlp.gate.weight", softmax=False),
    *expert_stacks("*.mlp.experts"),
    *gated_mlp("*.shared_experts.gate_proj", "*.shared_experts.up_proj", "*.shared_experts.down_proj"),
    *rms_norms(),
]

ANSWERS = {
    "mixtral": _MIXTRAL,
    "mixtral_eager": _MIXTRAL,
    "mixtral_batched": _MIXTRAL,
    "qwen3_moe": _QWEN3_MOE,
    "deepseek_v3": _DEEPSEEK_V3,
}
