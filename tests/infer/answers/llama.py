"""Llama and Mistral: separate projections, rotary halves, SwiGLU, RMSNorm, an untied plain head."""

from __future__ import annotations

from lit_symopt.blocks import Block
from tests.infer.answers.pieces import gated_mlp, llama_attention, rms_norms, untied


def _llama(heads: int, kv_heads: int, *, biases: bool = False) -> list[Block]:
    return [
        *untied("model.embed_tokens.weight"),
        *llama_attention(heads, kv_heads, biases=("q", "k", "v", "o") if biases else ()),
        *gated_mlp("*.mlp.gate_proj", "*.mlp.up_proj", "*.mlp.down_proj", biases=biases),
        *rms_norms(),
    ]


ANSWERS = {
    "llama": _llama(4, 2),
    "llama_square": _llama(4, 4),
    "llama_biases": _llama(4, 2, biases=True),
    "mistral": _llama(4, 2),  # a sliding window moves no parameter
}
