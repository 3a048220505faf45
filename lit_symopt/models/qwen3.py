"""Qwen3 (Yang et al. 2025, arXiv:2505.09388): grouped-query attention with normalized queries and keys, SwiGLU MLPs.

The layers are transformers' `Qwen3ForCausalLM`; this file declares the architecture's arguments and its blocks.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

from lit_symopt.blocks import Block, BlockTaxonomy, Role
from lit_symopt.config import SymOptConfig
from lit_symopt.errors import ConfigError
from lit_symopt.layout import Layout
from lit_symopt.models.causal_lm import DEFAULT_SYMOPT, LitCausalLM
from lit_symopt.models.pretrained import load_pretrained, read_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Attention = Literal["sdpa", "eager", "flash_attention_2"]


def taxonomy(config: PretrainedConfig) -> BlockTaxonomy:
    """The blocks of a Qwen3 model: `config` is its `Qwen3Config`.

    Example:
        >>> from transformers import Qwen3Config
        >>> taxonomy(Qwen3Config(num_attention_heads=4, num_key_value_heads=2)).name
        'Qwen3'
    """
    q_heads = Layout.heads(config.num_attention_heads, dim="rows")
    kv_heads = Layout.heads(config.num_key_value_heads, dim="rows")
    blocks = [
        Block("*q_proj.weight", role=Role.QUERY, layout=q_heads),
        Block("*k_proj.weight", role=Role.KEY, layout=kv_heads),
        Block("*v_proj.weight", role=Role.VALUE, layout=kv_heads),
        Block(
            "*o_proj.weight", role=Role.ATTENTION_OUT, layout=Layout.heads(config.num_attention_heads, dim="columns")
        ),
        Block("*gate_proj.weight", role=Role.GATE),
        Block("*up_proj.weight", role=Role.UP),
        Block("*down_proj.weight", role=Role.DOWN, layout=Layout.transposed()),  # its neurons are columns
        Block("*norm.weight", role=Role.VECTOR),  # of layers, of queries and keys, and the last one
    ]
    if config.tie_word_embeddings:
        blocks.append(Block("*embed_tokens.weight", role=Role.TIED_EMBEDDING))
    else:
        blocks.append(Block("*embed_tokens.weight", role=Role.EMBEDDING))
        blocks.append(Block("*lm_head.weight", role=Role.LM_HEAD))
    if config.attention_bias:
        blocks.append(Block("*_proj.bias", role=Role.VECTOR))
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
        symopt: SymOptConfig = DEFAULT_SYMOPT,
    ) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM

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
        if pretrained is None:
            _refuse_impossible(entries)
            theta = entries.pop("rope_theta")
            config = Qwen3Config(**entries, rope_parameters={"rope_type": "default", "rope_theta": theta})
            config._attn_implementation = attention
            model: PreTrainedModel = Qwen3ForCausalLM(config)
        else:
            _refuse_contradictions(entries, pretrained)
            model = load_pretrained(pretrained, attention=attention)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        super().__init__(model, symopt=symopt)

    def block_taxonomy(self) -> BlockTaxonomy:
        """The declared blocks; see `taxonomy`."""
        return taxonomy(self.model.config)


def _refuse_impossible(entries: dict[str, Any]) -> None:
    sizes = {name: value for name, value in entries.items() if isinstance(value, int) and not isinstance(value, bool)}
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    queries, keys = entries["num_attention_heads"], entries["num_key_value_heads"]
    if queries % keys:
        raise ConfigError(
            f"num_key_value_heads={keys} does not divide num_attention_heads={queries}; each key head serves equally "
            "many query heads"
        )
    if entries["head_dim"] % 2:
        raise ConfigError(f"head_dim={entries['head_dim']} must be even: rotary embeddings turn pairs of dimensions")
    for name in ("initializer_range", "rope_theta", "rms_norm_eps"):
        if entries[name] <= 0:
            raise ConfigError(f"{name}={entries[name]} must be positive")
    if not 0 <= entries["attention_dropout"] < 1:
        raise ConfigError(f"attention_dropout={entries['attention_dropout']} must be in [0, 1)")


def _refuse_contradictions(entries: dict[str, Any], folder: str) -> None:
    config = read_config(folder)
    if config.model_type != "qwen3":
        raise ConfigError(f"{folder} holds a {config.model_type!r} model, not a 'qwen3' one")
    defaults = signature(Qwen3.__init__).parameters
    for name, value in entries.items():
        held = config.rope_parameters["rope_theta"] if name == "rope_theta" else getattr(config, name)
        if value not in (held, defaults[name].default):
            raise ConfigError(
                f"{name}={value} contradicts pretrained={folder!r}, which has {name}={held}; leave {name} out"
            )
