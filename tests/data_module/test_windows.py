from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_symopt.data.shards import TokenShard, write_shard
from lit_symopt.data.windows import TokenWindows
from lit_symopt.errors import DataError


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5), length=st.integers(2, 40))
def test_windows_are_the_concatenated_tokens_in_rows(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], length: int
) -> None:
    """Oracle: concatenate, cut off the rest, reshape."""
    folder = tmp_path_factory.mktemp("windows")
    tokens = np.arange(sum(sizes))
    shards = []
    for number, piece in enumerate(np.split(tokens, np.cumsum(sizes)[:-1])):
        write_shard(folder / f"{number}.bin", piece, vocab_size=200)
        shards.append(TokenShard.open(folder / f"{number}.bin"))
    if len(tokens) < length:
        with pytest.raises(DataError, match=f"{len(tokens)} tokens are fewer than one window of {length}"):
            TokenWindows(shards, sequence_length=length)
        return
    windows = TokenWindows(shards, sequence_length=length)
    rows = tokens[: len(tokens) // length * length].reshape(-1, length)
    assert len(windows) == len(rows)
    assert windows.dropped == len(tokens) - rows.size
    for index, row in enumerate(rows):
        ids = windows[index]["input_ids"]
        assert ids.dtype == torch.int64
        np.testing.assert_array_equal(ids.numpy(), row)
    for beyond in (-1, len(rows)):
        with pytest.raises(IndexError):
            windows[beyond]


def test_a_window_without_a_next_token_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", [1, 2], vocab_size=3)
    with pytest.raises(DataError, match="at least 2, got 1"):
        TokenWindows([TokenShard.open(tmp_path / "a.bin")], sequence_length=1)
