"""A tiny mixture of experts with dropout, data for it, and a fit of a few steps."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lit_symopt import ScheduleConfig, SymOptConfig
from lit_symopt.callbacks import LoadImbalance, LogitNorms, RouterStability
from lit_symopt.models import OLMoE

TOKENS = 6


def olmoe(*, experts: int = 4, top_k: int = 2, dropout: float = 0.2, lr: float = 0.05, **options: Any) -> OLMoE:
    """Two layers, seeded."""
    torch.manual_seed(5)
    return OLMoE(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=16,
        initializer_range=0.3,
        attention_dropout=dropout,
        symopt=SymOptConfig(lr=lr, schedule=ScheduleConfig()),
        **options,
    )


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of random tokens."""

    def __init__(self, number: int, *, seed: int, tokens: int = TOKENS) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(32, (number, tokens), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index]}


def loaders(
    *, batch_size: int = 2, tokens: int = TOKENS, shuffle: bool = True
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """12 training batches in an order that the global generator decides, and 3 validation batches."""
    train = DataLoader(Windows(12 * batch_size, seed=0, tokens=tokens), batch_size=batch_size, shuffle=shuffle)
    return train, DataLoader(Windows(3 * batch_size, seed=1, tokens=tokens), batch_size=batch_size)


def three(every: int = 2) -> list[L.Callback]:
    """All three callbacks."""
    return [
        LoadImbalance(every_n_steps=every),
        RouterStability(every_n_steps=every),
        LogitNorms(every_n_steps=every, positions=5),
    ]


class Recorder(Logger):
    """Keeps what it is given: (step, tags)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append((step, dict(metrics)))

    def of(self, prefix: str) -> dict[int | None, dict[str, float]]:
        """Tags that begin so, by step; the Trainer's own calls hold none."""
        chosen: dict[int | None, dict[str, float]] = {}
        for step, tags in self.calls:
            found = {tag: value for tag, value in tags.items() if tag.startswith(prefix)}
            if found:
                chosen.setdefault(step, {}).update(found)
        return chosen


class Save(L.Callback):
    """Saves one checkpoint at the end of a step."""

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():  # not after the next micro-batch
            trainer.save_checkpoint(self.path)


def fit(
    folder: Path,
    callbacks: list[Any],
    *,
    model: L.LightningModule | None = None,
    steps: int = 4,
    data: tuple[Any, Any] | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> L.LightningModule:
    """Trains and returns the module."""
    L.seed_everything(3, verbose=False)
    model = olmoe() if model is None else model
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "max_steps": steps,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    trainer = L.Trainer(**{**settings, **options}, callbacks=callbacks)
    train, val = loaders() if data is None else data
    torch.manual_seed(11)  # the draws of the fit, whatever building took
    trainer.fit(model, train, val, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return model


@contextmanager
def warned(match: str) -> Iterator[list[str]]:
    """Expects a warning, and gives all messages; the other warnings do not matter here."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(entry.message) for entry in caught]
    assert any(re.search(match, message) for message in messages), messages


def hooks(module: nn.Module) -> int:
    """The number of forward hooks in a module."""
    return sum(len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules())


def equal(one: nn.Module, other: nn.Module) -> bool:
    """Bitwise equality of all weights and buffers."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
