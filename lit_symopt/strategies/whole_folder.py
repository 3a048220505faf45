"""A folder that several processes write together, and that exists under its name only when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(path: Path, *, leads: bool, barrier: Callable[[], object]) -> Iterator[Path]:
    """A folder beside `path` to write into, which takes its name at the end.

    What was at `path` is kept until then. It is out of the way for the moment between two renames: a kill just then
    leaves it as `.NAME.replaced`, whole.

    Args:
        path: where the folder is to be.
        leads: whether this process creates and renames it; one process of those that share the file system.
        barrier: waits for all processes.
    """
    partial, replaced = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.replaced")
    if leads:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in (partial, replaced) if path.exists() else (partial,):
            _remove(leftover)
    barrier()
    try:
        yield partial
    except BaseException:
        if leads:
            _remove(partial)
        raise
    barrier()
    if leads:
        if path.exists() or path.is_symlink():
            path.rename(replaced)
        partial.rename(path)
        _remove(replaced)
    barrier()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
