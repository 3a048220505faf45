"""Training a mixture-of-experts language model: the losses of its routers beside the language model's.

Shape legend:  B sequences of a batch, T tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_symopt.blocks import Block, BlockTaxonomy, Role, shape_of
from lit_symopt.config import SymOptConfig
from lit_symopt.errors import ConfigError
from lit_symopt.models import router_losses
from lit_symopt.models.causal_lm import DEFAULT_SYMOPT, LitCausalLM
from lit_symopt.models.deferred import Deferred
from lit_symopt.models.next_token import next_token_loss, refuse_without_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LitMoECausalLM(LitCausalLM):
    """A causal language model whose MLPs are mixtures of experts.

    Training minimizes

        total_loss = loss + a · load_balancing_loss + b · router_z_loss

    with `loss` the cross-entropy and a, b the coefficients below; see `lit_symopt.models.router_losses` for the two
    formulas. Each is taken over the tokens of one batch on one rank. With a or b, all four are logged under `train/`,
    the two router losses without their coefficients. Validation and test losses are the cross-entropy alone.

    Args:
        model: the model; its forward takes `output_router_logits`, its configuration has `num_experts_per_tok`.
        load_balancing_loss: a; 0 leaves the term out.
        router_z_loss: b; 0 leaves the term out. With it the routers are not centered by default.
        symopt: stack, learning rates and schedule.

    Raises:
        ConfigError: for a coefficient that is negative or not finite.

    Example:
        >>> from lit_symopt.models import OLMoE
        >>> model = OLMoE(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        ...               num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2,
        ...               load_balancing_loss=0.01, router_z_loss=0.001)
        >>> list(model.losses(torch.zeros(1, 4, dtype=torch.long)))
        ['loss', 'load_balancing_loss', 'router_z_loss', 'total_loss']
    """

    def __init__(
        self,
        model: PreTrainedModel | Deferred,
        *,
        load_balancing_loss: float = 0.0,
        router_z_loss: float = 0.0,
        symopt: SymOptConfig = DEFAULT_SYMOPT,
    ) -> None:
        for name, value in (("load_balancing_loss", load_balancing_loss), ("router_z_loss", router_z_loss)):
            if not (isfinite(value) and value >= 0):
                raise ConfigError(f"{name}={value} must be a finite coefficient of at least 0; 0 leaves the loss out")
        super().__init__(model, symopt=symopt)
        gather_experts_at_once(self.model)
        self.load_balancing_loss = load_balancing_loss
        self.router_z_loss = router_z_loss

    def block_taxonomy(self) -> BlockTaxonomy:
        """The blocks of the model; its routers under the z-loss if there is one."""
        taxonomy = super().block_taxonomy()
        return seen_by_z_loss(taxonomy) if self.router_z_loss else taxonomy

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits `[B, T, V]` of token ids `[B, T]`."""
        self._refuse_float64()
        return super().forward(input_ids)

    def losses(self, input_ids: Tensor) -> dict[str, Tensor]:
        """What training logs of a batch under `train/`: the terms, and their weighted sum as `total_loss`."""
        if not (self.load_balancing_loss or self.router_z_loss):
            return super().losses(input_ids)
        refuse_without_targets(input_ids)
        self._refuse_float64()
        output = self.model(input_ids=input_ids, use_cache=False, output_router_logits=True)
        loss = next_token_loss(output.logits, input_ids)
        top_k = self.model.config.num_experts_per_tok
        balance = router_losses.load_balancing_loss(output.router_logits, top_k=top_k)
        size = router_losses.router_z_loss(output.router_logits)
        total = loss + self.load_balancing_loss * balance + self.router_z_loss * size
        return {"loss": loss, "load_balancing_loss": balance, "router_z_loss": size, "total_loss": total}

    def _refuse_float64(self) -> None:
        config = self.model.config
        if config._experts_implementation == "grouped_mm" and self.model.dtype == torch.float64:
            raise ConfigError(
                "experts='grouped_mm' multiplies in float32 or less, and this model is float64; give experts='eager'"
            )


def gather_experts_at_once(model: nn.Module) -> None:
    """Make DeepSpeed's ZeRO 3 fetch the experts of a layer together; without effect elsewhere.

    transformers calls a submodule once for every expert that the batch reaches, and ZeRO 3 stops when ranks call
    different numbers of modules. Equal to `deepspeed.utils.set_z3_leaf_modules`, without importing deepspeed.
    """
    for module in model.modules():
        if any(len(shape_of(parameter)) == 3 for parameter in module.parameters(recurse=False)):  # [E, rows, columns]
            module._z3_leaf = True  # type: ignore[assignment]


def router_blocks(weight: str, *, bias: str | None = None) -> list[Block]:
    """A softmax router: the loss does not see a shift shared by all experts.

    Args:
        weight: pattern of its weight `[E, d]`.
        bias: pattern of its bias `[E]`, if it has one.
    """
    blocks = [Block(weight, role=Role.ROUTER)]
    if bias is not None:
        blocks.append(Block(bias, role=Role.VECTOR, along=str(Role.ROUTER), shift_invariant=True))
    return blocks


def seen_by_z_loss(taxonomy: BlockTaxonomy) -> BlockTaxonomy:
    """The same taxonomy with a z-loss on every router and its bias.

    Example:
        >>> [block.symmetry.shift_invariant for block in seen_by_z_loss(BlockTaxonomy(router_blocks("*.gate"))).blocks]
        [False]
    """

    def routes(block: Block) -> bool:
        return block.role is Role.ROUTER or block.along == str(Role.ROUTER)

    blocks = [
        replace(block, z_loss=True, shift_invariant=None) if routes(block) else block for block in taxonomy.blocks
    ]
    return BlockTaxonomy(blocks, name=taxonomy.name)
