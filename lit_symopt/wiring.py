"""Attaching `SymOpt` to the Trainer's strategy: after the strategy is set up, before a checkpoint is restored."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState

from lit_symopt.checkpoint.named import keyed_by_name
from lit_symopt.checkpoint.progress import ACCUMULATED, restate_progress
from lit_symopt.errors import ConfigError, SymOptError
from lit_symopt.optim import SymOpt


class AttachOptimizer(L.Callback):
    """Makes every `SymOpt` of the Trainer follow its strategy, so that updates are those of the whole blocks.

    `SymOptMixin` brings it along. A module that builds its `SymOpt` itself lists it:
    `Trainer(callbacks=[AttachOptimizer()])`. It also raises, at the end of training, the error for a non-finite
    gradient that an accelerator has not reported yet, and keeps a resumed run from saving the step it begins at again.

    | strategy | what is done |
    |---|---|
    | one device | nothing |
    | `DDPStrategy` | the updates' work is shared among the ranks |
    | `DeepSpeedStrategy` | the optimizer finds its blocks in the engine's partitions |
    | `ModelParallelStrategy` (FSDP2) | the same for DTensors |

    Raises:
        ConfigError: on several devices for any other strategy, FSDP1 among them, before the model is set up.

    Example:
        >>> from torch import nn
        >>> class Classifier(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Linear(8, 4)
        ...     def configure_optimizers(self):
        ...         return SymOpt(self.named_parameters(), rule="spectral")
        >>> trainer = L.Trainer(callbacks=[AttachOptimizer()], logger=False)
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses strategies that are not supported, and infers blocks while the parameters are whole."""
        if stage != "fit":
            return
        _refuse_unsupported(trainer.strategy, trainer.world_size)
        _warn_of_small_gradients(trainer.strategy, pl_module, trainer.accumulate_grad_batches)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            from lit_symopt.mixin import SymOptMixin

            if isinstance(pl_module, SymOptMixin):
                # configure_optimizers asks again, and says what is wrong if it is still so.
                with suppress(SymOptError):
                    pl_module.block_taxonomy()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Attaches: the strategy has wrapped the model, and no optimizer state is loaded yet."""
        strategy: Any = trainer.strategy
        for optimizer in _optimizers(trainer):
            if isinstance(strategy, DeepSpeedStrategy):
                optimizer.attach(strategy.deepspeed_engine)
            elif isinstance(strategy, DDPStrategy):
                # The Trainer's model is wrapped by DDP, unless a subclass of the strategy does something else.
                optimizer.attach(getattr(trainer.model, "process_group", dist.group.WORLD))
            elif isinstance(strategy, ModelParallelStrategy):
                optimizer.attach()
            if optimizer.distribution is not None:
                rank_zero_only(print)(optimizer.plan_report(), flush=True)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes how many batches make a step, and keys the optimizer's state on one device or DDP by parameter name.

        Numbers are places in an order that others differ in: Lightning's `ModelParallelStrategy` would read them as
        places in `model.parameters()`.
        """
        checkpoint[ACCUMULATED] = trainer.accumulate_grad_batches
        states = checkpoint.get("optimizer_states", [])
        if isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            for index, optimizer in enumerate(trainer.optimizers[: len(states)]):
                if isinstance(optimizer, SymOpt):
                    states[index] = keyed_by_name(states[index], checkpoint["state_dict"])

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lets steps begin where they ended, when other numbers of processes and of accumulated batches go on."""
        restate_progress(checkpoint, trainer.accumulate_grad_batches)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tells every `ModelCheckpoint` that the step of a resume is saved already.

        With accumulated batches it would save it again after the first of them, over the whole checkpoint: one whose
        loader is a batch ahead while that batch's gradient is in no file (Lightning 2.6).
        """
        if trainer.ckpt_path is not None:
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint):
                    callback._last_global_step_saved = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raises what the last steps have found and no later step could report."""
        for optimizer in _optimizers(trainer):
            optimizer.check()


def _optimizers(trainer: L.Trainer) -> list[SymOpt]:
    strategy: Any = trainer.strategy
    # The Trainer's optimizer is DeepSpeed's own then, which keeps the one that it was given.
    deepspeed = isinstance(strategy, DeepSpeedStrategy)
    found = [strategy.deepspeed_engine.basic_optimizer] if deepspeed else trainer.optimizers
    return [optimizer for optimizer in found if isinstance(optimizer, SymOpt)]


def _warn_of_small_gradients(strategy: Strategy, module: L.LightningModule, accumulated: int) -> None:
    lightnings = isinstance(strategy, DeepSpeedStrategy) and type(strategy).backward is Strategy.backward
    if lightnings and module.automatic_optimization and accumulated > 1:
        rank_zero_warn(
            f"accumulate_grad_batches={accumulated}: the Trainer divides the loss by it and DeepSpeed does so again: "
            f"gradients are {accumulated} times smaller than under other strategies. Rules that ignore the size of the "
            f"momentum hide it; AdamW's eps, clipping, nuclear scales and checkpoints that move do not. Use "
            f"lit_symopt.strategies.DeepSpeedStrategy, which divides once"
        )


def _refuse_unsupported(strategy: Strategy, world: int) -> None:
    name = type(strategy).__name__
    if isinstance(strategy, FSDPStrategy):
        raise ConfigError(
            f"{name} is FSDP1, which flattens parameters and is not supported; use ModelParallelStrategy (FSDP2) with "
            f"data_parallel_size set to the number of devices and tensor_parallel_size=1, or DeepSpeedStrategy"
        )
    if isinstance(strategy, DDPStrategy) and isinstance(strategy._ddp_comm_state, PostLocalSGDState):
        raise ConfigError(
            f"{name} with a PostLocalSGDState lets the ranks' weights drift apart between two averages, and the work "
            f"of an update cannot be shared then; leave ddp_comm_state out"
        )
    known = (DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
    if world > 1 and not isinstance(strategy, known):
        raise ConfigError(
            f"{name} on {world} devices is not supported; use DDPStrategy, DeepSpeedStrategy or ModelParallelStrategy"
        )
