"""The standard library's text and the tokenizer."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_symopt.data import StdlibCorpus
from lit_symopt.data.corpus import read_source, split_files, stdlib_files, stdlib_root
from lit_symopt.data.tokenizer import END_OF_TEXT, encode, load_tokenizer, train_tokenizer
from lit_symopt.errors import DataError


def test_the_corpus_is_the_library_without_tests_and_installed_packages() -> None:
    files = stdlib_files()
    names = [path.relative_to(sysconfig.get_path("stdlib")).as_posix() for path in files]
    assert {"argparse.py", "json/decoder.py", "unittest/mock.py"} <= set(names)
    assert names == sorted(names)
    assert not [name for name in names if {"test", "tests", "idlelib", "site-packages"} & set(name.split("/")[:-1])]
    assert sum(path.stat().st_size for path in files) > 8_000_000


def test_every_file_of_the_corpus_can_be_read() -> None:
    assert all(isinstance(read_source(path), str) for path in stdlib_files(max_files=100))


def test_a_source_is_read_in_the_encoding_it_declares(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"))
    assert "é" in read_source(tmp_path / "a.py")
    (tmp_path / "b.py").write_bytes(b"name = '\xe9'\n")
    with pytest.raises(DataError, match=r"cannot read .*b\.py"):
        read_source(tmp_path / "b.py")


def test_a_python_without_source_files_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="TextCorpus"):
        stdlib_files(root=tmp_path)


@given(kept=st.sets(st.integers(0, 199), min_size=20))
def test_a_file_stays_on_its_side_of_the_split_whatever_the_others(kept: set[int]) -> None:
    root = Path("/corpus")
    everything = [root / f"file_{number}.py" for number in range(200)]
    _, held_out = split_files(everything, root=root, fraction=0.3)
    files = [everything[number] for number in sorted(kept)]
    train, some = split_files(files, root=root, fraction=0.3)
    assert sorted(train + some) == sorted(files)
    assert train
    assert set(some) <= set(held_out) or len(some) == 1
    assert set(train) & set(held_out) == set() or not set(files) - set(held_out)


def test_about_a_twentieth_of_the_files_is_held_out_and_at_least_one() -> None:
    files = stdlib_files()
    _, held_out = split_files(files, root=stdlib_root(), fraction=0.05)
    assert 0.02 < len(held_out) / len(files) < 0.08
    assert all(len(part) == 1 for part in split_files(files[:2], root=stdlib_root(), fraction=0.0))
    with pytest.raises(DataError, match="at least 2"):
        split_files(files[:1], root=stdlib_root(), fraction=0.5)


TEXTS = ["def f(x):\n    return x\n", "class A:\n    def f(self):\n        pass\n"] * 5
TOKENIZER = train_tokenizer(TEXTS, vocab_size=300)


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), max_size=4))
def test_any_text_survives_encoding_and_decoding(texts: list[str]) -> None:
    texts = [*texts, f"a {END_OF_TEXT} inside"]
    encoded = list(encode(TOKENIZER, texts))
    assert [TOKENIZER.decode(ids[:-1].tolist()) for ids in encoded] == texts
    assert all(ids[-1] == 0 and 0 not in ids[:-1] for ids in encoded)


def test_a_long_document_is_encoded_in_pieces_and_ends_once(monkeypatch: pytest.MonkeyPatch) -> None:
    document = "def f(x):\n    return x\n" * 50 + "x" * 500
    monkeypatch.setattr("lit_symopt.data.tokenizer._CHARACTERS_AT_ONCE", 100)
    ids = [token for chunk in encode(TOKENIZER, [document, "y"]) for token in chunk.tolist()]
    assert ids.count(0) == 2
    assert TOKENIZER.decode(ids[: ids.index(0)]) == document


def test_the_same_text_trains_the_same_tokenizer() -> None:
    assert train_tokenizer(TEXTS, vocab_size=300).to_str() == train_tokenizer(TEXTS, vocab_size=300).to_str()


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(DataError, match="at least 257"):
        train_tokenizer(TEXTS, vocab_size=256)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match=r"a\.json is not a tokenizer"):
        load_tokenizer(tmp_path / "a.json")
    (tmp_path / "b.json").write_text(TOKENIZER.to_str().replace(END_OF_TEXT, "<|end|>"))
    with pytest.raises(DataError, match=r"has no token <\|endoftext\|>"):
        load_tokenizer(tmp_path / "b.json")


def test_the_whole_corpus_fills_the_default_vocabulary() -> None:
    data = StdlibCorpus()
    data.prepare_data()
    data.setup()
    assert data.vocab_size == data.tokenizer.get_vocab_size() == 4096
    assert len(data.train_dataloader()) > 1000
    text = data.tokenizer.decode(next(iter(data.val_dataloader()))["input_ids"].flatten().tolist())
    assert text in "".join(
        read_source(path) for path in split_files(stdlib_files(), root=stdlib_root(), fraction=0.05)[1]
    )
