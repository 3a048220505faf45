"""GPT-2: `Conv1D` stores inputs as rows, q, k, v lie side by side in columns, learned positions, the head is tied."""

from __future__ import annotations

from lit_symopt.blocks import Action, Block, Layout, Role
from tests.infer.answers.pieces import layer_norm, vector


def _gpt2(heads: int, head_dim: int) -> list[Block]:
    qkv = Layout.qkv(heads, heads, head_dim, order="stacked", stored="in_out")
    return [
        Block("transformer.wte.weight", role=Role.TIED_EMBEDDING),
        Block("transformer.wpe.weight", role=Role.POSITION),
        Block("*.c_attn.weight", role=Role.QKV, layout=qkv, action=Action.GENERAL_LINEAR),
        vector("*.c_attn.bias", "qkv"),
        Block(
            "*.attn.c_proj.weight",
            role=Role.ATTENTION_OUT,
            layout=Layout.heads(heads, dim="rows", stored="in_out"),
        ),
        vector("*.attn.c_proj.bias"),
        Block("*.c_fc.weight", role=Role.UP, layout=Layout.transposed(stored="in_out"), action=Action.PERMUTATION),
        vector("*.c_fc.bias", "up"),
        Block("*.mlp.c_proj.weight", role=Role.DOWN, layout=Layout.matrix(stored="in_out"), action=Action.PERMUTATION),
        vector("*.mlp.c_proj.bias"),
        *layer_norm("*.ln_[12f]"),
    ]


ANSWERS = {"gpt2": _gpt2(3, 8), "gpt2_square": _gpt2(3, 8)}
