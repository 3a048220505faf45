"""RandomState: what it captures it restores, and training draws do not depend on what happens between steps."""

from __future__ import annotations

import io
import random
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lit_symopt.callbacks import RandomState

state = sys.modules[RandomState.__module__]


def draw() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), float(np.random.normal()), torch.rand(()).item()  # noqa: NPY002


def test_a_restored_state_draws_the_same_again_also_after_a_trip_through_a_file() -> None:
    draw()  # leaves half a pair of normals cached in Python's and numpy's generators
    captured = state.capture()
    file = io.BytesIO()
    torch.save(captured, file)
    first = [draw() for _ in range(3)]
    file.seek(0)
    state.restore(torch.load(file, weights_only=True))
    assert [draw() for _ in range(3)] == first


class Dropping(L.LightningModule):
    """A model whose every step draws, and whose validation draws too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.draws: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.draws.append(torch.rand(()).item())
        loss: Tensor = torch.nn.functional.dropout(self.layer(batch), 0.5).square().mean()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        torch.rand(batch_idx + 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, **options: Any) -> Dropping:
    L.seed_everything(3, verbose=False)
    model = Dropping()
    data: DataLoader[Tensor] = DataLoader(torch.ones(8, 4), batch_size=1)  # type: ignore[arg-type]
    ckpt_path = options.pop("ckpt_path", None)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "callbacks": [RandomState()],
        "max_epochs": 1,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    trainer = L.Trainer(**{**settings, **options})
    trainer.fit(model, data, data, ckpt_path=ckpt_path)
    return model


def test_weights_do_not_depend_on_how_often_a_run_is_validated(tmp_path: Path) -> None:
    rare = fit(tmp_path, limit_val_batches=0)
    often = fit(tmp_path, val_check_interval=2)
    assert rare.draws == often.draws
    assert torch.equal(rare.layer.weight, often.layer.weight)


# The plain DataLoader does not resume; here all of its batches are equal.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(tmp_path: Path) -> None:
    whole = fit(tmp_path, val_check_interval=2)
    saving = ModelCheckpoint(dirpath=tmp_path / "saved", filename="{step}", every_n_train_steps=4, save_top_k=-1)
    fit(tmp_path, val_check_interval=2, callbacks=[RandomState(), saving], enable_checkpointing=True)
    moved = tmp_path / "moved.ckpt"
    (tmp_path / "saved" / "step=4.ckpt").rename(moved)
    shutil.rmtree(tmp_path / "saved")  # Lightning warns of a folder that is not empty
    both = [RandomState(), saving]
    options = {"val_check_interval": 2, "enable_checkpointing": True}
    second = fit(tmp_path, callbacks=both, ckpt_path=moved, **options)
    assert len(second.draws) == 4
    assert second.draws == whole.draws[4:]
    assert torch.equal(second.layer.weight, whole.layer.weight)


def test_a_checkpoint_of_another_number_of_processes_or_of_none_says_that_draws_differ() -> None:
    callback, trainer = RandomState(), Mock(world_size=1, global_rank=0)
    with pytest.warns(UserWarning, match=r"random state of 2 process\(es\) and this run has 1"):
        callback.on_load_checkpoint(trainer, Mock(), {"random_state": [{}, {}]})
    with pytest.warns(UserWarning, match="holds no random state"):
        callback.on_load_checkpoint(trainer, Mock(), {})
