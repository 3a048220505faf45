"""A byte-level byte-pair encoding: trained once on the corpus, the same for the same text, lossless for any text.

Source: Sennrich, Haddow and Birch 2016 (arXiv:1508.07909) for the merges; Radford et al. 2019 (GPT-2) for their use on
bytes. The implementation is the `tokenizers` library.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lit_symopt.errors import DataError

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # every byte, and the separator

# One call of the encoder gets about this many characters: enough to keep its threads busy, little beside the text.
_CHARACTERS_AT_ONCE = 4_000_000


def train_tokenizer(documents: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE whose token 0 is the document separator `<|endoftext|>`.

    Args:
        documents: The texts; read once.
        vocab_size: At most this many tokens, at least 257. A small corpus may give fewer: merges end where no pair
            of tokens is left.

    Raises:
        DataError: `vocab_size` is too small.

    Example:
        >>> from lit_symopt.data.tokenizer import train_tokenizer
        >>> tokenizer = train_tokenizer(["for x in xs:", "for y in ys:"], vocab_size=300)
        >>> tokenizer.decode(tokenizer.encode("naïve").ids)
        'naïve'
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and {END_OF_TEXT}), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a `tokenizer.json`.

    Raises:
        DataError: The file is missing or is not a tokenizer, or has no `<|endoftext|>`.
    """
    if not Path(path).is_file():
        raise DataError(f"no tokenizer file {path}: give the path of a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises the bare Exception, nothing narrower
        raise DataError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from error
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise DataError(
            f"the tokenizer {path} has no token {END_OF_TEXT}, which separates documents: add it as a token"
        )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[NDArray[np.uint32]]:
    """Encode documents one by one, each as a 1-D array that ends with the separator.

    The separator's name inside a document is text like any other. A document longer than 4,000,000 characters is
    encoded in pieces, cut after line ends.
    """
    separator = tokenizer.token_to_id(END_OF_TEXT)
    assert separator is not None  # both ways to get a tokenizer make sure of it
    tokenizer.encode_special_tokens = True
    pieces = (piece for document in documents for piece in _pieces(document))
    while batch := _take(pieces):
        encodings = tokenizer.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
        for encoding, (_, ends) in zip(encodings, batch, strict=True):
            ids = encoding.ids
            if ends:
                ids.append(separator)
            yield np.array(ids, dtype=np.uint32)


def _take(pieces: Iterator[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Take pieces until they reach the number of characters for one call."""
    taken: list[tuple[str, bool]] = []
    characters = 0
    while characters < _CHARACTERS_AT_ONCE and (piece := next(islice(pieces, 1), None)) is not None:
        taken.append(piece)
        characters += len(piece[0])
    return taken


def _pieces(document: str) -> Iterator[tuple[str, bool]]:
    """Cut a document after line ends into pieces of bounded length; the flag marks its last one."""
    start = 0
    while len(document) - start > _CHARACTERS_AT_ONCE:
        end = document.rfind("\n", start, start + _CHARACTERS_AT_ONCE) + 1 or start + _CHARACTERS_AT_ONCE
        yield document[start:end], False
        start = end
    yield document[start:], True
