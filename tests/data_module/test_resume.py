"""Oracle of every resume: the batches of an uninterrupted run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_symopt.data import TokenShards
from lit_symopt.data.shards import write_shard
from lit_symopt.errors import DataError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*tensorboardX"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*suggested max number of worker"),
]

BATCHES = 6  # 13 windows in batches of 2: the seventh batch ends one epoch of the data and begins the next


class Recorder(pl.LightningModule):
    """Keeps the first token of every training window, which is the window's number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch["input_ids"][:, 0].tolist())
        return self.weight**2

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def shard(tmp_path: Path) -> str:
    path = tmp_path / "train.bin"
    write_shard(path, [token for window in range(13) for token in (window, 99)], vocab_size=100)
    return str(path)


def data(shard: str, **options: Any) -> TokenShards:
    options = {"val": shard, "sequence_length": 2, "batch_size": 2, "seed": 7, **options}
    return TokenShards(shard, vocab_size=100, **options)


def train(
    module: pl.LightningDataModule,
    folder: Path,
    *,
    ckpt_path: str | None = None,
    save: dict[str, Any] | None = None,
    model: Recorder | None = None,
    **options: Any,
) -> tuple[list[list[int]], str]:
    """Train on CPU; return the batches seen, and the last checkpoint."""
    checkpoint = ModelCheckpoint(folder, save_last=True, save_top_k=0, **(save or {"every_n_train_steps": 1}))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoint],
        **options,
    )
    model = model or Recorder()
    trainer.fit(model, datamodule=module, ckpt_path=ckpt_path)
    return model.seen, checkpoint.last_model_path


@pytest.mark.parametrize("stop", [3, BATCHES, BATCHES + 2, 2 * BATCHES])
@pytest.mark.parametrize("workers", [(0, 0), (2, 2), (0, 1)], ids=["no workers", "workers", "workers added"])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(
    shard: str, tmp_path: Path, stop: int, workers: tuple[int, int]
) -> None:
    whole, _ = train(data(shard), tmp_path / "whole", max_steps=16)
    first, checkpoint = train(data(shard, num_workers=workers[0]), tmp_path, max_steps=stop)
    rest, _ = train(data(shard, num_workers=workers[1]), tmp_path, ckpt_path=checkpoint, max_steps=16)
    assert first == whole[:stop]
    assert rest == whole[stop:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_at_the_end_of_a_shortened_epoch_goes_on_with_the_next_batch(
    shard: str, tmp_path: Path, workers: int
) -> None:
    module = data(shard, num_workers=workers)
    whole, _ = train(module, tmp_path, max_epochs=4, limit_train_batches=4)
    first, checkpoint = train(module, tmp_path, max_epochs=2, limit_train_batches=4)
    rest, _ = train(module, tmp_path, ckpt_path=checkpoint, max_epochs=4, limit_train_batches=4)
    assert len(whole) == 16
    assert first + rest == whole


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "save",
    [
        {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        {"every_n_epochs": 1, "save_on_train_epoch_end": False},  # at the end of validation
    ],
    ids=["epoch end", "validation end"],
)
def test_a_run_resumed_from_a_checkpoint_of_an_epoch_goes_on_with_the_next_batch(
    shard: str, tmp_path: Path, save: dict[str, Any], workers: int
) -> None:
    module = data(shard, num_workers=workers)
    whole, _ = train(module, tmp_path / "whole", save=save, max_epochs=3)
    first, checkpoint = train(module, tmp_path, save=save, max_epochs=1)
    rest, _ = train(module, tmp_path, save=save, ckpt_path=checkpoint, max_epochs=3)
    assert len(whole) == 3 * BATCHES
    assert first + rest == whole


class AsksTheTrainer(Recorder):
    """Makes the Trainer set the loader up before it restores a checkpoint (Lightning issue 20550)."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


@pytest.mark.parametrize("stop", [4, BATCHES])
def test_a_model_that_asks_for_the_number_of_steps_resumes_all_the_same(shard: str, tmp_path: Path, stop: int) -> None:
    whole, _ = train(data(shard), tmp_path / "whole", model=AsksTheTrainer(), max_steps=16)
    first, checkpoint = train(data(shard), tmp_path, model=AsksTheTrainer(), max_steps=stop)
    rest, _ = train(data(shard), tmp_path, model=AsksTheTrainer(), ckpt_path=checkpoint, max_steps=16)
    assert first + rest == whole


def test_the_order_does_not_depend_on_validation_epochs_or_accumulation(shard: str, tmp_path: Path) -> None:
    plain, _ = train(data(shard), tmp_path, max_steps=12)
    validated, _ = train(data(shard), tmp_path, max_steps=12, val_check_interval=2)
    shortened, _ = train(data(shard), tmp_path, max_steps=12, limit_train_batches=5)
    accumulated, _ = train(data(shard), tmp_path, max_steps=6, accumulate_grad_batches=2)
    reloaded, _ = train(data(shard), tmp_path, max_steps=12, reload_dataloaders_every_n_epochs=1)
    assert validated == shortened == accumulated == reloaded == plain


def test_every_window_comes_once_before_any_comes_again(shard: str, tmp_path: Path) -> None:
    seen, _ = train(data(shard), tmp_path, max_steps=13)
    stream = [window for batch in seen for window in batch]
    assert sorted(stream[:13]) == sorted(stream[13:]) == list(range(13))
    assert stream[:13] != stream[13:]


def test_a_second_fit_of_the_same_trainer_goes_on_in_the_order(shard: str, tmp_path: Path) -> None:
    whole, _ = train(data(shard), tmp_path, max_epochs=2)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    model, module = Recorder(), data(shard)
    trainer.fit(model, datamodule=module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, datamodule=module)
    assert model.seen == whole


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfit_batches_repeats_the_same_batches(shard: str, tmp_path: Path) -> None:
    seen, _ = train(data(shard), tmp_path, max_epochs=3, overfit_batches=2)
    assert seen == [[0, 1], [2, 3]] * 3


@pytest.mark.parametrize(("changed", "message"), [({"seed": 8}, "seed 7"), ({"sequence_length": 3}, "windows 13")])
def test_a_position_in_other_data_is_refused(shard: str, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    _, checkpoint = train(data(shard), tmp_path, max_steps=3)
    with pytest.raises(DataError, match=message):
        train(data(shard, **changed), tmp_path, ckpt_path=checkpoint, max_steps=6)


def test_a_checkpoint_holds_the_position_as_plain_integers(shard: str, tmp_path: Path) -> None:
    _, checkpoint = train(data(shard, num_workers=2), tmp_path, max_steps=3)
    state = torch.load(checkpoint, weights_only=True)
    assert state["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"consumed": 6, "seed": 7, "windows": 13}]


TWO_PROCESSES = """
import sys, torch
import lightning.pytorch as pl
from lit_symopt.data import TokenShards
from lit_symopt.sharding.transport import end_process_group

shard, out = sys.argv[1:]

class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
    def training_step(self, batch, batch_idx):
        with open(f"{out}.{self.global_rank}", "a") as file:
            print(*batch["input_ids"][:, 0].tolist(), file=file)
        return self.weight**2
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

checkpoint = pl.callbacks.ModelCheckpoint(out + "_checkpoints", save_last=True, every_n_train_steps=1, save_top_k=0)
for steps in (4, 9):
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=steps, logger=False, enable_progress_bar=False,
        callbacks=[checkpoint],
    )
    data = TokenShards(shard, vocab_size=100, sequence_length=2, batch_size=2, seed=7)
    trainer.fit(Recorder(), datamodule=data, ckpt_path=None if steps == 4 else checkpoint.last_model_path)
end_process_group()
"""


def test_two_processes_see_the_micro_batches_of_one_also_after_a_resume(shard: str, tmp_path: Path) -> None:
    """Oracle: one process that takes the micro-batches one after the other."""
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(TWO_PROCESSES)
    subprocess.run([sys.executable, str(script), shard, str(out)], check=True, timeout=300, capture_output=True)
    one, _ = train(data(shard), tmp_path, max_steps=18)
    for rank in range(2):
        lines = Path(f"{out}.{rank}").read_text().splitlines()
        assert [[int(word) for word in line.split()] for line in lines] == one[rank::2]
