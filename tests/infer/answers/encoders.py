"""ViT, BERT (as a classifier and with its masked-token head) and T5."""

from __future__ import annotations

from lit_symopt.blocks import Action, Block, Layout, Role
from tests.infer.answers.pieces import attention, gated_mlp, layer_norm, plain_mlp, vector

_ALL = ("q", "k", "v", "o")


def _classifier() -> list[Block]:
    return [
        Block("classifier.weight", role=Role.LM_HEAD, shift_invariant=True),
        vector("classifier.bias", "lm_head", shift_invariant=True),
    ]


_VIT = [
    vector("vit.embeddings.cls_token"),
    Block("vit.embeddings.position_embeddings", role=Role.POSITION, layout=Layout.experts(Layout.matrix())),
    Block("*.patch_embeddings.projection.weight", role=Role.CONV, layout=Layout.flatten()),
    vector("*.patch_embeddings.projection.bias"),
    *attention(
        *(f"*.attention.{name}_proj" for name in _ALL),
        heads=4,
        kv_heads=4,
        action=Action.GENERAL_LINEAR,
        biases=_ALL,
    ),
    *plain_mlp("*.mlp.fc1", "*.mlp.fc2", biases=True),
    *layer_norm("vit.layers.*.layernorm_before"),
    *layer_norm("vit.layers.*.layernorm_after"),
    *layer_norm("vit.layernorm"),
    *_classifier(),
]

_BERT_BODY = [
    Block("*.position_embeddings.weight", role=Role.POSITION),
    Block("*.token_type_embeddings.weight", role=Role.EMBEDDING),
    *attention(
        *(f"bert.*.attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")),
        heads=4,
        kv_heads=4,
        action=Action.GENERAL_LINEAR,
        biases=_ALL,
    ),
    *plain_mlp("*.intermediate.dense", "bert.encoder.layer.[01].output.dense", biases=True),
    *layer_norm("bert.*LayerNorm"),
]

_BERT = [
    Block("*.word_embeddings.weight", role=Role.EMBEDDING),
    *_BERT_BODY,
    # tanh follows: the first token's summary is no residual stream any more.
    Block("bert.pooler.dense.weight", role=Role.LINEAR),
    vector("bert.pooler.dense.bias", "linear"),
    *_classifier(),
]

_BERT_MASKED = [
    Block("*.word_embeddings.weight", role=Role.TIED_EMBEDDING),
    *_BERT_BODY,
    Block("cls.predictions.transform.dense.weight", role=Role.LINEAR),
    vector("cls.predictions.transform.dense.bias", "linear"),
    # What it scales meets the rows of the embedding, whose columns are the residual stream.
    *layer_norm("cls.predictions.transform.LayerNorm"),
    # The table sees a shift, in the embedding; the bias alone does not: softmax(z + c) = softmax(z).
    vector("cls.predictions.bias", "tied_embedding", shift_invariant=True),
]


def _t5(mlp: list[Block]) -> list[Block]:
    return [
        Block("shared.weight", role=Role.TIED_EMBEDDING),
        # Buckets of distance x heads, added to the scores and never to the stream: biases, a column a head.
        vector("*.relative_attention_bias.weight", "heads"),
        *attention(*(f"*Attention.{name}" for name in _ALL), heads=4, kv_heads=4, action=Action.GENERAL_LINEAR),
        *mlp,
        vector("*layer_norm.weight"),
    ]


_DENSE = "*.DenseReluDense"
ANSWERS = {
    "vit": _VIT,
    "bert": _BERT,
    "bert_masked": _BERT_MASKED,
    "t5": _t5(plain_mlp(f"{_DENSE}.wi", f"{_DENSE}.wo", biases=False)),
    "t5_gated": _t5(gated_mlp(f"{_DENSE}.wi_0", f"{_DENSE}.wi_1", f"{_DENSE}.wo")),
    "t5_reglu": _t5(gated_mlp(f"{_DENSE}.wi_0", f"{_DENSE}.wi_1", f"{_DENSE}.wo")),
}
