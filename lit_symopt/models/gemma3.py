"""Gemma 3 (Gemma Team 2025, arXiv:2503.19786), text only: mostly local attention, norms around every branch.

The layers are transformers' `Gemma3ForCausalLM`; this file declares the architecture's arguments and its blocks. The
embedding is multiplied by √hidden_size, and a gain w of a norm multiplies by 1 + w: it is 0 at the start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_symopt.blocks import BlockTaxonomy
from lit_symopt.config import SymOptConfig
from lit_symopt.errors import ConfigError
from lit_symopt.models.arguments import Attention, Entries, build_model, transformers_class
from lit_symopt.models.causal_lm import DEFAULT_SYMOPT, LitCausalLM
from lit_symopt.models.shared_blocks import GATED_MLP, RESIDUAL_NORMS, attention_blocks, vocabulary_blocks

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def taxonomy(config: PretrainedConfig) -> BlockTaxonomy:
    """The blocks of a Gemma 3 text model: `config` is its `Gemma3TextConfig`.

    A tied embedding is never centered; neither is an untied head whose logits are soft-capped, since
    `c·tanh(logits/c)` sees a shift shared by all logits.

    Example:
        >>> from transformers import Gemma3TextConfig
        >>> taxonomy(Gemma3TextConfig(tie_word_embeddings=False)).blocks[1].symmetry.shift_invariant
        True
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    blocks = [
        *vocabulary_blocks(tied=config.tie_word_embeddings, plain_softmax=config.final_logit_softcapping is None),
        *attention_blocks(heads, kv_heads, bias=config.attention_bias, norms=True),
        *GATED_MLP,
        *RESIDUAL_NORMS,
    ]
    return BlockTaxonomy(blocks, name="Gemma3")


class Gemma3(LitCausalLM):
    """A Gemma 3 language model; the defaults are the architecture of Gemma 3 1B.

    Args:
        vocab_size: V, rows of the embedding and of the head; at least the number of token ids of the data.
        hidden_size: width d of the residual stream; a multiple of `num_attention_heads`.
        intermediate_size: neurons of each MLP.
        num_hidden_layers: layers.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; divides `num_attention_heads`.
        head_dim: dimension of one head (even, for the rotary embedding); need not be hidden_size / heads.
        query_pre_attn_scalar: attention scores are divided by its square root.
        sliding_window: tokens that local attention sees.
        sliding_window_pattern: every layer of a number divisible by it has global attention, all others local.
        max_position_embeddings: longest sequence the model is meant for.
        rope_theta: base of the rotary embedding of global attention.
        rope_local_theta: base of the rotary embedding of local attention.
        rms_norm_eps: added to the mean square inside every RMSNorm.
        final_logit_softcapping: c of `c·tanh(logits/c)`; `None` for logits as they are.
        tie_word_embeddings: the head is the embedding.
        initializer_range: standard deviation of the initial matrices and embeddings.
        attention_dropout: probability of dropping an attention weight.
        attention: attention kernel of transformers; `flash_attention_2` needs the package of that name.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        pretrained: a `save_pretrained` folder to start from. The architecture is then the folder's; an argument set
            to something else is an error, and `attention` and `gradient_checkpointing` apply as given.
        deferred: for a model that does not fit into one process: describe it here and build it in `configure_model`,
            on each process only its own part under FSDP2 and DeepSpeed ZeRO 3. Its weights, and all later random
            numbers, are those that the same seed gives without it; rank 0 builds the whole model in host memory.
        symopt: stack, learning rates and schedule.

    Raises:
        ConfigError: for an architecture that cannot be built, or `pretrained` that is not such a folder.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 262144,
        hidden_size: int = 1152,
        intermediate_size: int = 6912,
        num_hidden_layers: int = 26,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 1,
        head_dim: int = 256,
        query_pre_attn_scalar: int = 256,
        sliding_window: int = 512,
        sliding_window_pattern: int = 6,
        max_position_embeddings: int = 32768,
        rope_theta: float = 1e6,
        rope_local_theta: float = 1e4,
        rms_norm_eps: float = 1e-6,
        final_logit_softcapping: float | None = None,
        tie_word_embeddings: bool = True,
        initializer_range: float = 0.02,
        attention_dropout: float = 0.0,
        attention: Attention = "sdpa",
        gradient_checkpointing: bool = False,
        pretrained: str | None = None,
        deferred: bool = False,
        symopt: SymOptConfig = DEFAULT_SYMOPT,
    ) -> None:
        entries: dict[str, Any] = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": num_key_value_heads,
            "head_dim": head_dim,
            "query_pre_attn_scalar": query_pre_attn_scalar,
            "sliding_window": sliding_window,
            "sliding_window_pattern": sliding_window_pattern,
            "max_position_embeddings": max_position_embeddings,
            "rope_theta": rope_theta,
            "rope_local_theta": rope_local_theta,
            "rms_norm_eps": rms_norm_eps,
            "final_logit_softcapping": final_logit_softcapping,
            "tie_word_embeddings": tie_word_embeddings,
            "initializer_range": initializer_range,
            "attention_dropout": attention_dropout,
        }
        model = build_model(
            transformers_class("Gemma3ForCausalLM"),
            entries,
            family=Gemma3,
            configure=_configure,
            held=_held,
            pretrained=pretrained,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
            deferred=deferred,
        )
        super().__init__(model, symopt=symopt)

    def block_taxonomy(self) -> BlockTaxonomy:
        """The declared blocks; see `taxonomy`."""
        return taxonomy(self.model.config)


_OURS = ("sliding_window_pattern", "rope_theta", "rope_local_theta")


def _layer_types(layers: int, pattern: int) -> list[str]:
    return ["sliding_attention" if number % pattern else "full_attention" for number in range(1, layers + 1)]


def _configure(entries: Entries) -> PretrainedConfig:
    from transformers import Gemma3TextConfig

    width, heads = entries["hidden_size"], entries["num_attention_heads"]
    if width % heads:  # heads have a dimension of their own here, but transformers asks for it
        raise ConfigError(f"hidden_size={width} is no multiple of num_attention_heads={heads}; choose it so")
    config: PretrainedConfig = Gemma3TextConfig(
        **{name: value for name, value in entries.items() if name not in _OURS},
        layer_types=_layer_types(entries["num_hidden_layers"], entries["sliding_window_pattern"]),
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": entries["rope_theta"]},
            "sliding_attention": {"rope_type": "default", "rope_theta": entries["rope_local_theta"]},
        },
        pad_token_id=None,
    )
    return config


def _held(config: PretrainedConfig) -> Entries:
    rope, layers = config.rope_parameters, config.num_hidden_layers
    patterns = [n for n in range(1, layers + 2) if _layer_types(layers, n) == list(config.layer_types)]
    return {
        **config.to_dict(),
        "sliding_window_pattern": patterns[0] if patterns else config.layer_types,
        "rope_theta": rope["full_attention"]["rope_theta"],
        "rope_local_theta": rope["sliding_attention"]["rope_theta"],
    }
