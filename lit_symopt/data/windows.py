"""Token shards cut into windows of one length: what a training example is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_symopt.data.shards import TokenShard
from lit_symopt.errors import DataError


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Windows of `sequence_length` tokens over the concatenation of shards, side by side, without overlap.

    Window `i` is the tokens `[i·T, (i+1)·T)`, also across a shard's end; documents follow one another, divided by the
    separator token. The last `dropped` tokens, fewer than one window, are not used.

    Args:
        shards: The shards in order.
        sequence_length: T, at least 2 (a window of T tokens has T − 1 next tokens to predict).

    Raises:
        DataError: `sequence_length` is below 2, or the shards do not fill one window.

    Example:
        >>> import tempfile, pathlib
        >>> from lit_symopt.data.shards import TokenShard, write_shard
        >>> from lit_symopt.data.windows import TokenWindows
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.bin"
        >>> write_shard(path, range(10), vocab_size=10)
        >>> windows = TokenWindows([TokenShard.open(path)], sequence_length=4)
        >>> len(windows), windows.dropped, windows[1]["input_ids"].tolist()
        (2, 2, [4, 5, 6, 7])
    """

    def __init__(self, shards: Sequence[TokenShard], *, sequence_length: int) -> None:
        if sequence_length < 2:
            raise DataError(f"sequence_length must be at least 2, got {sequence_length}")
        self.shards = list(shards)
        self.sequence_length = sequence_length
        self._ends = np.array(list(accumulate(len(shard) for shard in self.shards)), dtype=np.int64)
        self.tokens = int(self._ends[-1]) if self.shards else 0
        self.dropped = self.tokens % sequence_length
        if self.tokens < sequence_length:
            raise DataError(
                f"{self.tokens:,} tokens are fewer than one window of {sequence_length} (sequence_length): "
                "give more text or a shorter sequence_length"
            )

    def __len__(self) -> int:
        """The number of windows."""
        return self.tokens // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Window `index` as `{"input_ids": LongTensor[T]}`."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start, end = index * self.sequence_length, (index + 1) * self.sequence_length
        ids = np.empty(self.sequence_length, dtype=np.int64)
        filled = 0
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while filled < self.sequence_length:
            first = int(self._ends[shard]) - len(self.shards[shard])  # the shard's first token in the concatenation
            piece = self.shards[shard].tokens[max(start - first, 0) : end - first]
            ids[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard += 1
        return {"input_ids": torch.from_numpy(ids)}
