"""The published shard format. Oracle: the layout of the header, read and written here by `struct`."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_symopt.data.shards import MAX_TOKENS, ShardWriter, TokenShard, write_shard
from lit_symopt.errors import DataError


def header(*words: int) -> bytes:
    return struct.pack("<256i", *words, *[0] * (256 - len(words)))


@pytest.mark.parametrize(("vocab_size", "width", "code"), [(65536, 2, "H"), (65537, 4, "I"), (151936, 4, "I")])
def test_the_file_is_header_then_tokens(tmp_path: Path, vocab_size: int, width: int, code: str) -> None:
    tokens = [0, 1, 500, vocab_size - 1]
    write_shard(tmp_path / "a.bin", tokens, vocab_size=vocab_size)
    assert (tmp_path / "a.bin").read_bytes() == header(20260317, 2, 4, width) + struct.pack(f"<4{code}", *tokens)


@pytest.mark.parametrize(("width", "code"), [(2, "H"), (4, "I")])
def test_a_shard_written_by_another_program_is_read(tmp_path: Path, width: int, code: str) -> None:
    (tmp_path / "a.bin").write_bytes(header(20260317, 2, 3, width) + struct.pack(f"<3{code}", 7, 0, 65535))
    shard = TokenShard.open(tmp_path / "a.bin", vocab_size=65536)
    assert shard.tokens.tolist() == [7, 0, 65535]
    assert (len(shard), shard.bytes_per_token, shard.largest_id()) == (3, width, 65535)


@given(
    pieces=st.lists(st.lists(st.integers(0, 299), max_size=20), max_size=5), vocab_size=st.sampled_from([300, 10**5])
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[list[int]], vocab_size: int
) -> None:
    path = tmp_path_factory.mktemp("shard") / "a.bin"
    whole = [token for piece in pieces for token in piece]
    if not whole:
        with pytest.raises(DataError, match="no tokens"), ShardWriter(path, vocab_size=vocab_size):
            pass
        assert list(path.parent.iterdir()) == []
        return
    with ShardWriter(path, vocab_size=vocab_size) as writer:
        for piece in pieces:
            writer.append(piece)
    assert TokenShard.open(path, vocab_size=vocab_size).tokens.tolist() == whole


def test_a_shard_cannot_be_written_through_and_pickles_as_its_path(make_shard: Callable[..., Path]) -> None:
    shard = TokenShard.open(make_shard(tokens=100_000))
    with pytest.raises(ValueError, match="read-only"):
        shard.tokens[0] = 1
    pickled = pickle.dumps(shard)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).tokens, shard.tokens)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, shorter than its 1024-byte header"),
        (header(20260317, 2, 2, 2)[:-1], "shorter than its 1024-byte header"),
        (header(20240520, 2, 2, 2) + bytes(4), "magic number 20240520, expected 20260317"),
        (header(20260317, 1, 2, 2) + bytes(4), "version 1 of the shard format; only version 2"),
        (header(20260317, 2, 2, 3) + bytes(6), "3 bytes per token; 2 or 4"),
        (header(20260317, 2, 0, 2), "holds 0 tokens"),
        (header(20260317, 2, -5, 2), "holds -5 tokens"),
        (
            header(20260317, 2, 2, 2) + bytes(3),
            "1,027 bytes, but its header says 2 tokens of 2 bytes, which take 1,028",
        ),
        (header(20260317, 2, 2, 2) + bytes(5), "1,029 bytes, but its header says 2 tokens"),
        (header(20260317, 2, 2, 4) + bytes(4), "cut off or damaged"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        TokenShard.open(path)
    assert str(path) in str(caught.value)


def test_a_missing_shard_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.bin", tmp_path):
        with pytest.raises(DataError, match="cannot read the token shard"):
            TokenShard.open(path)


def test_a_token_beyond_the_vocabulary_is_refused_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_symopt.data.shards._TOKENS_AT_ONCE", 10)
    for place in (0, 9, 10, 34):
        tokens = np.zeros(35, dtype=np.int64)
        tokens[place] = 300
        write_shard(tmp_path / f"{place}.bin", tokens, vocab_size=301)
        TokenShard.open(tmp_path / f"{place}.bin", vocab_size=301)
        with pytest.raises(DataError, match=r"token id 300, beyond the vocabulary of 300 .*at least 301"):
            TokenShard.open(tmp_path / f"{place}.bin", vocab_size=300)


def test_a_shard_replaced_by_another_is_checked_again(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, [1, 2], vocab_size=10)
    assert TokenShard.open(path).largest_id() == 2
    write_shard(path, [1, 2, 9], vocab_size=10)
    assert TokenShard.open(path).largest_id() == 9


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 10], "token id 10 is outside"),
        ([-1], "token id -1 is outside"),
        ([0.5], "dtype float64"),
        ([], "no tokens"),
    ],
)
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(
    tmp_path: Path, tokens: list[Any], message: str
) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, [1, 2, 3], vocab_size=10)
    with pytest.raises(DataError, match=message):
        write_shard(path, tokens, vocab_size=10)
    assert TokenShard.open(path).tokens.tolist() == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]


def test_more_tokens_than_the_header_can_count_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.bin", vocab_size=10) as writer:
        writer.append([1])
        writer.tokens = MAX_TOKENS
        with pytest.raises(DataError, match="more than 2,147,483,647 tokens"):
            writer.append([1])
        writer.tokens = 1
    assert len(TokenShard.open(tmp_path / "a.bin")) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot write .*missing/a\.bin"):
        write_shard(tmp_path / "missing" / "a.bin", [1], vocab_size=10)
