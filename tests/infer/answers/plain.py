"""Our own modules of `tests/infer/plain.py`."""

from __future__ import annotations

from lit_symopt.blocks import Action, Block, Layout, Role
from tests.infer.answers.pieces import attention, gated_mlp, layer_norm, plain_mlp, router, untied, vector


def _mixture(experts: list[Block], *, softmax: bool) -> list[Block]:
    return [
        *untied("tokens.weight", "head.weight"),
        vector("head.bias", "lm_head", shift_invariant=True),
        Block("positions.weight", role=Role.POSITION),
        *attention(
            *(f"attention.*.to_{name}" for name in ("q", "k", "v", "out")),
            heads=4,
            kv_heads=2,
            action=Action.GENERAL_LINEAR,
            biases=("v",),
        ),
        router("mixtures.*.router.weight", softmax=softmax),
        vector("mixtures.*.router.bias", "router", shift_invariant=softmax),
        *experts,
        vector("norms.*.weight"),
    ]


_EXPERT = "mixtures.*.experts.*"
_GATED = gated_mlp(f"{_EXPERT}.b", f"{_EXPERT}.a", f"{_EXPERT}.c")


def _decoder(vocabulary: list[Block]) -> list[Block]:
    qkv = Layout.qkv(3, 3, 8, order="stacked", stored="in_out")
    return [
        *vocabulary,
        Block("wpe.weight", role=Role.POSITION),
        Block("qkv.weight", role=Role.QKV, layout=qkv, action=Action.GENERAL_LINEAR),
        vector("qkv.bias", "qkv"),
        Block("out.weight", role=Role.ATTENTION_OUT, layout=Layout.heads(3, dim="rows", stored="in_out")),
        vector("out.bias"),
        Block("fc.weight", role=Role.UP, layout=Layout.transposed(stored="in_out"), action=Action.PERMUTATION),
        vector("fc.bias", "up"),
        Block("proj.weight", role=Role.DOWN, layout=Layout.matrix(stored="in_out"), action=Action.PERMUTATION),
        vector("proj.bias"),
        *layer_norm("ln_[12f]"),
    ]


_MISNAMED = [
    *untied("lm_head.weight", "embed_tokens.weight"),
    Block("norm.weight", role=Role.QUERY, layout=Layout.heads(4), action=Action.ROTARY_NEIGHBORS, rotary_dim=4),
    Block("router.weight", role=Role.KEY, layout=Layout.heads(4), action=Action.ROTARY_NEIGHBORS, rotary_dim=4),
    Block("down_proj.weight", role=Role.VALUE, layout=Layout.heads(4)),
    Block("gate_proj.weight", role=Role.ATTENTION_OUT, layout=Layout.heads(4, dim="columns")),
    *gated_mlp("k_proj", "o_proj", "q_proj"),
    vector("experts.*.weight"),
]

_TORCH_LAYERS = [
    Block(
        "*attn.in_proj_weight",
        role=Role.QKV,
        layout=Layout.qkv(4, 4, 6, order="stacked"),
        action=Action.GENERAL_LINEAR,
    ),
    vector("*attn.in_proj_bias", "qkv"),
    Block("*attn.out_proj.weight", role=Role.ATTENTION_OUT, layout=Layout.heads(4, dim="columns")),
    vector("*attn.out_proj.bias"),
    *plain_mlp("*.linear1", "*.linear2", biases=True),
    *layer_norm("*.norm[12]"),
]

_TORCH_ENCODER = [
    Block("embed.weight", role=Role.EMBEDDING),
    Block("position", role=Role.POSITION, layout=Layout.experts(Layout.matrix())),
    *_TORCH_LAYERS,
    Block("classify.weight", role=Role.LM_HEAD, shift_invariant=True),
    vector("classify.bias", "lm_head", shift_invariant=True),
]

_TORCH_TRANSLATOR = [
    Block("source.weight", role=Role.EMBEDDING),
    *untied("target.weight", "head.weight"),
    *_TORCH_LAYERS,
    *layer_norm("*.norm3"),
    *layer_norm("transformer.*coder.norm"),
]

ANSWERS = {
    "torch_encoder": _TORCH_ENCODER,
    "listed_experts_softmax": _mixture(_GATED, softmax=True),
    "listed_experts_topk_softmax": _mixture(_GATED, softmax=True),
    "listed_experts_sigmoid": _mixture(plain_mlp(f"{_EXPERT}.fc", f"{_EXPERT}.proj", biases=True), softmax=False),
    "misnamed": _MISNAMED,
    "misnamed_complex": _MISNAMED,
    "torch_translator": _TORCH_TRANSLATOR,
    # tanh sees how large a logit is.
    "capped_decoder": _decoder(
        [Block("wte.weight", role=Role.EMBEDDING), Block("head.weight", role=Role.LM_HEAD, shift_invariant=False)]
    ),
    "square_decoder": _decoder(untied("wte.weight", "head.weight")),
    "tied_by_hand": _decoder([Block("wte.weight", role=Role.TIED_EMBEDDING)]),
}
