"""Token shards: the binary format published with the paper, written and read by memory map.

A shard is 256 little-endian int32 of header, then the tokens:

====== ==========================================
word   meaning
====== ==========================================
0      magic number, 20260317
1      version, 2
2      number of tokens
3      bytes per token: 2 (uint16) or 4 (uint32)
4..255 zero
====== ==========================================

Source: the data files published with Lau & Su 2026 (arXiv:2605.18106).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lit_symopt.errors import DataError

MAGIC: Final = 20260317
VERSION: Final = 2
HEADER_WORDS: Final = 256
HEADER_BYTES: Final = 4 * HEADER_WORDS
MAX_TOKENS: Final = 2**31 - 1  # the header counts them in an int32

_DTYPES: Final[dict[int, np.dtype[Any]]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_TOKENS_AT_ONCE: Final = 1 << 24  # bounds the memory of a look for the largest id
_largest_ids: dict[tuple[str, int, int], int] = {}  # (path, bytes, modification time) → largest id, looked up once


class ShardWriter:
    """Write one shard piece by piece; it appears under its name only when it is whole.

    Args:
        path: The file to write; a file of that name is replaced at the end, or kept if anything fails.
        vocab_size: Decides the bytes per token: 2 up to 65,536 tokens, else 4.

    Raises:
        DataError: A token id is negative or beyond the vocabulary; no or too many tokens; the file cannot be written.

    Example:
        >>> import tempfile, pathlib
        >>> from lit_symopt.data.shards import ShardWriter, TokenShard
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.bin"
        >>> with ShardWriter(path, vocab_size=100) as writer:
        ...     writer.append([1, 2])
        ...     writer.append([3])
        >>> TokenShard.open(path).tokens.tolist()
        [1, 2, 3]
    """

    def __init__(self, path: str | Path, *, vocab_size: int) -> None:
        if not 1 <= vocab_size <= 2**32:
            raise DataError(f"vocab_size must be between 1 and 2**32, got {vocab_size}")
        self.path = Path(path)
        self.vocab_size = vocab_size
        self.tokens = 0
        self._dtype = _DTYPES[2 if vocab_size <= 2**16 else 4]

    def __enter__(self) -> ShardWriter:
        """Open a temporary file beside the target."""
        self._part = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.part")
        try:
            self._file = self._part.open("xb")
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error}. Choose a folder that exists and is yours.") from error
        self._file.write(bytes(HEADER_BYTES))
        return self

    def append(self, tokens: Iterable[int] | NDArray[Any]) -> None:
        """Append token ids, a 1-D sequence of integers."""
        ids = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens))
        if ids.size == 0:
            return
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise DataError(f"tokens must be a 1-D sequence of integers, got shape {ids.shape} and dtype {ids.dtype}")
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < 0 or largest >= self.vocab_size:
            wrong = smallest if smallest < 0 else largest
            raise DataError(f"token id {wrong} is outside the vocabulary of {self.vocab_size} tokens ({self.path})")
        if self.tokens + ids.size > MAX_TOKENS:
            raise DataError(
                f"{self.path} would hold more than {MAX_TOKENS:,} tokens, the most its header can count: "
                "split it with `lit-symopt data convert --shard_tokens`"
            )
        self._file.write(ids.astype(self._dtype).tobytes())
        self.tokens += ids.size

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Write the header and move the file into place, or remove it after an error."""
        try:
            with self._file:
                if kind is None:
                    self._finish()
            if kind is None:
                os.replace(self._part, self.path)
        finally:
            with suppress(FileNotFoundError):
                self._part.unlink()

    def _finish(self) -> None:
        if self.tokens == 0:
            raise DataError(f"no tokens to write to {self.path}: a shard holds at least one")
        header = np.zeros(HEADER_WORDS, dtype="<i4")
        header[:4] = MAGIC, VERSION, self.tokens, self._dtype.itemsize
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())


def write_shard(path: str | Path, tokens: Iterable[int] | NDArray[Any], *, vocab_size: int) -> None:
    """Write one shard at once; see `ShardWriter`."""
    with ShardWriter(path, vocab_size=vocab_size) as writer:
        writer.append(tokens)


@dataclass(frozen=True, eq=False)
class TokenShard:
    """A shard opened for reading: `tokens` is a read-only memory map of uint16 or uint32.

    It pickles as its path: a process that gets one maps the file itself.
    """

    path: Path
    tokens: NDArray[np.uint16] | NDArray[np.uint32]

    @classmethod
    def open(cls, path: str | Path, vocab_size: int | None = None) -> TokenShard:
        """Check the header, the length and (given `vocab_size`) every token id, and map the tokens.

        Raises:
            DataError: The file is missing or unreadable, is no shard, has another version, is longer or shorter than
                its header says, or holds a token id beyond `vocab_size`.
        """
        path = Path(path).absolute()
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                header = np.frombuffer(file.read(HEADER_BYTES), dtype=np.uint8)
        except OSError as error:
            raise DataError(f"cannot read the token shard {path}: {error}") from error
        dtype, count = _read_header(path, header, size=size)
        shard = cls(path, np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,)))
        if vocab_size is not None and (largest := shard.largest_id()) >= vocab_size:
            raise DataError(
                f"{path} holds the token id {largest}, beyond the vocabulary of {vocab_size} tokens: "
                f"give the vocab_size of the tokenizer it was written with (at least {largest + 1})"
            )
        return shard

    def largest_id(self) -> int:
        """The largest token id; the file is read once a process, then remembered."""
        status = self.path.stat()
        key = (str(self.path), status.st_size, status.st_mtime_ns)
        if key not in _largest_ids:
            starts = range(0, len(self.tokens), _TOKENS_AT_ONCE)
            _largest_ids[key] = max(int(self.tokens[start : start + _TOKENS_AT_ONCE].max()) for start in starts)
        return _largest_ids[key]

    @property
    def bytes_per_token(self) -> int:
        """2 or 4."""
        return self.tokens.dtype.itemsize

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the path: NumPy would copy the whole file."""
        return TokenShard.open, (self.path,)


def _read_header(path: Path, header: NDArray[np.uint8], *, size: int) -> tuple[np.dtype[Any], int]:
    """Return (dtype, number of tokens), or raise what is wrong with the header or the length."""
    way_out = "Write shards with `lit-symopt data convert`."
    if len(header) < HEADER_BYTES:
        raise DataError(
            f"{path} is no token shard: {size} bytes, shorter than its {HEADER_BYTES}-byte header. {way_out}"
        )
    magic, version, count, width = (int(word) for word in header.view("<i4")[:4])
    if magic != MAGIC:
        raise DataError(f"{path} is no token shard: magic number {magic}, expected {MAGIC}. {way_out}")
    if version != VERSION:
        raise DataError(f"{path} has version {version} of the shard format; only version {VERSION} is read. {way_out}")
    if width not in _DTYPES:
        raise DataError(f"{path} says {width} bytes per token; 2 or 4 are possible. {way_out}")
    if count < 1:
        raise DataError(f"{path} says it holds {count} tokens: a shard holds at least one. {way_out}")
    if size != (expected := HEADER_BYTES + count * width):
        raise DataError(
            f"{path} has {size:,} bytes, but its header says {count:,} tokens of {width} bytes, which take "
            f"{expected:,}: it was cut off or damaged. Copy or convert it again."
        )
    return _DTYPES[width], count
