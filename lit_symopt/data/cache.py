"""The cache: what is built from text is built once, whole or not at all, also by two processes at the same time."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from lit_symopt.errors import DataError


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The folder that holds all caches: `cache_dir`, or `${XDG_CACHE_HOME:-~/.cache}/lit-symopt`.

    A relative or empty XDG_CACHE_HOME is ignored, as the XDG base directory specification asks.
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path("~/.cache").expanduser()) / "lit-symopt"


def build_once(name: str, build: Callable[[Path], None], *, cache_dir: str | Path | None = None) -> Path:
    """Return the folder `name` of the cache; if it does not exist, let `build` fill it first.

    `build` gets a temporary folder on the same file system, which is renamed when it returns. A lock lets one process
    build and the others wait; where a network file system's locks do not work, the first rename wins.

    Raises:
        DataError: The cache folder cannot be written. Whatever `build` raises passes through. Either way nothing that
            looks whole is left.
    """
    root = cache_root(cache_dir)
    folder = root / name
    if folder.is_dir():  # also in a cache that cannot be written
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            if not folder.is_dir():
                for left_over in root.glob(f".{name}.*.part"):  # of a process that was killed: we hold its lock
                    shutil.rmtree(left_over)
                _build(folder, build)
    except OSError as error:
        raise DataError(
            f"cannot write the cache folder {root}: {error}. Choose another with cache_dir= (--data.cache_dir) or the "
            "environment variable XDG_CACHE_HOME."
        ) from error
    return folder


def build_folder(folder: Path, build: Callable[[Path], None]) -> None:
    """Let `build` fill a new folder that appears under its name only when it is whole.

    Raises:
        DataError: The folder exists and is not empty, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists: choose a new folder, or remove it first")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _build(folder, build)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error}. Choose a folder that is yours.") from error


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    part = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.part"
    part.mkdir()
    try:
        build(part)
        try:
            os.rename(part, folder)
        except OSError:
            if not folder.is_dir() or not any(folder.iterdir()):
                raise  # otherwise another process was first, and what it built is the same
    finally:
        shutil.rmtree(part, ignore_errors=True)
