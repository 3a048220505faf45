"""`lit-symopt data convert` and `lit-symopt data info`, as functions."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_symopt.data import TokenShards
from lit_symopt.data.commands import convert, info
from lit_symopt.data.shards import TokenShard
from lit_symopt.data.tokenizer import load_tokenizer
from lit_symopt.errors import DataError

TEXT = "to be or not to be, that is the question\n" * 60


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT.upper())
    return str(tmp_path / "[ab].txt")


def test_converted_text_comes_back_through_the_shards(source: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert([source], str(out), vocab_size=300, val_source=[str(tmp_path / "b.txt")], shard_tokens=100)
    shards = [TokenShard.open(path, vocab_size=300) for path in sorted(out.glob("train_*.bin"))]
    assert [len(shard) for shard in shards[:-1]] == [100] * (len(shards) - 1)
    assert len(shards) > 2
    tokens = [token for shard in shards for token in shard.tokens.tolist()]
    decoded = load_tokenizer(out / "tokenizer.json").decode(tokens, skip_special_tokens=False)
    assert decoded == f"{TEXT}<|endoftext|>{TEXT.upper()}<|endoftext|>"
    data = TokenShards(str(out / "train_*.bin"), val=str(out / "val_*.bin"), vocab_size=300, sequence_length=16)
    data.setup()
    assert next(iter(data.train_dataloader()))["input_ids"].shape == (8, 16)


def test_a_tokenizer_given_gives_the_tokens_it_gave_before(source: str, tmp_path: Path) -> None:
    convert([source], str(tmp_path / "one"), vocab_size=300)
    convert([source], str(tmp_path / "two"), tokenizer=str(tmp_path / "one" / "tokenizer.json"))
    assert [
        (tmp_path / "two" / path.name).read_bytes() == path.read_bytes() for path in (tmp_path / "one").glob("*.bin")
    ] == [True]


def test_info_prints_the_header(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert([source], str(tmp_path / "out"), vocab_size=300)
    [path] = (tmp_path / "out").glob("*.bin")
    shard = TokenShard.open(path)
    assert capsys.readouterr().out == f"{path}: {len(shard):,} tokens\n"
    info(str(path))
    printed = capsys.readouterr().out
    for part in (str(path), "20260317, 2", f"{len(shard):,}", "bytes per token 2", f"{shard.largest_id():,}"):
        assert part in printed


def test_a_failed_conversion_leaves_nothing(source: str, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    before = sorted(tmp_path.iterdir())
    for options in (
        {"source": [source, str(tmp_path / "bad.txt")]},
        {"source": [source], "val_source": [str(tmp_path / "bad.txt")]},
        {"source": [source], "vocab_size": 10},
        {"source": [source], "shard_tokens": 0},
        {"source": [source], "tokenizer": str(tmp_path / "none.json")},
        {"source": [str(tmp_path / "none.txt")]},
    ):
        with pytest.raises(DataError):
            convert(output=str(tmp_path / "out"), **options)
        assert sorted(tmp_path.iterdir()) == before


def test_an_output_that_exists_or_cannot_be_made_is_refused(source: str, tmp_path: Path) -> None:
    for output, message in (
        (tmp_path, "exists"),
        (tmp_path / "a.txt", "exists"),
        (tmp_path / "a.txt" / "out", "cannot write"),
    ):
        with pytest.raises(DataError, match=message):
            convert([source], str(output), vocab_size=300)


def test_info_refuses_what_is_no_shard(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match="no token shard"):
        info(str(tmp_path / "a.bin"))
