"""OLMoE (Muennighoff et al. 2024, arXiv:2409.02060): every MLP a mixture of small gated experts.

The layers are transformers' `OlmoeForCausalLM`; this file declares the architecture's arguments and its blocks. The
experts of a layer are two stacks: gate rows, then up rows, in `[E, 2I, d]`, and down in `[E, d, I]`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_symopt.blocks import Action, Block, BlockTaxonomy, Role
from lit_symopt.config import SymOptConfig
from lit_symopt.layout import Layout
from lit_symopt.models.arguments import Attention, Entries, Experts, build_model, transformers_class
from lit_symopt.models.causal_lm import DEFAULT_SYMOPT
from lit_symopt.models.moe import LitMoECausalLM, router_blocks
from lit_symopt.models.shared_blocks import RESIDUAL_NORMS, attention_blocks, vocabulary_blocks

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def taxonomy(config: PretrainedConfig) -> BlockTaxonomy:
    """The blocks of an OLMoE model: `config` is its `OlmoeConfig`.

    The norms of queries and keys are over all heads together, so that their gains have one entry for each row of the
    projections. Where the configuration clips queries, keys and values (`clip_qkv`), no rotation or mixing of a head's
    dimensions is a symmetry.

    Example:
        >>> from transformers import OlmoeConfig
        >>> [str(block.layout) for block in taxonomy(OlmoeConfig()).blocks if block.role is Role.EXPERT_GATE_UP]
        ["experts(gate_up('stacked'))"]
    """
    clipped = config.clip_qkv is not None
    experts = [
        Block(
            "*experts.gate_up_proj",
            role=Role.EXPERT_GATE_UP,
            layout=Layout.experts(Layout.gate_up("stacked")),
            action=Action.MONOMIAL,
        ),
        Block(
            "*experts.down_proj",
            role=Role.EXPERT_DOWN,
            layout=Layout.experts(Layout.transposed()),  # neurons are stored columns
            action=Action.MONOMIAL,
        ),
    ]
    attention = attention_blocks(
        config.num_attention_heads,
        config.num_key_value_heads,
        bias=config.attention_bias,
        norms=True,
        planes=Action.NONE if clipped else Action.ROTARY_HALVES,
        mixing=Action.NONE if clipped else Action.GENERAL_LINEAR,
    )
    blocks = [
        *vocabulary_blocks(tied=config.tie_word_embeddings),
        *attention,
        *router_blocks("*mlp.gate.weight"),
        *experts,
        *RESIDUAL_NORMS,
    ]
    return BlockTaxonomy(blocks, name="OLMoE")


class OLMoE(LitMoECausalLM):
    """An OLMoE language model; the defaults are the architecture of OLMoE-1B-7B.

    Args:
        vocab_size: V, rows of the embedding and of the head; at least the number of token ids of the data.
        hidden_size: width d of the residual stream; a multiple of `num_attention_heads`.
        intermediate_size: neurons of each expert.
        num_hidden_layers: layers.
        num_attention_heads: query heads, of hidden_size / heads dimensions each (even, for the rotary embedding).
        num_key_value_heads: key and value heads; divides `num_attention_heads`.
        num_experts: experts of each layer.
        num_experts_per_tok: experts that a token is sent to.
        norm_topk_prob: scale the probabilities of the selected experts to a sum of one.
        max_position_embeddings: longest sequence the model is meant for.
        rope_theta: base of the rotary embedding.
        rms_norm_eps: added to the mean square inside every RMSNorm.
        tie_word_embeddings: the head is the embedding.
        initializer_range: standard deviation of the initial matrices and embeddings.
        attention_dropout: probability of dropping an attention weight.
        load_balancing_loss: coefficient of the load-balancing loss; 0 leaves it out (see `LitMoECausalLM`).
        router_z_loss: coefficient of the router z-loss; 0 leaves it out.
        attention: attention kernel of transformers; `flash_attention_2` needs the package of that name.
        experts: how a layer's experts are multiplied: one after another (`eager`, in every dtype), or as one grouped
            product (`grouped_mm`, made for GPUs; in the dtype of the weights even under autocast; no float64).
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        pretrained: a `save_pretrained` folder to start from. The architecture is then the folder's; an argument set
            to something else is an error, and `attention`, `experts` and `gradient_checkpointing` apply as given.
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
        vocab_size: int = 50304,
        hidden_size: int = 2048,
        intermediate_size: int = 1024,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 16,
        num_experts: int = 64,
        num_experts_per_tok: int = 8,
        norm_topk_prob: bool = False,
        max_position_embeddings: int = 4096,
        rope_theta: float = 1e4,
        rms_norm_eps: float = 1e-5,
        tie_word_embeddings: bool = False,
        initializer_range: float = 0.02,
        attention_dropout: float = 0.0,
        load_balancing_loss: float = 0.0,
        router_z_loss: float = 0.0,
        attention: Attention = "sdpa",
        experts: Experts = "eager",
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
            "num_experts": num_experts,
            "num_experts_per_tok": num_experts_per_tok,
            "norm_topk_prob": norm_topk_prob,
            "max_position_embeddings": max_position_embeddings,
            "rope_theta": rope_theta,
            "rms_norm_eps": rms_norm_eps,
            "tie_word_embeddings": tie_word_embeddings,
            "initializer_range": initializer_range,
            "attention_dropout": attention_dropout,
        }
        model = build_model(
            transformers_class("OlmoeForCausalLM"),
            entries,
            family=OLMoE,
            configure=_configure,
            held=_held,
            pretrained=pretrained,
            attention=attention,
            experts=experts,
            gradient_checkpointing=gradient_checkpointing,
            deferred=deferred,
        )
        super().__init__(model, load_balancing_loss=load_balancing_loss, router_z_loss=router_z_loss, symopt=symopt)


def _configure(entries: Entries) -> PretrainedConfig:
    from transformers import OlmoeConfig

    config: PretrainedConfig = OlmoeConfig(
        **{name: value for name, value in entries.items() if name != "rope_theta"},
        rope_parameters={"rope_type": "default", "rope_theta": entries["rope_theta"]},
        pad_token_id=None,
        eos_token_id=None,
    )
    return config


def _held(config: PretrainedConfig) -> Entries:
    return {**config.to_dict(), "rope_theta": config.rope_parameters["rope_theta"]}
