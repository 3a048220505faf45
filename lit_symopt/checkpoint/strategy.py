"""Can a Trainer's strategy load a folder? Each reads only what it saved itself, on as many ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_symopt.checkpoint.deepspeed import DeepSpeedFolder
from lit_symopt.checkpoint.folder import Folder
from lit_symopt.checkpoint.fsdp2 import FSDP2Folder
from lit_symopt.errors import CheckpointError

if TYPE_CHECKING:
    import lightning as L


def refuse_another_strategy(path: Path, trainer: L.Trainer) -> None:
    """Checks that a folder is loaded by the strategy, the ZeRO stage and the number of ranks that it needs.

    FSDP2 loads its folders on any number of ranks.

    Raises:
        CheckpointError: naming both sides and the command that makes one ordinary file of the folder.
    """
    folder = Folder.at(path)
    # By name: the strategies of packages that are not installed cannot be imported.
    kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    here = f"{type(trainer.strategy).__name__} on {trainer.world_size} rank(s)"
    if isinstance(folder, DeepSpeedFolder):
        stage = _stage(trainer.strategy) if "DeepSpeedStrategy" in kinds else None
        fits = stage == folder.stage and trainer.world_size == folder.world
        here += "" if stage is None else f", stage {stage}"
    else:
        fits = isinstance(folder, FSDP2Folder) and "ModelParallelStrategy" in kinds
    if not fits:
        raise CheckpointError(
            f"{path} was saved by {folder.strategy} on {folder.world} rank(s), and this run is {here}; make one "
            f"ordinary file of it, which every strategy resumes: lit-symopt checkpoint consolidate {path} DST"
        )


def _stage(strategy: Any) -> int:
    config = strategy.config or {}
    return int((config.get("zero_optimization") or {}).get("stage", 0))
