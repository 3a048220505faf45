"""Tiny instances of architectures, with an example batch each.

No two dimensions of an instance are equal by accident (width, heads x head dimension, neurons, vocabulary, experts,
tokens, sequences), except in the `square` ones, where they are equal on purpose. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tests.infer import batches
from tests.infer.instance import Instance
from tests.infer.plain import CappedDecoder, LitEncoder, LitTranslator, Misnamed, MixtureDecoder

LAYERS = 2

_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
# 53 entries, width 20, 4 heads of 6 on 2 kv heads, 36 neurons.
_DECODER: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 20,
    "intermediate_size": 36,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    **_TOKENS,
}
_GPT2: dict[str, Any] = {
    "vocab_size": 53,
    "n_embd": 24,
    "n_head": 3,
    "n_inner": 40,
    "n_layer": LAYERS,
    "n_positions": 16,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    **_TOKENS,
}
_ENCODER: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}


def _model(config: str, model: str, *, experts: str | None = None, **entries: Any) -> Callable[[], nn.Module]:
    """A builder of transformers' `model` from its `config` class; `experts` chooses how mixtures are computed."""

    def build() -> nn.Module:
        import transformers

        chosen = getattr(transformers, config)(**entries)
        if experts is not None:
            chosen._experts_implementation = experts
        built: nn.Module = getattr(transformers, model)(chosen)
        return built

    return build


def _causal(architecture: str, **entries: Any) -> Callable[[], nn.Module]:
    return _model(f"{architecture}Config", f"{architecture}ForCausalLM", **entries)


def _mixtral(experts: str | None = None) -> Callable[[], nn.Module]:
    return _causal("Mixtral", experts=experts, **_DECODER, num_local_experts=5, num_experts_per_tok=2)


def _gpt2(**entries: Any) -> Callable[[], nn.Module]:
    return _model("GPT2Config", "GPT2LMHeadModel", **{**_GPT2, **entries})


def _falcon(**entries: Any) -> Callable[[], nn.Module]:
    usual = {"vocab_size": 53, "hidden_size": 24, "num_attention_heads": 6, "num_hidden_layers": LAYERS}
    return _causal("Falcon", **usual, ffn_hidden_size=40, max_position_embeddings=64, **_TOKENS, **entries)


def _family(name: str, **entries: Any) -> Callable[[], nn.Module]:
    """One of our own modules, around one of transformers' models."""

    def build() -> nn.Module:
        from lit_symopt import models

        usual = {key: _DECODER[key] for key in _DECODER if key not in (*_TOKENS, "tie_word_embeddings")}
        chosen = {key: value for key, value in {**usual, **entries}.items() if value is not None}
        built: nn.Module = getattr(models, name)(**chosen)
        return built

    return build


def _bert(task: str) -> Callable[[], nn.Module]:
    return _model(
        "BertConfig",
        f"BertFor{task}",
        vocab_size=53,
        type_vocab_size=2,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=7,
        **_ENCODER,
    )


def _t5(feed_forward: str) -> Callable[[], nn.Module]:
    return _model(
        "T5Config",
        "T5ForConditionalGeneration",
        vocab_size=53,
        d_model=20,
        d_kv=6,
        d_ff=36,
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        feed_forward_proj=feed_forward,
        decoder_start_token_id=0,
    )


# Three heads of 8 + 4 dimensions, of which the last 4 turn, and of 7 for values; a dense layer, then a mixture.
_DEEPSEEK: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 20,
    "intermediate_size": 44,
    "moe_intermediate_size": 28,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_shared_experts": 3,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 10,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 7,
    "max_position_embeddings": 64,
    **_TOKENS,
}
_SQUARE: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 24,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 6,
}

_MAMBA: dict[str, Any] = {"vocab_size": 53, "hidden_size": 20, "num_hidden_layers": LAYERS, "conv_kernel": 4}

_EXPERTS: dict[str, Any] = {"intermediate_size": 28, "num_experts": 5, "num_experts_per_tok": 2}
_OLMOE: dict[str, Any] = {**_EXPERTS, "hidden_size": 24, "head_dim": None}  # heads are hidden_size / heads wide


def _declared(name: str, **entries: Any) -> Instance:
    return Instance(build=_family(name, **entries), batch=batches.tokens, declares=True)


INSTANCES: dict[str, Instance] = {
    "qwen3": _declared("Qwen3"),
    "qwen3_tied": _declared("Qwen3", tie_word_embeddings=True),
    "gemma3": _declared("Gemma3", sliding_window=5, sliding_window_pattern=2),
    "gemma3_capped": _declared("Gemma3", final_logit_softcapping=3.0),
    "gemma3_untied": _declared("Gemma3", tie_word_embeddings=False),
    "gemma3_untied_capped": _declared("Gemma3", tie_word_embeddings=False, final_logit_softcapping=3.0),
    "olmoe": _declared("OLMoE", **_OLMOE),
    "olmoe_router_losses": _declared("OLMoE", **_OLMOE, load_balancing_loss=0.1, router_z_loss=0.1),
    "gpt_oss": _declared("GptOss", **_EXPERTS),
    "llama": Instance(build=_causal("Llama", **_DECODER), batch=batches.tokens),
    "llama_square": Instance(build=_causal("Llama", **{**_DECODER, **_SQUARE}), batch=batches.square),
    "llama_biases": Instance(
        build=_causal("Llama", **{**_DECODER, "attention_bias": True, "mlp_bias": True}), batch=batches.tokens
    ),
    "mistral": Instance(build=_causal("Mistral", **_DECODER, sliding_window=5), batch=batches.tokens),
    "mixtral": Instance(build=_mixtral(), batch=batches.tokens),
    "mixtral_eager": Instance(build=_mixtral("eager"), batch=batches.tokens),
    "mixtral_batched": Instance(build=_mixtral("batched_mm"), batch=batches.tokens),
    "qwen3_moe": Instance(
        build=_causal(
            "Qwen3Moe",
            experts="eager",
            **_DECODER,
            moe_intermediate_size=28,
            num_experts=5,
            num_experts_per_tok=2,
            decoder_sparse_step=2,
            norm_topk_prob=True,
        ),
        batch=batches.tokens,
    ),
    "deepseek_v3": Instance(build=_causal("DeepseekV3", **_DEEPSEEK), batch=batches.tokens),
    "gpt2": Instance(build=_gpt2(), batch=batches.tokens),
    "gpt2_square": Instance(build=_gpt2(vocab_size=24, n_inner=24), batch=batches.square),
    "gpt_neox": Instance(
        build=_causal(
            "GPTNeoX",
            vocab_size=53,
            **{**_ENCODER, "num_attention_heads": 3},
            max_position_embeddings=64,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
        batch=batches.tokens,
    ),
    "phi3": Instance(build=_causal("Phi3", **{**_DECODER, "pad_token_id": 0}), batch=batches.tokens),
    "falcon_multi_query": Instance(build=_falcon(), batch=batches.tokens),
    "falcon_grouped": Instance(build=_falcon(new_decoder_architecture=True, num_kv_heads=2), batch=batches.tokens),
    "falcon_per_head": Instance(
        build=_falcon(multi_query=False, parallel_attn=False, bias=True, tie_word_embeddings=False),
        batch=batches.tokens,
    ),
    "bloom": Instance(
        build=_causal(
            "Bloom", vocab_size=53, hidden_size=24, n_head=3, n_layer=LAYERS, hidden_dropout=0.0, attention_dropout=0.0
        ),
        batch=batches.tokens,
    ),
    "mamba": Instance(
        build=_causal("Mamba", **_MAMBA, state_size=5, expand=2, time_step_rank=3, tie_word_embeddings=False),
        batch=batches.tokens,
    ),
    "mamba2": Instance(
        build=_causal(
            "Mamba2", **_MAMBA, state_size=6, expand=2, num_heads=5, head_dim=8, n_groups=1, chunk_size=4, **_TOKENS
        ),
        batch=batches.tokens,
    ),
    "gptj": Instance(
        build=_causal("GPTJ", **{**_GPT2, "rotary_dim": 4}, tie_word_embeddings=False), batch=batches.tokens
    ),
    "gpt_bigcode": Instance(build=_causal("GPTBigCode", **_GPT2), batch=batches.tokens),
    "opt": Instance(
        build=_causal(
            "OPT",
            **{**_ENCODER, **_TOKENS, "num_attention_heads": 3, "pad_token_id": 0},
            vocab_size=53,
            ffn_dim=40,
            word_embed_proj_dim=24,
            max_position_embeddings=16,
            dropout=0.0,
        ),
        batch=batches.tokens,
    ),
    "qwen2_moe": Instance(
        build=_causal(
            "Qwen2Moe",
            experts="eager",
            **_DECODER,
            moe_intermediate_size=28,
            shared_expert_intermediate_size=44,
            num_experts=5,
            num_experts_per_tok=2,
        ),
        batch=batches.tokens,
    ),
    "glm": Instance(
        build=_causal(
            "Glm",
            **{**_DECODER, "pad_token_id": 0},
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.67},
        ),
        batch=batches.tokens,
    ),
    "gemma2": Instance(
        build=_causal("Gemma2", **{**_DECODER, "tie_word_embeddings": True}, sliding_window=5), batch=batches.tokens
    ),
    "deepseek_v3_direct": Instance(
        build=_causal(
            "DeepseekV3",
            **{**_DEEPSEEK, "q_lora_rank": None, "first_k_dense_replace": LAYERS},
            rope_interleave=False,
        ),
        batch=batches.tokens,
    ),
    "vit": Instance(
        build=_model(
            "ViTConfig",
            "ViTForImageClassification",
            image_size=12,
            patch_size=4,
            num_channels=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=7,
            **_ENCODER,
        ),
        batch=batches.images,
    ),
    "bert": Instance(build=_bert("SequenceClassification"), batch=batches.sentences),
    "albert": Instance(
        build=_model(
            "AlbertConfig",
            "AlbertForMaskedLM",
            vocab_size=53,
            embedding_size=14,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **_ENCODER,
        ),
        batch=batches.masked,
    ),
    "bert_masked": Instance(build=_bert("MaskedLM"), batch=batches.masked),
    "t5": Instance(build=_t5("relu"), batch=batches.pairs),
    "t5_gated": Instance(build=_t5("gated-gelu"), batch=batches.pairs),
    "t5_reglu": Instance(build=_t5("gated-relu"), batch=batches.pairs),
    "torch_encoder": Instance(build=lambda: LitEncoder(dropout=0.0), batch=batches.labeled, ours=True),
    "torch_translator": Instance(build=LitTranslator, batch=batches.translation, ours=True),
    "listed_experts_softmax": Instance(
        build=lambda: MixtureDecoder(scoring="softmax_topk", gated=True), batch=batches.ids, ours=True
    ),
    "listed_experts_topk_softmax": Instance(
        build=lambda: MixtureDecoder(scoring="topk_softmax", gated=True), batch=batches.ids, ours=True
    ),
    "listed_experts_sigmoid": Instance(
        build=lambda: MixtureDecoder(scoring="sigmoid", gated=False), batch=batches.ids, ours=True
    ),
    "misnamed": Instance(build=Misnamed, batch=batches.ids, ours=True),
    "misnamed_complex": Instance(build=lambda: Misnamed(complex_numbers=True), batch=batches.ids, ours=True),
    "capped_decoder": Instance(build=CappedDecoder, batch=batches.ids, ours=True),
    "tied_by_hand": Instance(build=lambda: CappedDecoder(cap=None, tied=True), batch=batches.ids, ours=True),
    "square_decoder": Instance(
        build=lambda: CappedDecoder(vocabulary=24, neurons=24, cap=None), batch=lambda: batches.ids(24), ours=True
    ),
}
