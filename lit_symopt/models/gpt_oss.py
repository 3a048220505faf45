"""gpt-oss (OpenAI 2025, arXiv:2508.10925): attention with sinks, mixtures of clamped experts.

The layers are transformers' `GptOssForCausalLM`; this file declares the architecture's arguments and its blocks. The
experts of a layer are stored input first: `[E, d, 2I]` with gate and up columns in turn, and down in `[E, I, d]`, each
with a bias. An expert computes `(min-max(up) + 1) ⊙ gate·σ(α·gate)`, which is not linear in `up`: its neurons can be
permuted and no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lit_symopt.blocks import RESIDUAL, Action, Block, BlockTaxonomy, Role
from lit_symopt.config import SymOptConfig
from lit_symopt.errors import ConfigError
from lit_symopt.layout import Layout
from lit_symopt.models.arguments import Entries, Experts, build_model, transformers_class
from lit_symopt.models.causal_lm import DEFAULT_SYMOPT
from lit_symopt.models.moe import LitMoECausalLM, router_blocks
from lit_symopt.models.shared_blocks import RESIDUAL_NORMS, attention_blocks, vocabulary_blocks

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Kernels that know the sinks; transformers has none in scaled_dot_product_attention.
SinkAttention = Literal["eager", "flex_attention"]


def taxonomy(config: PretrainedConfig) -> BlockTaxonomy:
    """The blocks of a gpt-oss model: `config` is its `GptOssConfig`.

    Example:
        >>> from transformers import GptOssConfig
        >>> [str(block.layout) for block in taxonomy(GptOssConfig()).blocks if block.role is Role.EXPERT_GATE_UP]
        ["experts(gate_up('interleaved', stored='in_out'))"]
    """
    experts = [
        Block(
            "*experts.gate_up_proj",
            role=Role.EXPERT_GATE_UP,
            layout=Layout.experts(Layout.gate_up("interleaved", stored="in_out")),
            action=Action.PERMUTATION,
        ),
        Block(
            "*experts.down_proj",
            role=Role.EXPERT_DOWN,
            layout=Layout.experts(Layout.matrix(stored="in_out")),  # neurons are stored rows
            action=Action.PERMUTATION,
        ),
        Block("*experts.gate_up_proj_bias", role=Role.VECTOR, along=str(Role.EXPERT_GATE_UP)),
        Block("*experts.down_proj_bias", role=Role.VECTOR, along=RESIDUAL),
    ]
    attention = attention_blocks(
        config.num_attention_heads, config.num_key_value_heads, bias=config.attention_bias, sinks=True
    )
    blocks = [
        *vocabulary_blocks(tied=config.tie_word_embeddings),
        *attention,
        *router_blocks("*router.weight", bias="*router.bias"),
        *experts,
        *RESIDUAL_NORMS,
    ]
    return BlockTaxonomy(blocks, name="GptOss")


class GptOss(LitMoECausalLM):
    """A gpt-oss language model; the defaults are the architecture of gpt-oss-20b.

    Args:
        vocab_size: V, rows of the embedding and of the head; at least the number of token ids of the data.
        hidden_size: width d of the residual stream.
        intermediate_size: neurons of each expert.
        num_hidden_layers: layers; the first and every second one after it have local attention.
        num_attention_heads: query heads, each with a sink.
        num_key_value_heads: key and value heads; divides `num_attention_heads`.
        head_dim: dimension of one head (even, for the rotary embedding); need not be hidden_size / heads.
        num_experts: experts of each layer.
        num_experts_per_tok: experts that a token is sent to.
        sliding_window: tokens that local attention sees.
        max_position_embeddings: longest sequence the model is meant for.
        rope_theta: base of the rotary embedding.
        rope_scaling_factor: factor by which YaRN (Peng et al. 2023, arXiv:2309.00071) stretches the rotary embedding
            from max_position_embeddings / factor positions; 1 for the plain embedding.
        rms_norm_eps: added to the mean square inside every RMSNorm.
        swiglu_alpha: α of the experts.
        swiglu_limit: bound of the experts' `up`, and of their `gate` from above.
        attention_bias: whether the projections of the attention have biases.
        tie_word_embeddings: the head is the embedding.
        initializer_range: standard deviation of the initial matrices, embeddings, sinks and router biases.
        attention_dropout: probability of dropping an attention weight.
        load_balancing_loss: coefficient of the load-balancing loss; 0 leaves it out (see `LitMoECausalLM`).
        router_z_loss: coefficient of the router z-loss; 0 leaves it out.
        attention: attention kernel of transformers, one that knows sinks: `eager` (every device and dtype, memory
            grows with the square of the sequence), or `flex_attention` (compiled, GPU only).
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
        vocab_size: int = 201088,
        hidden_size: int = 2880,
        intermediate_size: int = 2880,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 64,
        num_key_value_heads: int = 8,
        head_dim: int = 64,
        num_experts: int = 32,
        num_experts_per_tok: int = 4,
        sliding_window: int = 128,
        max_position_embeddings: int = 131072,
        rope_theta: float = 150000.0,
        rope_scaling_factor: float = 32.0,
        rms_norm_eps: float = 1e-5,
        swiglu_alpha: float = 1.702,
        swiglu_limit: float = 7.0,
        attention_bias: bool = True,
        tie_word_embeddings: bool = False,
        initializer_range: float = 0.02,
        attention_dropout: float = 0.0,
        load_balancing_loss: float = 0.0,
        router_z_loss: float = 0.0,
        attention: SinkAttention = "eager",
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
            "head_dim": head_dim,
            "num_experts": num_experts,
            "num_experts_per_tok": num_experts_per_tok,
            "sliding_window": sliding_window,
            "max_position_embeddings": max_position_embeddings,
            "rope_theta": rope_theta,
            "rope_scaling_factor": rope_scaling_factor,
            "rms_norm_eps": rms_norm_eps,
            "swiglu_alpha": swiglu_alpha,
            "swiglu_limit": swiglu_limit,
            "attention_bias": attention_bias,
            "tie_word_embeddings": tie_word_embeddings,
            "initializer_range": initializer_range,
            "attention_dropout": attention_dropout,
        }
        model = build_model(
            transformers_class("GptOssForCausalLM"),
            entries,
            family=GptOss,
            configure=_configure,
            held=_held,
            pretrained=pretrained,
            attention=attention,
            experts=experts,
            gradient_checkpointing=gradient_checkpointing,
            deferred=deferred,
        )
        super().__init__(model, load_balancing_loss=load_balancing_loss, router_z_loss=router_z_loss, symopt=symopt)


_OURS = ("num_experts", "rope_theta", "rope_scaling_factor")


def _configure(entries: Entries) -> PretrainedConfig:
    from transformers import GptOssConfig

    config: PretrainedConfig = GptOssConfig(
        **{name: value for name, value in entries.items() if name not in _OURS},
        num_local_experts=entries["num_experts"],
        rope_parameters=_rope(entries),
        pad_token_id=None,
    )
    return config


def _rope(entries: Entries) -> dict[str, Any]:
    factor = entries["rope_scaling_factor"]
    if factor < 1:
        raise ConfigError(
            f"rope_scaling_factor={factor} must be at least 1, which leaves the rotary embedding as it is"
        )
    if factor == 1:
        return {"rope_type": "default", "rope_theta": entries["rope_theta"]}
    return {
        "rope_type": "yarn",
        "rope_theta": entries["rope_theta"],
        "factor": factor,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": int(entries["max_position_embeddings"] / factor),
    }


def _held(config: PretrainedConfig) -> Entries:
    rope = config.rope_parameters
    return {
        **config.to_dict(),
        "num_experts": config.num_local_experts,
        "rope_theta": rope["rope_theta"],
        "rope_scaling_factor": rope.get("factor", 1.0),
    }
