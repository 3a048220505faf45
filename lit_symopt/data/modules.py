"""The data modules: the standard library's source, text of your own, and ready token shards.

All yield batches `{"input_ids": LongTensor[B, T]}` with B = `batch_size` windows a process and T = `sequence_length`
tokens. The labels of next-token prediction are the inputs: the model shifts them.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lit_symopt.data.base import TokenDataModule
from lit_symopt.data.cache import build_once
from lit_symopt.data.corpus import read_source, split_files, stdlib_files, stdlib_root
from lit_symopt.data.prepare import Part, write_corpus
from lit_symopt.data.sources import all_documents, expand
from lit_symopt.data.tokenizer import MIN_VOCAB_SIZE, load_tokenizer
from lit_symopt.errors import DataError

_FORMAT = 1  # of the cache: raise it when the same text gives other tokens or other files


class CachedCorpus(TokenDataModule):
    """A corpus of text that is turned into tokens once and kept in the cache."""

    def __init__(self, *, vocab_size: int, cache_dir: str | None, **options: Any) -> None:
        super().__init__(**options)
        if vocab_size < MIN_VOCAB_SIZE:
            raise DataError(
                f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and a separator), got {vocab_size}"
            )
        self.cache_dir = cache_dir
        self._requested_vocab_size = vocab_size
        self._folder: Path | None = None

    @abstractmethod
    def build(self) -> Path:
        """Return the cached folder, after building it if it does not exist."""

    @property
    def folder(self) -> Path:
        """The cache folder with `tokenizer.json`, `train.bin`, `val.bin` and `meta.json`; built on first use."""
        if self._folder is None:
            self._folder = self.build()
        return self._folder

    @property
    def vocab_size(self) -> int:
        """The requested size, and the tokenizer's own (never larger) once the data are prepared."""
        return self._requested_vocab_size if self._folder is None else int(self._meta()["vocab_size"])

    @property
    def tokenizer(self) -> Tokenizer:
        """The corpus's tokenizer."""
        return load_tokenizer(self.folder / "tokenizer.json")

    def prepare_data(self) -> None:
        """Build the cache if it is not there."""
        _ = self.folder

    def shard_paths(self) -> tuple[list[Path], list[Path]]:
        """`train.bin`, and `val.bin` where the corpus has a validation part."""
        train, val = self.folder / "train.bin", self.folder / "val.bin"
        return [train], [val] if "val" in self._meta()["tokens"] else []

    def _meta(self) -> dict[str, Any]:
        path = self.folder / "meta.json"
        try:
            meta: dict[str, Any] = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise DataError(f"the cache is damaged ({path}: {error}): remove {self.folder} and run again") from error
        return meta


class StdlibCorpus(CachedCorpus):
    """The source text of the Python standard library: training text on every machine, without a download.

    CPython 3.11 gives 10.6 MB and, with a vocabulary of 4,096, 3.07 million tokens. About 5 % of the files, chosen by
    a hash of their names, are the validation set. Another Python version is another corpus: compare runs of one.

    Args:
        vocab_size: Tokens of the byte-level BPE trained on the training files, at least 257.
        sequence_length: Tokens of one window.
        batch_size: Windows a process takes at once.
        seed: Decides the training order.
        cache_dir: Where the tokens are kept; by default `${XDG_CACHE_HOME:-~/.cache}/lit-symopt`.
        num_workers: Worker processes of each loader; memory-mapped windows rarely need any.
        max_files: Use only this many files (a small corpus for trials and tests).

    Example:
        >>> from lit_symopt.data import StdlibCorpus
        >>> data = StdlibCorpus(vocab_size=512, sequence_length=64, batch_size=4, max_files=40)
        >>> data.prepare_data()
        >>> data.setup()
        >>> next(iter(data.train_dataloader()))["input_ids"].shape
        torch.Size([4, 64])
    """

    VAL_FRACTION = 0.05

    def __init__(
        self,
        *,
        vocab_size: int = 4096,
        sequence_length: int = 256,
        batch_size: int = 8,
        seed: int = 1234,
        cache_dir: str | None = None,
        num_workers: int = 0,
        max_files: int | None = None,
    ) -> None:
        super().__init__(
            vocab_size=vocab_size,
            cache_dir=cache_dir,
            sequence_length=sequence_length,
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        self.max_files = max_files

    def build(self) -> Path:
        """Turn the standard library into tokens, once for each content and setting."""
        files = stdlib_files(max_files=self.max_files)
        root = stdlib_root()
        texts = {path: read_source(path) for path in files}
        train, val = split_files(files, root=root, fraction=self.VAL_FRACTION)
        key = hashlib.sha256(f"{_FORMAT} {self._requested_vocab_size} {self.VAL_FRACTION}".encode())
        for path, text in texts.items():
            key.update(f"{path.relative_to(root).as_posix()}\0{len(text)}\0{text}".encode("utf-8", "surrogatepass"))
        parts = [
            Part(name=name, documents=partial(map, texts.__getitem__, part), total=len(part))
            for name, part in (("train", train), ("val", val))
        ]
        fill = partial(write_corpus, parts=parts, title="stdlib", vocab_size=self._requested_vocab_size)
        return build_once(f"stdlib-{key.hexdigest()[:16]}", fill, cache_dir=self.cache_dir)


class TextCorpus(CachedCorpus):
    r"""Text of your own: `.txt`, `.jsonl` or `.parquet` files.

    Args:
        train: Paths or glob patterns of the training text.
        val: Paths or patterns of the validation text. None: `val_fraction` of the training text is held out, rows by a
            hash of file name and row number, plain text from the end of each file.
        text_key: The key or column that holds the text in JSON lines and parquet.
        val_fraction: The share to hold out without `val`, in [0, 1); 0: no validation.
        tokenizer: A `tokenizer.json` with a token `<|endoftext|>`; by default a byte-level BPE is trained on the
            training text.
        vocab_size: Tokens of that BPE, at least 257; with `tokenizer` its own size counts.
        sequence_length: Tokens of one window.
        batch_size: Windows a process takes at once.
        seed: Decides the training order.
        cache_dir: Where the tokens are kept; by default `${XDG_CACHE_HOME:-~/.cache}/lit-symopt`. They are made anew
            when the path, size or modification time of a file changes.
        num_workers: Worker processes of each loader.

    Raises:
        DataError: A file is missing, empty, unreadable or of no known kind. Parquet needs `pip install
            lit-symopt[data]`.

    Example:
        >>> import pathlib, tempfile
        >>> from lit_symopt.data import TextCorpus
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.txt").write_text("to be or not to be\n" * 100)
        >>> data = TextCorpus(str(folder / "*.txt"), vocab_size=257, sequence_length=8, batch_size=2)
        >>> data.prepare_data()
        >>> data.setup()
        >>> next(iter(data.val_dataloader()))["input_ids"].shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        train: list[str] | str,
        *,
        val: list[str] | str | None = None,
        text_key: str = "text",
        val_fraction: float = 0.05,
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        sequence_length: int = 256,
        batch_size: int = 8,
        seed: int = 1234,
        cache_dir: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            vocab_size=vocab_size,
            cache_dir=cache_dir,
            sequence_length=sequence_length,
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        if not 0.0 <= val_fraction < 1.0:
            raise DataError(f"val_fraction must be in [0, 1), got {val_fraction}")
        self.train = train
        self.val = val
        self.text_key = text_key
        self.val_fraction = val_fraction
        self._tokenizer_text: str | None = None
        if tokenizer is not None:
            given = load_tokenizer(tokenizer)
            self._tokenizer_text = given.to_str()
            self._requested_vocab_size = given.get_vocab_size()

    def build(self) -> Path:
        """Turn the text into tokens, once for each set of files and settings."""
        train = expand(self.train, kind="training text file")
        val = None if self.val is None else expand(self.val, kind="validation text file")
        read = partial(all_documents, text_key=self.text_key, val_fraction=self.val_fraction)
        if val is not None:
            parts = [
                Part(name="train", documents=partial(read, train, part="all")),
                Part(name="val", documents=partial(read, val, part="all")),
            ]
        else:
            parts = [Part(name="train", documents=partial(read, train, part="train"))]
            if self.val_fraction > 0.0:
                parts.append(Part(name="val", documents=partial(read, train, part="validation")))
        settings = [
            _FORMAT,
            self.text_key,
            self._tokenizer_text or self._requested_vocab_size,
            self.val_fraction if val is None else None,
            [_identity(path) for path in train],
            None if val is None else [_identity(path) for path in val],
        ]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        fill = partial(
            write_corpus,
            parts=parts,
            title="text",
            vocab_size=self._requested_vocab_size,
            tokenizer_text=self._tokenizer_text,
        )
        return build_once(f"text-{key[:16]}", fill, cache_dir=self.cache_dir)


class TokenShards(TokenDataModule):
    """Ready token shards, in the format of `lit_symopt.data.shards` (`lit-symopt data convert` writes them).

    Args:
        train: Paths or glob patterns of the training shards, used in this order.
        val: Paths or patterns of the validation shards; None: no validation.
        vocab_size: The size of the vocabulary; a token id beyond it is an error.
        tokenizer: The `tokenizer.json` the shards were written with, for decoding; optional.
        sequence_length: Tokens of one window.
        batch_size: Windows a process takes at once.
        seed: Decides the training order.
        num_workers: Worker processes of each loader.

    Raises:
        DataError: A shard is missing, damaged, or holds a token id beyond `vocab_size`.

    Example:
        >>> import pathlib, tempfile
        >>> from lit_symopt.data import TokenShards
        >>> from lit_symopt.data.shards import write_shard
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "train.bin"
        >>> write_shard(path, [i % 50 for i in range(1000)], vocab_size=50)
        >>> data = TokenShards(str(path), vocab_size=50, sequence_length=16, batch_size=2)
        >>> data.setup()
        >>> next(iter(data.train_dataloader()))["input_ids"].shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        train: list[str] | str,
        *,
        vocab_size: int,
        val: list[str] | str | None = None,
        tokenizer: str | None = None,
        sequence_length: int = 256,
        batch_size: int = 8,
        seed: int = 1234,
        num_workers: int = 0,
    ) -> None:
        super().__init__(sequence_length=sequence_length, batch_size=batch_size, seed=seed, num_workers=num_workers)
        if vocab_size < 1:
            raise DataError(f"vocab_size must be at least 1, got {vocab_size}")
        self.train = train
        self.val = val
        self._vocab_size = vocab_size
        self._tokenizer_path = tokenizer

    @property
    def vocab_size(self) -> int:
        """As given."""
        return self._vocab_size

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer given.

        Raises:
            DataError: None was given.
        """
        if self._tokenizer_path is None:
            raise DataError("these shards come without a tokenizer: give TokenShards(tokenizer=...) its tokenizer.json")
        return load_tokenizer(self._tokenizer_path)

    def shard_paths(self) -> tuple[list[Path], list[Path]]:
        """The files behind the paths and patterns."""
        return expand(self.train, kind="token shard"), expand(self.val or [], kind="token shard") if self.val else []


def _identity(path: Path) -> tuple[str, int, int]:
    """What tells a file from an earlier version of it: path, bytes, modification time."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return str(path), status.st_size, status.st_mtime_ns
