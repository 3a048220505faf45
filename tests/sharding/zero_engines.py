"""Real DeepSpeed engines on CPU processes, around a small model whose blocks no partition boundary respects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_symopt import SymOpt

MICRO_BATCHES = 2  # of each rank, where gradients are accumulated

# What a mode changes in the DeepSpeed config, and "init" for deepspeed.zero.Init.
MODES: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero3_init": {"stage": 3, "init": True},
    "bf16": {"stage": 1, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "zero1_bf16": {"stage": 1, "bf16": {"enabled": True}},
    "zero3_bf16": {"stage": 3, "bf16": {"enabled": True}},
    "zero1_round_robin": {"stage": 1, "round_robin_gradients": True},
    "zero2_round_robin": {"stage": 2, "round_robin_gradients": True},
    "zero2_aligned": {"stage": 2, "parameter_alignment": True},
    "zero2_all_reduce": {"stage": 2, "reduce_scatter": False},
    "zero2_scattered": {"stage": 2, "contiguous_gradients": False},
    "zero2_overlap": {"stage": 2, "overlap_comm": True},
    "zero1_offload": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
    "zero2_offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "round_robin_gradients": True},
    "zero3_offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    "zero3_sub_groups": {"stage": 3, "sub_group_size": 20},
    "zero3_all_reduce": {"stage": 3, "reduce_scatter": False},
    "zero3_accumulated": {"stage": 3, "gradient_accumulation_steps": MICRO_BATCHES},
    "zero2_accumulated": {"stage": 2, "gradient_accumulation_steps": MICRO_BATCHES},
    "zero1_accumulated": {"stage": 1, "gradient_accumulation_steps": MICRO_BATCHES},
    "zero2_unnormed": {"stage": 2, "compute_grad_norm": False},
}


class Awkward(nn.Module):
    """Odd sizes, a tied weight, a frozen weight and, where DeepSpeed can run with one (not ZeRO 3), an empty one."""

    def __init__(self, *, empty: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.frozen = nn.Linear(5, 5)
        self.mix = nn.Linear(5, 7)
        self.experts = nn.Parameter(torch.empty(3, 7, 3))
        self.back = nn.Linear(3, 5, bias=False)
        self.head = nn.Linear(5, 11)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.empty(1))
        if empty:
            self.empty = nn.Parameter(torch.empty(0, 4))
        self.frozen.requires_grad_(False)

    def number(self) -> Awkward:
        """Give every element a value of its own; exact in bf16 up to a common scale."""
        for index, parameter in enumerate(self.parameters()):
            numbers = torch.arange(parameter.numel(), dtype=torch.float32).reshape(parameter.shape)
            parameter.data.copy_((numbers + 10 * index) / 256)
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """Cross-entropy of the tokens themselves."""
        hidden = torch.tanh(self.frozen(self.embed(tokens)))
        wide = torch.tanh(self.mix(hidden))
        hidden = hidden + self.back(torch.einsum("bti,eij->btj", wide, self.experts)) * self.scale
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1).float(), tokens.flatten())


def micro_batch(rank: int, index: int) -> Tensor:
    """The tokens that one rank sees in one micro-batch."""
    return torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(17 * rank + index))


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Three groups, one of which DeepSpeed finds shorter than it was."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = [(name, named.pop(name)) for name in ("mix.weight", "back.weight", "embed.weight")]
    experts = [("experts", named.pop("experts"))]
    return [
        {"params": matrices, "rule": "row_norm", "name": "matrices"},
        {"params": experts, "rule": "adamw", "name": "experts"},
        {"params": list(named.items()), "rule": "adamw", "name": "vectors"},
    ]


def config_of(mode: str) -> dict[str, Any]:
    """The DeepSpeed config of a mode."""
    settings = {key: value for key, value in MODES[mode].items() if key != "init"}
    top: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": settings.pop("gradient_accumulation_steps", 1),
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **{key: settings.pop(key) for key in ("bf16", "data_types") if key in settings},
    }
    return {**top, "zero_optimization": {"reduce_bucket_size": 60, "allgather_bucket_size": 60, **settings}}


def model_of(mode: str) -> Awkward:
    """The model that an engine of this mode holds, not yet numbered."""
    return Awkward(empty=MODES[mode]["stage"] < 3)


def engine_of(mode: str, client: type[SymOpt] = SymOpt, config: dict[str, Any] | None = None) -> tuple[Any, SymOpt]:
    """An engine around `Awkward`, numbered, and the optimizer that was given to it."""
    import deepspeed

    from lit_symopt.strategies.cpu import communicate_by_gloo

    communicate_by_gloo()
    config = config or config_of(mode)
    if MODES[mode].get("init"):
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = model_of(mode)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            model.number()
    else:
        model = model_of(mode).number()
    optimizer = client(groups_of(model), lr=0.01, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, optimizer
