"""Documents out of files: plain text, JSON lines, parquet.

A `.txt` file is one document; a `.jsonl` or `.parquet` file holds one document a row, under a key.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from lit_symopt.data.corpus import held_out_rank
from lit_symopt.errors import DataError

Part = Literal["all", "train", "validation"]


def expand(patterns: str | Path | Iterable[str | Path], *, kind: str) -> list[Path]:
    """List the files behind paths and glob patterns (`~` and `**` work), each once, in the order given.

    Args:
        patterns: One path or pattern, or several; the matches of one pattern are sorted.
        kind: What the files are, for the error message, such as "text file".

    Raises:
        DataError: A path does not exist, is a folder, or a pattern matches nothing.
    """
    files: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, (str, Path)) else patterns:
        name = str(Path(pattern).expanduser())
        matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        found = [Path(match).absolute() for match in matches if Path(match).is_file()]
        if not found and Path(name).is_dir():
            raise DataError(f"{pattern} is a folder: name the {kind}s in it, for instance {pattern}/*")
        if not found:
            raise DataError(f"no {kind} {pattern}: the path does not exist or the pattern matches no file")
        files.update(dict.fromkeys(found))
    if not files:
        raise DataError(f"no {kind} given: name at least one path or pattern")
    return list(files)


def documents(path: Path, *, text_key: str, part: Part = "all", val_fraction: float = 0.0) -> Iterator[str]:
    """Yield a file's documents in order.

    Args:
        path: A `.txt`, `.jsonl` or `.parquet` file.
        text_key: The key or column that holds the text of a row.
        part: Which part of a file that is split into training and validation text. Rows are held out by the hash of
            file name and row number; a text file keeps its end, from a line on.
        val_fraction: The share held out, in [0, 1).

    Raises:
        DataError: The file is empty, unreadable, not UTF-8, not of its kind, or a row has no text under `text_key`.
    """
    if path.suffix == ".txt":
        yield _text_part(_read_text(path), part=part, val_fraction=val_fraction)
        return
    rows = _rows(path)
    number = -1
    for number, (place, row) in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
            held = f"the keys {', '.join(map(repr, row))}" if isinstance(row, dict) else type(row).__name__
            raise DataError(f"{place}: no text under {text_key!r}, but {held}. Name the key with text_key=")
        held_out = held_out_rank(f"{path.name}:{number}") < val_fraction
        if part == "all" or held_out == (part == "validation"):
            yield row[text_key]
    if number < 0:
        raise DataError(f"{path} is empty: it holds no document")


def all_documents(paths: Iterable[Path], **options: Any) -> Iterator[str]:
    """Yield the documents of several files in order; the options are those of `documents`."""
    for path in paths:
        yield from documents(path, **options)


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not text.strip():
        raise DataError(f"{path} is empty: it holds no text")
    return text


def _text_part(text: str, *, part: Part, val_fraction: float) -> str:
    """Cut a text after the line end that follows the training share of its characters."""
    if part == "all" or val_fraction == 0.0:
        return "" if part == "validation" else text
    cut = text.find("\n", int(len(text) * (1.0 - val_fraction))) + 1 or len(text)
    return text[:cut] if part == "train" else text[cut:]


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (where it is, row)."""
    if path.suffix == ".jsonl":
        return _json_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    raise DataError(f"{path} is of no known kind ({path.suffix or 'no suffix'}): known are .txt, .jsonl and .parquet")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", _parse(line, path=path, number=number)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _parse(line: str, *, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number} is not JSON: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"reading {path} needs the datasets library: pip install lit-symopt[data]") from error
    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(rows):
            yield f"{path}, row {number}", row
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot read {path} as parquet: {error}") from error
