"""What the tests of the models share: tiny models of every family, random sequences, and a quiet Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_symopt.models import Gemma3, GptOss, LitCausalLM, OLMoE, Qwen3

VOCABULARY = 32

# No two dimensions of a model agree by accident.
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MIXTURE: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2}
WINDOW: dict[str, Any] = {"head_dim": 6, "sliding_window": 5}

VARIANTS: dict[str, tuple[type[LitCausalLM], dict[str, Any]]] = {
    "qwen3": (Qwen3, {"head_dim": 6}),
    "qwen3 tied": (Qwen3, {"head_dim": 6, "tie_word_embeddings": True}),
    "gemma3": (Gemma3, {**WINDOW, "sliding_window_pattern": 2}),
    "gemma3 untied": (Gemma3, {**WINDOW, "tie_word_embeddings": False}),
    "gemma3 soft-capped": (Gemma3, {**WINDOW, "final_logit_softcapping": 0.5}),
    "gemma3 untied, soft-capped": (Gemma3, {**WINDOW, "tie_word_embeddings": False, "final_logit_softcapping": 0.5}),
    "olmoe": (OLMoE, {**MIXTURE, "norm_topk_prob": True}),
    "olmoe tied": (OLMoE, {**MIXTURE, "tie_word_embeddings": True}),
    "gpt_oss": (GptOss, {**MIXTURE, **WINDOW}),
    "gpt_oss without attention biases": (GptOss, {**MIXTURE, **WINDOW, "attention_bias": False}),
    "gpt_oss tied": (GptOss, {**MIXTURE, **WINDOW, "tie_word_embeddings": True, "rope_scaling_factor": 1.0}),
}
FAMILIES = ["qwen3", "gemma3", "olmoe", "gpt_oss"]
MIXTURES = ["olmoe", "gpt_oss"]


def tiny(variant: str = "qwen3", **changes: Any) -> Any:
    """A model of a few thousand parameters, the same every time."""
    torch.manual_seed(0)
    kind, own = VARIANTS[variant]
    return kind(**{**SHARED, **own, **changes})


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


class Sequences(L.LightningDataModule):
    """Batches of random tokens; the last validation batch is smaller than the others."""

    def __init__(self, vocab_size: int = VOCABULARY, count: int = 10) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.sequences = tokens(count, 8)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader([{"input_ids": row} for row in self.sequences], batch_size=4, drop_last=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader([{"input_ids": row} for row in self.sequences], batch_size=4)  # type: ignore[arg-type]

    test_dataloader = val_dataloader


def trainer(folder: Path, **options: object) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
    }
    return L.Trainer(**{**defaults, **options})  # type: ignore[arg-type]
