"""The text every machine with Python has: the standard library's own source files.

About 11 MB in 670 files (CPython 3.11), found by `sysconfig`, never downloaded. Left out are its tests, which many
installations do not carry, and `pydoc_data`, one generated file of help texts that alone would be 7 % of the corpus.
"""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from collections.abc import Sequence
from pathlib import Path

from lit_symopt.errors import DataError

_LEFT_OUT = frozenset({"__pycache__", "dist-packages", "idlelib", "pydoc_data", "site-packages", "test", "tests"})


def stdlib_root() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib")).absolute()


def stdlib_files(*, root: str | Path | None = None, max_files: int | None = None) -> list[Path]:
    """List the standard library's Python files, sorted by their path below its folder.

    Args:
        root: The folder to look in; by default `stdlib_root()`.
        max_files: Keep only this many, evenly spread over the sorted list (a small corpus for a trial).

    Returns:
        Absolute paths; the same list on every call on the same machine.

    Raises:
        DataError: The folder holds no Python source (some minimal installations ship compiled files only).

    Example:
        >>> from lit_symopt.data.corpus import stdlib_files
        >>> [path.name for path in stdlib_files() if path.parent.name == "json"]
        ['__init__.py', 'decoder.py', 'encoder.py', 'scanner.py', 'tool.py']
    """
    folder = stdlib_root() if root is None else Path(root).absolute()
    found = [path for path in folder.rglob("*.py") if _LEFT_OUT.isdisjoint(path.relative_to(folder).parts[:-1])]
    files = sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(folder).as_posix())
    if not files:
        raise DataError(
            f"no Python source file below {folder}: this Python comes without its library's source. "
            "Train on text of your own with lit_symopt.data.TextCorpus."
        )
    if max_files is None or max_files >= len(files):
        return files
    if max_files < 1:
        raise DataError(f"max_files must be at least 1, got {max_files}")
    return [files[index * len(files) // max_files] for index in range(max_files)]


def read_source(path: Path) -> str:
    """Read a Python source file in the encoding it declares (PEP 263).

    Raises:
        DataError: The file cannot be opened or is not text in its declared encoding.
    """
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def held_out_rank(name: str) -> float:
    """A number in [0, 1) that only depends on the name: the first 8 bytes of its SHA-256.

    A document is held out for validation if its rank is below the share to hold out. Adding one document therefore
    never moves another across the split.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def split_files(files: Sequence[Path], *, root: Path, fraction: float) -> tuple[list[Path], list[Path]]:
    """Split files into (train, validation) by the rank of their path below `root`; at least one file goes to each.

    Raises:
        DataError: There are fewer than two files.
    """
    if len(files) < 2:
        raise DataError(f"{len(files)} file cannot be split into training and validation: use at least 2 (max_files)")
    ranks = {path: held_out_rank(path.relative_to(root).as_posix()) for path in files}
    lowest, highest = min(ranks.values()), max(ranks.values())
    held_out = [path for path in files if ranks[path] < highest and (ranks[path] < fraction or ranks[path] == lowest)]
    return [path for path in files if path not in set(held_out)], held_out
