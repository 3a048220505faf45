"""A checkpoint that is a folder: what every kind of them can tell and do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from lit_symopt.checkpoint.storage import Scratch
from lit_symopt.errors import CheckpointError


class Folder(ABC):
    """A checkpoint that the ranks of a strategy wrote together.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def at(path: Path) -> Folder:
        """The folder at a path, by what lies in it.

        Raises:
            CheckpointError: if it is none, or an unknown kind.
        """
        from lit_symopt.checkpoint.deepspeed import DeepSpeedFolder
        from lit_symopt.checkpoint.fsdp2 import FSDP2Folder

        kinds: tuple[type[Folder], ...] = (DeepSpeedFolder, FSDP2Folder)
        for kind in kinds:
            if kind.is_at(path):
                return kind(path)
        raise CheckpointError(
            f"the folder {path} is no checkpoint that is known here: it holds neither what DeepSpeed saves (a file "
            "'latest') nor what FSDP2 does (a file '.metadata'); the save may have been interrupted: use an earlier one"
        )

    @staticmethod
    @abstractmethod
    def is_at(path: Path) -> bool:
        """Whether a folder looks like this kind."""

    @property
    @abstractmethod
    def strategy(self) -> str:
        """What it is called, e.g. `"DeepSpeed ZeRO 2"`."""

    @property
    @abstractmethod
    def world(self) -> int:
        """How many ranks wrote it."""

    @abstractmethod
    def missing(self) -> list[Path]:
        """Files that ought to be there and are not, or are too short."""

    @abstractmethod
    def header(self) -> dict[str, Any]:
        """Everything but weights and optimizer state: loops, schedulers, callbacks, hyper-parameters, our section."""

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""

    @abstractmethod
    def assemble(self, scratch: Scratch) -> dict[str, Any]:
        """The whole checkpoint as the Trainer's dictionary of an ordinary file, its tensors in `scratch`."""

    def refuse_incomplete(self) -> None:
        """Checks that every shard is there.

        Raises:
            CheckpointError: naming the missing files.
        """
        missing = self.missing()
        if missing:
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            raise CheckpointError(
                f"the checkpoint {self.path} is not whole: {', '.join(map(str, missing[:4]))}{more} "
                f"{'is' if len(missing) == 1 else 'are'} missing or cut short; its save was interrupted, or a shard "
                "was not copied: use an earlier one"
            )
