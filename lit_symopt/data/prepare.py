"""From documents to a folder of tokens: `tokenizer.json`, the shards of each part, and `meta.json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from lit_symopt.data.shards import ShardWriter
from lit_symopt.data.tokenizer import encode, train_tokenizer
from lit_symopt.errors import DataError

Documents = Callable[[], Iterable[str]]  # read as often as needed: once to train a tokenizer, once to encode
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a corpus, "train" or "val", and a guess of its number of documents for the progress bar."""

    name: str
    documents: Documents
    total: int | None = None


def write_corpus(
    folder: Path,
    parts: list[Part],
    *,
    title: str,
    vocab_size: int,
    tokenizer_text: str | None = None,
    shard_tokens: int | None = None,
) -> None:
    """Write a corpus as tokens; `meta.json` says how many each part has, and the size of the vocabulary.

    Args:
        folder: An existing folder to write into.
        parts: The tokenizer is trained on the first, all are encoded.
        title: What the progress bar says.
        vocab_size: The size asked of a new tokenizer.
        tokenizer_text: The JSON of a tokenizer to use instead of training one.
        shard_tokens: None writes `<part>.bin`; a number writes `<part>_000000.bin`, ... of at most that many tokens.
    """
    from tokenizers import Tokenizer

    with _progress() as progress:
        if tokenizer_text is None:
            read = _watched(progress, parts[0].documents(), f"{title}: tokenizer", total=parts[0].total)
            tokenizer = train_tokenizer(read, vocab_size=vocab_size)
        else:
            tokenizer = Tokenizer.from_str(tokenizer_text)
        size = tokenizer.get_vocab_size()
        tokenizer.save(str(folder / "tokenizer.json"))
        counts: dict[str, int] = {}
        for part in parts:
            watched = _watched(progress, part.documents(), f"{title}: {part.name}", total=part.total)
            tokens = encode(tokenizer, watched)
            counts[part.name] = _write_part(folder, part.name, tokens, vocab_size=size, shard_tokens=shard_tokens)
    meta = {"title": title, "vocab_size": size, "tokens": counts}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _write_part(
    folder: Path, name: str, tokens: Iterable[NDArray[np.uint32]], *, vocab_size: int, shard_tokens: int | None
) -> int:
    """Write one part into as many shards as it takes; return its number of tokens."""
    if shard_tokens is not None and shard_tokens < 1:
        raise DataError(f"shard_tokens must be at least 1, got {shard_tokens}")
    written, shards = 0, 0
    with ExitStack() as stack:
        writer: ShardWriter | None = None
        for chunk in tokens:
            rest = chunk
            while len(rest):
                if writer is None or writer.tokens == shard_tokens:
                    stack.close()
                    file = f"{name}.bin" if shard_tokens is None else f"{name}_{shards:06d}.bin"
                    writer = stack.enter_context(ShardWriter(folder / file, vocab_size=vocab_size))
                    shards += 1
                room = len(rest) if shard_tokens is None else shard_tokens - writer.tokens
                writer.append(rest[:room])
                written += len(rest[:room])
                rest = rest[room:]
    return written


def _progress() -> Progress:
    """A bar on the terminal's standard error; nothing in a log."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def _watched(progress: Progress, items: Iterable[Item], description: str, *, total: int | None) -> Iterator[Item]:
    """Pass items through and move the bar; without a total it only pulses."""
    task = progress.add_task(description, total=total)
    for item in items:
        yield item
        progress.advance(task)
    progress.update(task, total=total or 1, completed=total or 1)
