"""Qwen3 (Yang et al. 2025, arXiv:2505.09388): grouped-query attention with normalized queries and keys, SwiGLU MLPs.

The layers are transformers' `Qwen3ForCausalLM`; this file declares the architecture's arguments and its blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_symopt.blocks import BlockTaxonomy
from lit_symopt.config import SymOptConfig
from lit_symopt.models.arguments import Attention, Entries, build_model, transformers_class
from lit_symopt.models.causal_lm import DEFAULT_SYMOPT, LitCausalLM
from lit_symopt.models.shared_blocks import GATED_MLP, RESIDUAL_NORMS, attention_blocks, vocabulary_blocks

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def taxonomy(config: PretrainedConfig) -> BlockTaxonomy:
    """The blocks of a Qwen3 model: `config` is its `Qwen3Config`.

    Example:
        >>> from transformers import Qwen3Config
        >>> taxonomy(Qwen3Config(num_attention_heads=4, num_key_value_heads=2)).name
        'Qwen3'
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    blocks = [
        *vocabulary_blocks(tied=config.tie_word_embeddings),
        *attention_blocks(heads, kv_heads, bias=config.attention_bias, norms=True),
        *GATED_MLP,
        *RESIDUAL_NORMS,
    ]
    return BlockTaxonomy(blocks, name="Qwen3")


class Qwen3(LitCausalLM):
    """A Qwen3 language model; the defaults are the architecture of Qwen3-0.6B with an untied head.

    Args:
        vocab_size: V, rows of the embedding and of the head; at least the number of token ids of the data.
        hidden_size: width d of the residual stream.
        intermediate_size: neurons of each MLP.
        num_hidden_layers: layers.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; divides `num_attention_heads`.
        head_dim: dimension of one head (even, for the rotary embedding); need not be hidden_size / heads.
        max_position_embeddings: longest sequence the model is meant for.
        rope_theta: base of the rotary embedding.
        rms_norm_eps: added to the mean square inside every RMSNorm.
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
        vocab_size: int = 151936,
        hidden_size: int = 1024,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 8,
        head_dim: int = 128,
        max_position_embeddings: int = 32768,
        rope_theta: float = 1e6,
        rms_norm_eps: float = 1e-6,
        tie_word_embeddings: bool = False,
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
            "max_position_embeddings": max_position_embeddings,
            "rope_theta": rope_theta,
            "rms_norm_eps": rms_norm_eps,
            "tie_word_embeddings": tie_word_embeddings,
            "initializer_range": initializer_range,
            "attention_dropout": attention_dropout,
        }
        model = build_model(
            transformers_class("Qwen3ForCausalLM"),
            entries,
            family=Qwen3,
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


def _configure(entries: Entries) -> PretrainedConfig:
    from transformers import Qwen3Config

    given = {name: value for name, value in entries.items() if name != "rope_theta"}
    config: PretrainedConfig = Qwen3Config(
        **given, rope_parameters={"rope_type": "default", "rope_theta": entries["rope_theta"]}
    )
    return config


def _held(config: PretrainedConfig) -> Entries:
    return {**config.to_dict(), "rope_theta": config.rope_parameters["rope_theta"]}
