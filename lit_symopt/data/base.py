"""What the data modules share: windows over token shards, the training order, and the loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from lit_symopt.data.order import TrainingLoader, TrainingOrder
from lit_symopt.data.shards import TokenShard
from lit_symopt.data.windows import TokenWindows
from lit_symopt.errors import DataError


class TokenDataModule(pl.LightningDataModule, ABC):
    """A data module over token shards.

    A subclass says where the shards are. `prepare_data` makes them (on one process a machine), `setup` opens them.
    """

    def __init__(self, *, sequence_length: int, batch_size: int, seed: int, num_workers: int) -> None:
        super().__init__()
        for name, value, least in (
            ("sequence_length", sequence_length, 2),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise DataError(f"{name} must be at least {least}, got {value}")
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self._train: TokenWindows | None = None
        self._val: TokenWindows | None = None

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of tokens of the vocabulary: as asked, and as it is once the data are prepared."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, for decoding; valid once the data are prepared."""

    @abstractmethod
    def shard_paths(self) -> tuple[list[Path], list[Path]]:
        """The shards of training and validation, once they exist; no validation shards: no validation."""

    def setup(self, stage: str | None = None) -> None:
        """Open the shards and check them; the same for every stage."""
        if self._train is not None:
            return
        train, val = self.shard_paths()
        self._train = self._open("training", train, windows_at_least=self.batch_size)
        self._val = self._open("validation", val, windows_at_least=1) if val else None

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches in the training order, from the Trainer's step on; see `lit_symopt.data.order`."""
        windows = self._opened(self._train)
        replicas, rank = self._processes()
        order = TrainingOrder(
            windows,
            batch_size=self.batch_size,
            seed=self.seed,
            num_replicas=replicas,
            rank=rank,
            batches_done=None if self.trainer is None else self._batches_done,
        )
        return TrainingLoader(windows, sampler=order, drop_last=True, **self._loader_options())

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[Any]:
        """Every validation window once, in order; the last batch may be smaller.

        With several processes Lightning deals the windows out, and repeats up to (processes − 1) of them so that all
        processes get the same number.
        """
        self._opened(self._train)
        return [] if self._val is None else DataLoader(self._val, shuffle=False, **self._loader_options())

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[Any]:
        """The validation windows: a corpus split in two has no third part."""
        return self.val_dataloader()

    def _processes(self) -> tuple[int, int]:
        """How many processes share the training data, and which one this is."""
        if self.trainer is not None:
            shares = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
            return shares["num_replicas"], shares["rank"]
        if dist.is_available() and dist.is_initialized():
            return dist.get_world_size(), dist.get_rank()
        return 1, 0

    def _batches_done(self) -> int:
        """The Trainer's count of training batches, over all epochs, fits and resumes."""
        assert self.trainer is not None
        return self.trainer.fit_loop.total_batch_idx + 1

    def _loader_options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
        }

    def _opened(self, windows: TokenWindows | None) -> TokenWindows:
        if windows is None:
            raise DataError(
                f"{type(self).__name__} is not set up: call prepare_data() and setup() first, as a Trainer does"
            )
        return windows

    def _open(self, part: str, paths: list[Path], *, windows_at_least: int) -> TokenWindows:
        """Open one part, and say how large it is and what is left over."""
        shards = [TokenShard.open(path, vocab_size=self.vocab_size) for path in paths]
        tokens = sum(len(shard) for shard in shards)
        if tokens // self.sequence_length < windows_at_least:
            raise DataError(
                f"the {part} data of {type(self).__name__} are too small: {tokens:,} tokens make "
                f"{tokens // self.sequence_length} windows of {self.sequence_length} (sequence_length), and at least "
                f"{windows_at_least} are needed"
                + (" for one batch (batch_size)" if windows_at_least > 1 else "")
                + ": give more text, a smaller batch_size or a shorter sequence_length"
            )
        windows = TokenWindows(shards, sequence_length=self.sequence_length)
        rank_zero_info(
            f"{part}: {tokens:,} tokens in {len(windows):,} windows of {self.sequence_length}"
            + (f"; the last {windows.dropped} tokens are left over" if windows.dropped else "")
        )
        return windows
