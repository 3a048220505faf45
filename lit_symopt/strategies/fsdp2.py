"""Lightning's `ModelParallelStrategy` for FSDP2 alone, with whole checkpoints and ordinary ones loaded by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.strategies.model_parallel import _load_raw_module_state
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_symopt.checkpoint.consolidate import normalized
from lit_symopt.checkpoint.folder import Folder
from lit_symopt.checkpoint.named import load_named, named_state
from lit_symopt.checkpoint.storage import load_mapped
from lit_symopt.optim import SymOpt
from lit_symopt.strategies.whole_folder import whole_folder


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 over all processes; the arguments are those of `ModelParallelStrategy`.

    Beyond Lightning's own it
    - shards over all processes by default, where Lightning's makes them tensor-parallel;
    - writes a checkpoint folder beside its place and renames it, so that an interrupted save never looks whole.
      Lightning's overwrites the files of an earlier one in place, and a kill leaves a mixture of two;
    - resumes an ordinary file of any strategy by parameter name. Lightning's reads the numbers that torch gives to
      parameters, group by group, as places in the model, and hands blocks the momentum of others.

    The model shards itself in `configure_model`, as those of `lit_symopt.models` do.

    Example (YAML):
        trainer:
          devices: 2
          strategy: lit_symopt.strategies.FSDP2Strategy
    """

    def setup_environment(self) -> None:
        """Lightning's, after `auto` has become all processes."""
        if self._data_parallel_size == "auto" and self._tensor_parallel_size == "auto":
            self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Saves a folder to which every rank contributes, or one file; either appears under its name when whole."""
        path = self.broadcast(filepath)
        if not self._save_distributed_checkpoint or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole_folder(Path(path), leads=self.is_global_zero, barrier=self.barrier) as partial:
            super().save_checkpoint(checkpoint, str(partial), storage_options)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a folder that FSDP2 saved on any number of processes, or an ordinary file.

        Raises:
            CheckpointError: for a folder that lacks a file, naming it; for a file of another model or stack, naming
                the blocks.
        """
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            Folder.at(path).refuse_incomplete()
        if path.is_dir() or not all(isinstance(optimizer, SymOpt) for optimizer in self.optimizers):
            return super().load_checkpoint(path, weights_only)
        checkpoint = normalized(load_mapped(path))
        weights = checkpoint.pop("state_dict")
        assert self.model is not None
        assert self.lightning_module is not None
        _load_raw_module_state(weights, self.model, strict=self.lightning_module.strict_loading)
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            assert isinstance(optimizer, SymOpt)
            distribution = optimizer.distribution or optimizer.attach().distribution
            assert distribution is not None
            load_named(optimizer, distribution, named_state(state), weights)
        return checkpoint
