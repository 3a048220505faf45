"""The command line's `lit-symopt data convert` and `lit-symopt data info`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lit_symopt.data.cache import build_folder
from lit_symopt.data.prepare import Part, write_corpus
from lit_symopt.data.shards import MAGIC, VERSION, TokenShard
from lit_symopt.data.sources import all_documents, expand
from lit_symopt.data.tokenizer import load_tokenizer
from lit_symopt.errors import DataError


def convert(
    source: list[str] | str,
    output: str,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    val_source: list[str] | str | None = None,
    text_key: str = "text",
    shard_tokens: int = 100_000_000,
) -> None:
    """Convert text, JSON lines or parquet to token shards.

    Writes the folder `output` with `train_000000.bin`, ..., `val_000000.bin`, ... (given validation text),
    `tokenizer.json` and `meta.json`. The folder appears only when it is whole.

    Args:
        source: Path or glob pattern of the training text (.txt, .jsonl, .parquet), or a list such as "[a.txt, b.txt]".
        output: The folder to write; it must not exist yet.
        tokenizer: A tokenizer.json with a token <|endoftext|>; by default a byte-level BPE is trained on the source.
        vocab_size: Tokens of that BPE, at least 257.
        val_source: Path or pattern of the validation text, or a list of them.
        text_key: The key or column that holds the text in JSON lines and parquet.
        shard_tokens: The most tokens of one shard.

    Raises:
        DataError: A source, the tokenizer or the output folder cannot be used.
    """
    if not 1 <= shard_tokens < 2**31:
        raise DataError(f"shard_tokens must be between 1 and 2**31 - 1, got {shard_tokens}")
    named = [("train", expand(source, kind="text file"))]
    if val_source is not None:
        named.append(("val", expand(val_source, kind="text file")))
    parts = [Part(name=name, documents=partial(all_documents, paths, text_key=text_key)) for name, paths in named]
    fill = partial(
        write_corpus,
        parts=parts,
        title="convert",
        vocab_size=vocab_size,
        tokenizer_text=None if tokenizer is None else load_tokenizer(tokenizer).to_str(),
        shard_tokens=shard_tokens,
    )
    folder = Path(output).expanduser().absolute()
    build_folder(folder, fill)
    for path in sorted(folder.glob("*.bin")):
        print(f"{path}: {len(TokenShard.open(path)):,} tokens")


def info(path: str) -> None:
    """Print what a token shard holds: header, number of tokens, largest token id.

    Args:
        path: The shard, a .bin file.

    Raises:
        DataError: The file is missing or is no whole token shard.
    """
    shard = TokenShard.open(Path(path).expanduser())
    print(f"path            {shard.path}")
    print(f"magic, version  {MAGIC}, {VERSION}")
    print(f"tokens          {len(shard):,}")
    print(f"bytes per token {shard.bytes_per_token}")
    print(f"largest id      {shard.largest_id():,}")
