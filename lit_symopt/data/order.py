"""The training order: a function of seed and step only, and a loader that knows where it stands in it.

Training reads one endless stream of windows: a permutation of all of them, then another permutation, and so on. Step k
takes the next `batch_size × processes` windows of the stream, whatever has happened before: an epoch cut short, a
validation in between, a resume, another number of workers. Nothing is dropped: an epoch that the batch does not divide
ends inside a batch.

The permutation of epoch e sorts the raw output of the counter-based generator Philox-4x64 with key (seed, e): the raw
output, unlike `numpy.random.Generator.permutation`, is the same in every version of NumPy.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_symopt.errors import DataError


def permutation(size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of epoch `epoch`: int64 [size], each of 0..size-1 once.

    Example:
        >>> from lit_symopt.data.order import permutation
        >>> permutation(6, seed=1, epoch=0).tolist()
        [3, 5, 2, 0, 1, 4]
    """
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(size)
    return np.argsort(bits, kind="stable").astype(np.int64)


class TrainingOrder(DistributedSampler[Any]):
    """This process's part of the stream of training windows.

    Process r of W takes the windows `[(k·W + r)·b, (k·W + r + 1)·b)` of the stream for its k-th batch of b: what one
    process would take for its micro-batch k·W + r. The union over processes of the k-th batch therefore depends on
    W·b alone. A `DistributedSampler`, so that Lightning leaves it in place.

    Args:
        dataset: Anything with a length.
        batch_size: b, windows a process takes at once.
        seed: Decides the order, 0 ≤ seed < 2**64.
        num_replicas: W.
        rank: r.
        start: Windows of the stream already used, over all processes.
        batches_done: Says how many batches were used before, when a pass begins at the very start of the stream: a
            Trainer's counter, for a new loader in a run that goes on.

    Raises:
        DataError: The dataset is smaller than one global batch, or a number is out of range.
    """

    dataset: Any

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
        start: int = 0,
        batches_done: Callable[[], int] | None = None,
    ) -> None:
        if not 0 <= seed < 2**64:
            raise DataError(f"seed must be between 0 and 2**64 - 1, got {seed}")
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {batch_size}")
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed, drop_last=True)
        self.batch_size = batch_size
        self.global_batch = batch_size * num_replicas
        self.windows = len(self.dataset)
        self.consumed = start
        self.batches_done = batches_done
        self._epoch_order: tuple[int, NDArray[np.int64]] | None = None  # the last permutation used
        if self.windows < self.global_batch:
            raise DataError(
                f"{self.windows:,} windows are fewer than one batch of {self.global_batch:,} "
                f"(batch_size {batch_size} × {num_replicas} processes): give more text, a smaller batch_size or a "
                "shorter sequence_length"
            )

    def __len__(self) -> int:
        """Windows this process takes in one pass: whole batches only."""
        return self.windows // self.global_batch * self.batch_size

    def __iter__(self) -> Iterator[int]:
        """One pass of `len(self)` windows from `begin()` on; whoever uses them up moves `consumed`."""
        self.begin()
        first = self.consumed + self.rank * self.batch_size
        for batch in range(len(self) // self.batch_size):
            start = first + batch * self.global_batch
            for position in range(start, start + self.batch_size):
                yield self.window_at(position)

    def begin(self) -> int:
        """Where in the stream the next pass begins."""
        if self.consumed == 0 and self.batches_done is not None:
            self.consumed = self.batches_done() * self.global_batch
        return self.consumed

    def window_at(self, position: int) -> int:
        """The window at a position of the endless stream."""
        epoch, offset = divmod(position, self.windows)
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            self._epoch_order = epoch, permutation(self.windows, seed=self.seed, epoch=epoch)
        return int(self._epoch_order[1][offset])

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the position in the stream decides, not the Trainer's count of epochs."""

    def state_dict(self) -> dict[str, int]:
        """The position, with what it is a position in; equal on all processes."""
        return {"consumed": self.consumed, "seed": self.seed, "windows": self.windows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved position; the number of processes and the batch size may have changed.

        Raises:
            DataError: The position belongs to other data, another sequence length or another seed.
        """
        for key, own in (("seed", self.seed), ("windows", self.windows)):
            if state.get(key) != own:
                raise DataError(
                    f"the checkpoint's position in the training data is for {key} {state.get(key)}, but this run has "
                    f"{key} {own}: resume with the same data, sequence_length and seed, or start a new run from the "
                    "checkpoint's weights"
                )
        self.consumed = state["consumed"]


class TrainingLoader(DataLoader[dict[str, Tensor]]):
    """A `DataLoader` that saves and restores its position in the training order.

    A batch counts as used when the loop gets it, not when a worker fetches it ahead. One pass yields `len(loader)`
    batches from where the stream stands, so the next pass and a resumed run go on with the next batch.

    The position is one integer that all processes share. Why not torchdata's `StatefulDataLoader`: of 11 resumes tried
    with it and its own sampler (torchdata 0.11, Lightning 2.6.6), 3 saw the batches of the uninterrupted run. It failed
    at an epoch's end (Lightning issue 21938), after epochs shortened by `limit_train_batches`, and with another number
    of workers.
    """

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]  # torch names a private class
        """Yield `len(self)` batches and count them."""
        order = self.sampler
        if not isinstance(order, TrainingOrder):  # the Trainer put its own in place (overfit_batches)
            yield from super().__iter__()
            return
        start = order.begin()
        for number, batch in enumerate(super().__iter__(), 1):
            order.consumed = start + number * order.global_batch
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position: three integers."""
        return self.sampler.state_dict() if isinstance(self.sampler, TrainingOrder) else {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the position; see `TrainingOrder.load_state_dict`."""
        if isinstance(self.sampler, TrainingOrder):
            self.sampler.load_state_dict(state)
