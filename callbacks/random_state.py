"""The random state of a run, kept in its checkpoints: the Trainer puts none there.

With dropout, or any other draw inside a training step, a resumed run equals an uninterrupted one only if the
generators continue where they were.
"""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_symopt.callbacks.ranks import gathered

KEY = "random_state"
State = dict[str, Any]


class RandomState(L.Callback):
    """Saves the states of Python's, numpy's, torch's and CUDA's generators with a checkpoint and restores them.

    The generators belong to the training steps: what is drawn between two steps, by a validation or by a data loader
    that starts, does not move them. So the weights do not depend on how often the run is validated, nor on where it
    was interrupted. Every rank's state is saved; a run resumed on another number of processes keeps its fresh states
    and says so.

    The states are tensors and Python numbers and load with `weights_only=True`.

    Example:
        >>> trainer = L.Trainer(callbacks=[RandomState()], logger=False, enable_checkpointing=False)
    """

    def __init__(self) -> None:
        self._after_last_step: State | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Continues from the end of the last step, of this run or of the checkpoint."""
        if self._after_last_step is not None:
            restore(self._after_last_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remembers where the step left the generators."""
        self._after_last_step = capture()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the state of every rank."""
        checkpoint[KEY] = gathered(trainer, self._after_last_step or capture())

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes this rank's state; it is restored when the first step begins."""
        states = checkpoint.get(KEY)
        if states is None:
            rank_zero_warn(
                "the checkpoint holds no random state: draws such as dropout will differ from the first run's"
            )
        elif len(states) != trainer.world_size:
            rank_zero_warn(
                f"the checkpoint holds the random state of {len(states)} process(es) and this run has "
                f"{trainer.world_size}: draws such as dropout will differ from the first run's"
            )
        else:
            self._after_last_step = states[trainer.global_rank]


def capture() -> State:
    """The states of the global generators of Python, numpy, torch and, once it is used, CUDA's current device."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002  the global generator is the point
    state: State = {
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: State) -> None:
    """Sets the global generators to captured states."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002  as above
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
