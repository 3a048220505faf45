"""The models of the parity tests, their batches and their optimizers: the same in every process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_symopt import SymOpt, SymOptConfig
from lit_symopt.stacks import get_stack
from tests.models.tiny import tiny
from tests.sharding.parity.cases import CONTROL, RATES, RULES, Work

VOCABULARY, WIDTH = 149, 20  # tall enough that a Gram matrix is cheaper to move than an embedding

# Nothing here is a multiple of another number by intention: flat boundaries cut rows, shards are uneven, and on three
# ranks some are empty.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {"hidden_size": WIDTH, "intermediate_size": 27},
    "gemma3": {"hidden_size": WIDTH, "intermediate_size": 27},
    "olmoe": {
        "hidden_size": WIDTH,
        "intermediate_size": 7,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "load_balancing_loss": 0.01,  # not linear in the batch: one large batch would not do as an oracle
    },
    "gpt_oss": {"hidden_size": WIDTH, "intermediate_size": 9},
}


# With transformers' 0.02 the attention of so narrow a model is flat, and the gradients of its queries and keys are
# roundings, which a rule that ignores their size would enlarge.
INITIALIZER_RANGE = 0.1


class WithLoss(nn.Module):
    """A language model as a module whose call is the training loss: what DDP and DeepSpeed wrap."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.net = model

    def forward(self, input_ids: Tensor) -> Tensor:
        loss: Tensor = self.net.training_loss({"input_ids": input_ids})
        return loss


def build(family: str) -> WithLoss:
    """A model of some ten thousand parameters, its weights bitwise the same every time."""
    return WithLoss(tiny(family, vocab_size=VOCABULARY, initializer_range=INITIALIZER_RANGE, **SHAPES[family]))


def build_half(family: str) -> WithLoss:
    """The same with bfloat16 parameters. Buffers (rotary frequencies) stay as they are, as DeepSpeed leaves them."""
    module = build(family)
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16()
    return module


def batch(step: int, micro_batch: int) -> Tensor:
    """Token ids `[4, 32]` of a step's micro-batch."""
    generator = torch.Generator().manual_seed(1000 * step + micro_batch)
    return torch.randint(0, VOCABULARY, (4, 32), generator=generator)


def optimizer_for(work: Work, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that a work asks for."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if work.stack == CONTROL:
        return torch.optim.AdamW([parameter for _, parameter in named], lr=2.5e-3, betas=(0.9, 0.95))
    if work.stack not in RULES:
        rate = get_stack(work.stack).lr * RATES.get(work.stack, 1.0)
        return SymOpt.for_module(module, config=SymOptConfig(stack=work.stack, lr=rate))  # type: ignore[arg-type]
    shapes = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in named}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named:
        # Embedding and head in groups of their own: flat partitions cut them in two as well.
        kind = next((kind for kind in ("embed_tokens", "lm_head") if kind in name), "other matrices")
        options = RULES[work.stack] if len(shapes[name]) == 2 else {"rule": "adamw"}
        key = kind if len(shapes[name]) == 2 else "vectors"
        groups.setdefault(key, {"name": key, "params": [], **options})["params"].append((name, parameter))
    return SymOpt(list(groups.values()), weight_decay=0.1)
