"""A recipe small enough to run in seconds, and what a run leaves behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401  # its log handler keeps the stderr of its first import: not one that a test captures
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_symopt.data.shards import write_shard

RECIPE = """\
seed_everything: 7
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 20
  max_epochs: -1
  val_check_interval: 5
  check_val_every_n_epoch: null
  num_sanity_val_steps: -1
  log_every_n_steps: 1
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {save_dir: runs, name: tiny}
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {filename: "{step}", every_n_train_steps: 5, save_top_k: -1, save_last: true}
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
    - class_path: lit_symopt.callbacks.ProgressBar
    - class_path: lit_symopt.callbacks.RandomState
    - class_path: lit_symopt.callbacks.RunReport
data:
  class_path: lit_symopt.data.TokenShards
  init_args:
    train: train.bin
    val: val.bin
    vocab_size: 64
    sequence_length: 16
    batch_size: 4
model:
  class_path: lit_symopt.models.Qwen3
  init_args:
    vocab_size: ${data.init_args.vocab_size}
    hidden_size: 32
    intermediate_size: 64
    num_hidden_layers: 2
    num_attention_heads: 4
    num_key_value_heads: 2
    head_dim: 8
    max_position_embeddings: ${data.init_args.sequence_length}
    attention_dropout: 0.2
    symopt:
      schedule:
        kind: cosine
        warmup_steps: 2
        total_steps: 20
"""

# Ends its own process as `kill -9` would, in the middle of a run.
KILLER = """\
import os
import signal

from lightning import Callback


class KillAt(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def prepare(folder: Path) -> Path:
    """The recipe, its data (a random walk over tokens: something to learn) and the killer, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tokens, seed in (("train.bin", 1024, 0), ("val.bin", 256, 1)):
        steps = np.random.default_rng(seed).choice([1, 2, 5], tokens)
        write_shard(folder / name, (np.cumsum(steps) % 64).tolist(), vocab_size=64)
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "killer.py").write_text(KILLER)
    return folder


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`lit-symopt ARGUMENTS` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "lit_symopt", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def scalars(version: Path) -> dict[tuple[str, int], float]:
    """Everything logged to TensorBoard in a version folder, by tag and step; speed left out."""
    events = EventAccumulator(str(version), size_guidance={"scalars": 0}).Reload()
    return {
        (tag, event.step): event.value
        for tag in events.Tags()["scalars"]
        if "per_second" not in tag
        for event in events.Scalars(tag)
    }


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the recipe in it."""
    monkeypatch.chdir(prepare(tmp_path))
    return tmp_path
