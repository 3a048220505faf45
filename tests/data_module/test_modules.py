"""The three data modules."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_symopt.data import StdlibCorpus, TextCorpus, TokenShards
from lit_symopt.data.base import TokenDataModule
from lit_symopt.data.shards import TokenShard, write_shard
from lit_symopt.data.tokenizer import train_tokenizer
from lit_symopt.errors import DataError

LINES = "".join(f"line {number}: to be or not to be\n" for number in range(400))


def opened(data: TokenDataModule) -> TokenDataModule:
    data.prepare_data()
    data.setup("fit")
    return data


def read(paths: list[Path]) -> list[int]:
    """All tokens of some shards."""
    return [token for path in paths for token in TokenShard.open(path).tokens.tolist()]


def text(data: TokenDataModule, loader: str) -> str:
    """Everything a loader of one pass yields, decoded."""
    batches = [batch["input_ids"].flatten() for batch in getattr(data, loader)()]
    return data.tokenizer.decode(torch.cat(batches).tolist(), skip_special_tokens=False)


def small(train: list[str] | str, **options: Any) -> TextCorpus:
    return TextCorpus(train, **{"vocab_size": 260, "sequence_length": 8, "batch_size": 2, **options})


def test_batches_are_long_tensors_of_batch_size_by_sequence_length() -> None:
    data = opened(StdlibCorpus(vocab_size=300, sequence_length=32, batch_size=4, max_files=20))
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        assert list(batch) == ["input_ids"]
        assert batch["input_ids"].shape == (4, 32)
        assert batch["input_ids"].dtype == torch.int64
        assert batch["input_ids"].max() < data.vocab_size


def test_the_vocabulary_is_the_one_asked_for_and_then_the_one_the_text_gave(tmp_path: Path) -> None:
    assert StdlibCorpus(vocab_size=300, max_files=20).vocab_size == 300
    assert opened(StdlibCorpus(vocab_size=300, max_files=20, batch_size=1)).vocab_size == 300
    (tmp_path / "poor.txt").write_text(("a" * 64 + "\n") * 100)  # soon one line is one token
    data = small(str(tmp_path / "poor.txt"), vocab_size=4096, val_fraction=0.0)
    assert data.vocab_size == 4096
    assert opened(data).vocab_size == data.tokenizer.get_vocab_size() < 300


def test_every_validation_window_comes_once_in_order(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(LINES)
    (tmp_path / "val.txt").write_text(LINES.upper())
    data = opened(small(str(tmp_path / "train.txt"), val=str(tmp_path / "val.txt"), batch_size=7))
    seen = text(data, "val_dataloader")
    assert (LINES.upper() + "<|endoftext|>").startswith(seen)
    assert len(LINES.upper()) - len(seen) < 8 * 30
    assert text(data, "val_dataloader") == seen
    tokens = len(read(data.shard_paths()[1]))
    assert sum(len(batch["input_ids"]) for batch in data.val_dataloader()) == tokens // 8


def test_text_is_split_after_a_line_near_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LINES)
    data = opened(small([str(tmp_path / "a.txt")], val_fraction=0.1))
    held_out = text(data, "val_dataloader")
    assert held_out.startswith("line 36")
    assert held_out[:-20] in LINES


def test_rows_are_split_by_a_hash_and_none_is_lost(tmp_path: Path) -> None:
    rows = [f"document {number} says nothing" for number in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": row}) for row in rows) + "\n\n")
    options: dict[str, Any] = {"text_key": "body", "val_fraction": 0.3, "sequence_length": 2, "batch_size": 1}
    data = opened(small(str(tmp_path / "*.jsonl"), **options))
    train, val = data.shard_paths()
    parts = [data.tokenizer.decode(read(paths), skip_special_tokens=False) for paths in (train, val)]
    documents = [set(part.split("<|endoftext|>")[:-1]) for part in parts]
    assert documents[0] | documents[1] == set(rows)
    assert not documents[0] & documents[1]
    assert 30 <= len(documents[1]) <= 90


def test_parquet_jsonl_and_text_give_the_same_tokens(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pytest.importorskip("datasets")
    (tmp_path / "a.txt").write_text(LINES)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": LINES, "other": 1}))
    pyarrow.parquet.write_table(pa.table({"other": [1], "text": [LINES]}), tmp_path / "a.parquet")
    tokens = [
        read(opened(small(str(tmp_path / name), val_fraction=0.0)).shard_paths()[0])
        for name in ("a.txt", "a.jsonl", "a.parquet")
    ]
    assert tokens[0] == tokens[1] == tokens[2]


def test_parquet_without_its_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install lit-symopt\[data\]"):
        small(str(tmp_path / "a.parquet")).prepare_data()


def test_a_changed_file_or_setting_is_built_anew_and_the_same_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(LINES)
    first = small(str(path)).folder
    assert small(str(path)).folder == first
    assert small(str(path), val_fraction=0.2).folder != first
    assert small(str(path), vocab_size=261).folder != first
    assert small(str(path), sequence_length=16, seed=3).folder == first
    path.write_text(LINES + "more\n")
    assert small(str(path)).folder != first


def test_a_given_tokenizer_is_used(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LINES)
    given = train_tokenizer(["something else"] * 10, vocab_size=270)
    given.save(str(tmp_path / "tokenizer.json"))
    data = small(str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "tokenizer.json"))
    assert data.vocab_size == given.get_vocab_size()
    assert opened(data).tokenizer.to_str() == given.to_str()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves its reader open
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b" \n\n", r"a\.txt is empty"),
        ("a.txt", b"caf\xe9", r"cannot read .*a\.txt: 'utf-8'"),
        ("a.jsonl", b"\n", r"a\.jsonl is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', r"a\.jsonl, line 2 is not JSON"),
        (
            "a.jsonl",
            b'{"body": "a"}\n',
            r"line 1: no text under 'text', but the keys 'body'. Name the key with text_key=",
        ),
        ("a.jsonl", b'{"text": 5}\n', "line 1: no text under 'text'"),
        ("a.jsonl", b"[1]\n", "line 1: no text under 'text', but list"),
        ("a.jsonl", b'{"text": "\xe9"}\n', r"cannot read .*a\.jsonl"),
        ("a.parquet", b"PAR1 not parquet", r"cannot read .*a\.parquet as parquet"),
        ("a.csv", b"a,b", r"a\.csv is of no known kind \(\.csv\): known are \.txt, \.jsonl and \.parquet"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_leaves_no_cache(
    tmp_path: Path, cache_home: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / "good.txt").write_text(LINES)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        small([str(tmp_path / "good.txt"), str(tmp_path / name)]).prepare_data()
    assert [path.name for path in cache_home.glob("lit-symopt/*") if path.suffix != ".lock"] == []


def test_paths_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    for pattern in ("none.txt", "*.txt"):
        with pytest.raises(DataError, match=r"no training text file .*txt"):
            small(str(tmp_path / pattern)).prepare_data()
    with pytest.raises(DataError, match="is a folder"):
        small(str(tmp_path)).prepare_data()
    with pytest.raises(DataError, match="no training text file given"):
        small([]).prepare_data()
    with pytest.raises(DataError, match="no token shard"):
        TokenShards(str(tmp_path / "*.bin"), vocab_size=5).setup()


def test_text_smaller_than_a_batch_is_an_error_with_the_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 20)
    data = small(str(tmp_path / "a.txt"), vocab_size=257, batch_size=64)
    with pytest.raises(DataError, match=r"\d+ tokens make \d+ windows of 8 .*at least 64 are needed for one batch"):
        opened(data)
    with pytest.raises(DataError, match=r"validation data .* too small"):
        opened(small(str(tmp_path / "a.txt"), vocab_size=257, val_fraction=0.001))


def test_shards_are_read_in_the_order_given(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("b.bin", "a.bin")]
    for number, path in enumerate(paths):
        write_shard(path, [number] * 10, vocab_size=2)
    data = TokenShards(paths, val=paths, vocab_size=2, sequence_length=5, batch_size=4)
    data.setup()
    assert next(iter(data.val_dataloader()))["input_ids"][:, 0].tolist() == [0, 0, 1, 1]
    with pytest.raises(DataError, match="without a tokenizer"):
        _ = data.tokenizer


def test_shards_without_validation_have_no_validation_loader(make_shard: Callable[..., Path]) -> None:
    data = TokenShards(str(make_shard()), vocab_size=100, sequence_length=5, batch_size=4)
    data.setup()
    assert data.val_dataloader() == []


def test_a_shard_with_ids_beyond_the_vocabulary_is_refused(make_shard: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="beyond the vocabulary of 50 tokens"):
        TokenShards(str(make_shard(vocab_size=100)), vocab_size=50).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 1}, "sequence_length must be at least 2, got 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"vocab_size": 100}, "vocab_size must be at least 257"),
        ({"val_fraction": 1.0}, r"val_fraction must be in \[0, 1\), got 1.0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        small("a.txt", **options)


def test_a_loader_before_the_set_up_says_what_is_missing() -> None:
    with pytest.raises(DataError, match=r"call prepare_data\(\) and setup\(\) first"):
        StdlibCorpus().train_dataloader()


def test_importing_the_package_and_the_commands_is_light() -> None:
    script = (
        "import sys, lit_symopt.data.commands, lit_symopt.data.shards\n"
        "print([name for name in ('lightning', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
