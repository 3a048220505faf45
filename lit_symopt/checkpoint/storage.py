"""Reading and writing checkpoint files: mapped, never running what is in them, and whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from lit_symopt.errors import CheckpointError


class Foreign:
    """Stands for an object of a class that is not needed, and therefore not imported, to read a checkpoint."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def load_mapped(path: Path, *, foreign: bool = False) -> Any:
    """What a file holds, its tensors mapped from the file and not yet read.

    Args:
        path: a file that `torch.save` wrote.
        foreign: put a `Foreign` in place of objects that torch does not load with `weights_only=True`, such as the
            loss scaler in DeepSpeed's files; refuse the file otherwise.

    Raises:
        CheckpointError: if the file is missing, cut short or refused.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is not whole; use an earlier one")
    try:
        names = get_unsafe_globals_in_checkpoint(path)
        if names and not foreign:
            raise CheckpointError(
                f"{path} holds objects of {', '.join(names[:4])}, and is not read, because that would run their code; "
                "save plain Python types and tensors only"
            )
        with safe_globals([(Foreign, name) for name in names]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except CheckpointError:
        raise
    except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError) as error:
        first = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path} is not a whole checkpoint ({first[0] if first else type(error).__name__}); it may have been cut "
            "short by a kill: use an earlier one"
        ) from error


def save_whole(contents: Any, path: Path) -> None:
    """`torch.save` that leaves either the whole file or what was there before, even if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")  # beside it: only a rename within a file system is atomic
    try:
        with partial.open("wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


class Scratch:
    """Makes tensors whose memory is a file, so that the system can write it out: more fit than the memory holds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = count()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of that shape, zeros."""
        if prod(shape) == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        file = self._folder / str(next(self._numbers))
        tensor = torch.from_file(str(file), shared=True, size=prod(shape), dtype=dtype)
        file.unlink()  # the space is free once the tensor is
        return tensor.view(tuple(shape))


@contextmanager
def scratch_beside(path: Path) -> Iterator[Scratch]:
    """A `Scratch` on the file system of `path`, where its contents will need room anyway."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Scratch(Path(folder))
