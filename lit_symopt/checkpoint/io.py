"""Lightning's checkpoint files, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

from lit_symopt.checkpoint.storage import save_whole


class WholeFiles(TorchCheckpointIO):
    """Writes a local checkpoint beside its place and renames it.

    Lightning's own writes it to the temporary folder of the machine and moves it. From another file system, where
    that folder usually is, a move is a copy: a kill in its midst has destroyed the old file and not finished the new.
    It also holds a second copy in memory, which this does not.

    A `Trainer(plugins=[WholeFiles()])` uses it; `lit-symopt fit` does by itself.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Writes the file; as Lightning does, if the path is no local one."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            save_whole(checkpoint, Path(path))
