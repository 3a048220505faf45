"""Mistakes in the answers of architectures, one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lit_symopt.blocks import Action, Layout, Role

Changes = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """One mistake in the answer of an instance; `repeats` if another case makes the same mistake elsewhere."""

    name: str
    changes: Changes
    repeats: bool = False


def _shifted(*patterns: str) -> Changes:
    return {pattern: {"shift_invariant": True} for pattern in patterns}


def _swapped(gate: str, up: str) -> Changes:
    return {gate: {"role": Role.UP, "action": Action.MONOMIAL}, up: {"role": Role.GATE, "action": Action.PERMUTATION}}


def _heads(q: int, kv: int, *, names: tuple[str, ...]) -> Changes:
    rows, columns = Layout.heads(q), Layout.heads(q, dim="columns")
    layouts = (rows, Layout.heads(kv), Layout.heads(kv), columns)
    return {name: {"layout": layout} for name, layout in zip(names, layouts, strict=True)}


_LLAMA = ("*.q_proj.weight", "*.k_proj.weight", "*.v_proj.weight", "*.o_proj.weight")
_FUSED = "*.query_key_value.weight"
_TURNED = Action.ROTARY_NEIGHBORS


def _qkv(*arguments: int, order: Any, stored: Any = "out_in") -> dict[str, Any]:
    return {"layout": Layout.qkv(*arguments, order=order, stored=stored)}


WRONG: dict[str, Wrong] = {
    # -- shifts
    "a tied head is shift-invariant": Wrong(name="gpt2", changes=_shifted("transformer.wte.weight")),
    "Gemma's tied head is shift-invariant": Wrong(
        repeats=True, name="gemma3", changes=_shifted("*embed_tokens.weight")
    ),
    "T5's tied head is shift-invariant": Wrong(repeats=True, name="t5", changes=_shifted("shared.weight")),
    "a soft-capped head is shift-invariant": Wrong(name="capped_decoder", changes=_shifted("head.weight")),
    "Gemma's capped head is shift-invariant": Wrong(name="gemma3_untied_capped", changes=_shifted("*lm_head.weight")),
    "Gemma's tied and capped head is shift-invariant": Wrong(
        repeats=True, name="gemma3_capped", changes=_shifted("*embed_tokens.weight")
    ),
    "a sigmoid router is shift-invariant": Wrong(
        name="listed_experts_sigmoid", changes=_shifted("mixtures.*.router.weight", "mixtures.*.router.bias")
    ),
    "DeepSeek's router is shift-invariant": Wrong(
        repeats=True, name="deepseek_v3", changes=_shifted("*.mlp.gate.weight")
    ),
    "a router with a z-loss is shift-invariant": Wrong(
        name="olmoe_router_losses", changes={"*mlp.gate.weight": {"z_loss": False, "shift_invariant": True}}
    ),
    # -- MLPs
    "gate and up rows by turns instead of stacked": Wrong(
        name="phi3", changes={"*.gate_up_proj.weight": {"layout": Layout.gate_up("interleaved")}}
    ),
    "the same of experts": Wrong(
        repeats=True,
        name="mixtral",
        changes={"*.mlp.experts.gate_up_proj": {"layout": Layout.experts(Layout.gate_up("interleaved"))}},
    ),
    "stacked instead of by turns": Wrong(
        name="gpt_oss",
        changes={
            "*experts.gate_up_proj": {"layout": Layout.experts(Layout.gate_up("stacked", stored="in_out"))},
        },
    ),
    "clamped experts are linear in up": Wrong(
        name="gpt_oss",
        changes={
            "*experts.gate_up_proj": {"action": Action.MONOMIAL},
            "*experts.down_proj": {"action": Action.MONOMIAL},
        },
    ),
    "down by its other side": Wrong(name="llama", changes={"*.mlp.down_proj.weight": {"layout": Layout.matrix()}}),
    "a square down by its other side": Wrong(
        name="llama_square", changes={"*.mlp.down_proj.weight": {"layout": Layout.matrix()}}
    ),
    "a square up, stored input first, by its other side": Wrong(
        name="gpt2_square", changes={"*.c_fc.weight": {"layout": Layout.matrix(stored="in_out")}}
    ),
    "a square up that is stored input first, as if it were not": Wrong(
        repeats=True, name="gpt2_square", changes={"*.c_fc.weight": {"layout": Layout.matrix()}}
    ),
    "a square down that is stored input first, as if it were not": Wrong(
        name="square_decoder", changes={"proj.weight": {"layout": Layout.transposed()}}
    ),
    "experts' down by its other side": Wrong(
        name="mixtral", changes={"*.mlp.experts.down_proj": {"layout": Layout.experts(Layout.matrix())}}
    ),
    "gate and up swapped": Wrong(name="llama", changes=_swapped("*.mlp.gate_proj.weight", "*.mlp.up_proj.weight")),
    "gate and up swapped, with biases": Wrong(
        repeats=True,
        name="llama_biases",
        changes=_swapped("*.mlp.gate_proj.weight", "*.mlp.up_proj.weight")
        | {"*.mlp.gate_proj.bias": {"along": "up"}, "*.mlp.up_proj.bias": {"along": "gate"}},
    ),
    "gate and up of listed experts swapped": Wrong(
        repeats=True,
        name="listed_experts_softmax",
        changes=_swapped("mixtures.*.experts.*.b.weight", "mixtures.*.experts.*.a.weight"),
    ),
    "gate and up of T5 swapped": Wrong(
        repeats=True, name="t5_gated", changes=_swapped("*.DenseReluDense.wi_0.weight", "*.DenseReluDense.wi_1.weight")
    ),
    "gate and up of a gate by ReLU swapped": Wrong(
        name="t5_reglu", changes=_swapped("*.DenseReluDense.wi_0.weight", "*.DenseReluDense.wi_1.weight")
    ),
    # -- heads
    "half as many heads": Wrong(name="llama", changes=_heads(2, 1, names=_LLAMA)),
    "twice as many heads": Wrong(repeats=True, name="llama", changes=_heads(8, 4, names=_LLAMA)),
    "heads of a wrong number of kv groups": Wrong(
        repeats=True, name="llama_square", changes=_heads(2, 2, names=_LLAMA)
    ),
    "half as many heads in a fused projection": Wrong(
        name="gpt2",
        changes={
            "*.c_attn.weight": _qkv(6, 6, 4, order="stacked", stored="in_out"),
            "*.attn.c_proj.weight": {"layout": Layout.heads(6, stored="in_out")},
        },
    ),
    "heads as wide as two, without rotary embedding": Wrong(
        repeats=True,
        name="torch_encoder",
        changes={
            "*attn.in_proj_weight": _qkv(2, 2, 12, order="stacked"),
            "*attn.out_proj.weight": {"layout": Layout.heads(2, dim="columns")},
        },
    ),
    "half as many heads, without rotary embedding": Wrong(
        repeats=True, name="vit", changes=_heads(8, 8, names=tuple(f"*.attention.{n}_proj.weight" for n in "qkvo"))
    ),
    "key and value heads of half the width": Wrong(
        name="llama", changes={name: {"layout": Layout.heads(4)} for name in _LLAMA[1:3]}
    ),
    "one key and value head": Wrong(
        name="listed_experts_softmax",
        changes={f"attention.*.to_{name}.weight": {"layout": Layout.heads(1)} for name in "kv"},
    ),
    "latent keys and values swapped": Wrong(
        name="deepseek_v3", changes={"*.kv_b_proj.weight": {"layout": Layout.split((7, 8) * 3)}}
    ),
    "keys and values swapped": Wrong(
        name="llama_square", changes={_LLAMA[1]: {"role": Role.VALUE, "action": None}, _LLAMA[2]: {"role": Role.KEY}}
    ),
    "a square output projection by its other side": Wrong(
        name="llama_square", changes={_LLAMA[3]: {"layout": Layout.heads(4)}}
    ),
    "a square output projection that is stored input first, as if it were not": Wrong(
        name="gpt2", changes={"*.attn.c_proj.weight": {"layout": Layout.heads(3, dim="columns")}}
    ),
    "stacked instead of a head at a time": Wrong(name="gpt_neox", changes={_FUSED: _qkv(3, 3, 8, order="stacked")}),
    "the same of Bloom": Wrong(repeats=True, name="bloom", changes={_FUSED: _qkv(3, 3, 8, order="stacked")}),
    "a head at a time instead of stacked": Wrong(
        name="gpt2", changes={"*.c_attn.weight": _qkv(3, 3, 8, order="per_head", stored="in_out")}
    ),
    "the same of torch's own layer": Wrong(
        repeats=True, name="torch_encoder", changes={"*attn.in_proj_weight": _qkv(4, 4, 6, order="per_head")}
    ),
    "stacked instead of a group at a time": Wrong(
        repeats=True, name="falcon_grouped", changes={_FUSED: _qkv(6, 2, 4, order="stacked")}
    ),
    "a group at a time instead of stacked": Wrong(
        name="phi3", changes={"*.qkv_proj.weight": _qkv(4, 2, 6, order="per_group")}
    ),
    "one group of eight instead of two of three": Wrong(
        name="falcon_grouped",
        changes={
            _FUSED: _qkv(8, 1, 4, order="per_group"),
            "*.dense.weight": {"layout": Layout.heads(8, dim="columns")},
        },
    ),
    "heads as wide as two": Wrong(
        repeats=True,
        name="falcon_grouped",
        changes={
            _FUSED: _qkv(3, 1, 8, order="per_group"),
            "*.dense.weight": {"layout": Layout.heads(3, dim="columns")},
        },
    ),
    "six queries on one key instead of four on two": Wrong(
        name="phi3",
        changes={
            "*.qkv_proj.weight": _qkv(6, 1, 6, order="stacked"),
            "*.o_proj.weight": {"layout": Layout.heads(6, dim="columns")},
        },
    ),
    # -- rotary embedding
    "neighbors instead of halves": Wrong(
        name="llama", changes={_LLAMA[0]: {"action": _TURNED}, _LLAMA[1]: {"action": _TURNED}}
    ),
    "halves instead of neighbors": Wrong(
        name="misnamed",
        changes={name: {"action": Action.ROTARY_HALVES} for name in ("norm.weight", "router.weight")},
    ),
    "the whole head turns": Wrong(name="gpt_neox", changes={_FUSED: {"rotary_dim": None}}),
    "too little of a head turns": Wrong(repeats=True, name="gpt_neox", changes={_FUSED: {"rotary_dim": 2}}),
    "no rotary embedding": Wrong(
        name="llama",
        changes={name: {"action": Action.GENERAL_LINEAR} for name in _LLAMA[:2]},
    ),
    "no rotary embedding in a fused projection": Wrong(
        repeats=True, name="falcon_multi_query", changes={_FUSED: {"action": Action.GENERAL_LINEAR}}
    ),
    # -- vectors
    "the bias of values lies along queries": Wrong(name="llama_biases", changes={"*.v_proj.bias": {"along": "query"}}),
    "the bias of up lies along the stream": Wrong(name="gpt2_square", changes={"*.c_fc.bias": {"along": "residual"}}),
    "the gains of a norm lie along queries": Wrong(
        name="llama", changes={"*.input_layernorm.weight": {"along": "query"}}
    ),
}
