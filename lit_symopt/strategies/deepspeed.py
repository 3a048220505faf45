"""Lightning's `DeepSpeedStrategy` with what `SymOpt` needs set, whole checkpoints, and ordinary ones loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy as LightningDeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lit_symopt.checkpoint.consolidate import normalized
from lit_symopt.checkpoint.folder import Folder
from lit_symopt.checkpoint.named import load_named, named_state
from lit_symopt.checkpoint.storage import load_mapped, scratch_beside
from lit_symopt.checkpoint.strategy import refuse_another_strategy
from lit_symopt.errors import CheckpointError, ConfigError, GradientError
from lit_symopt.optim import SymOpt
from lit_symopt.sharding.zero_weights import load_weights, publish
from lit_symopt.strategies.whole_folder import whole_folder


class DeepSpeedStrategy(LightningDeepSpeedStrategy):
    """DeepSpeed ZeRO 1, 2 and 3 for `SymOpt`; every argument is Lightning's.

    Beyond Lightning's own it
    - sets `zero_allow_untested_optimizer` and `zero_force_ds_cpu_optimizer` in the DeepSpeed config, also in one that
      was given, and refuses an `optimizer` there;
    - takes the steps and the gradients that the other strategies take when batches are accumulated;
    - raises where DeepSpeed silently skips a step because a gradient is not finite (not in fp16, whose loss scale is
      found that way);
    - writes a checkpoint folder beside its place and renames it, so that an interrupted save never looks whole;
    - resumes an ordinary checkpoint file too, weights and optimizer state: one of a single device or DDP, or what
      `lit-symopt checkpoint consolidate` makes of a folder of any other strategy or number of processes.

    A LightningModule without `SymOptMixin` needs `lit_symopt.AttachOptimizer` among the callbacks.

    Raises:
        ConfigError: without DeepSpeed, or for a config that leaves `SymOpt` out.

    Example (YAML):
        trainer:
          strategy: {class_path: lit_symopt.strategies.DeepSpeedStrategy, init_args: {stage: 2}}
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if find_spec("deepspeed") is None:
            raise ConfigError(
                f'{type(self).__name__} needs DeepSpeed, which is not installed: pip install "lit-symopt[deepspeed]"'
            )
        super().__init__(*args, **kwargs)
        assert self.config is not None
        _complete(self.config)
        self._from_file = False

    def setup_environment(self) -> None:
        """Lightning's, for GPUs.

        Raises:
            ConfigError: on anything else.
        """
        if not isinstance(self.accelerator, CUDAAccelerator):
            raise ConfigError(
                f"{type(self).__name__} needs GPUs and the Trainer has a {type(self.accelerator).__name__}; on "
                "processes of a CPU use lit_symopt.strategies.CPUDeepSpeedStrategy (configs/strategy/cpu/)"
            )
        super().setup_environment()

    # -- steps ---------------------------------------------------------------------------------------------------

    @property
    def handles_gradient_accumulation(self) -> bool:
        """The Trainer says when a step is due, as under every other strategy, and the engine follows; see `backward`.

        Left to itself the engine counts batches on across epochs, and the Trainer, with it the schedule, begins anew
        with each: wherever an epoch is no whole number of steps the two take different ones.
        """
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Nothing: the engine knows by its boundary what to reduce, and refuses to hold it back in ZeRO 2 and 3."""
        yield

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """A backward pass of the engine, without its division by the number of accumulated batches.

        In automatic optimization the Trainer has divided the loss by `accumulate_grad_batches` already: with both,
        gradients and the momentum in a checkpoint would be that many times too small. In manual optimization the
        engine's is the only one.
        """
        assert self.lightning_module is not None
        if self.lightning_module.automatic_optimization:
            kwargs.setdefault("scale_wrt_gas", False)
            engine: Any = self.deepspeed_engine
            engine.set_gradient_accumulation_boundary(not self._trainer().fit_loop._should_accumulate())
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """A step of the engine.

        Raises:
            GradientError: on all ranks, if DeepSpeed found a gradient that is not finite and skipped the step.
        """
        engine: Any = self.deepspeed_engine
        skipped = engine.skipped_steps
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        if engine.skipped_steps > skipped and not engine.fp16_enabled():
            raise GradientError(
                f"a gradient of engine step {engine.global_steps} is not finite, and DeepSpeed skipped the step on "
                "all ranks. No weight and no state was changed. Look at the loss of this batch; lower the learning "
                "rate or clip gradients (Trainer(gradient_clip_val=...)) if it grew."
            )
        return result

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Saves a folder to which every rank contributes; it appears under its name when it is whole."""
        path = self.broadcast(filepath)
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        engine: Any = self.deepspeed_engine
        local = engine.use_node_local_storage()  # then every node has a folder of its own
        leads = (self.local_rank if local else self.global_rank) == 0
        with whole_folder(Path(path), leads=leads, barrier=self.barrier) as partial:
            super().save_checkpoint(checkpoint, str(partial), storage_options)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a folder of the same stage and number of processes, or an ordinary file.

        Raises:
            CheckpointError: for a folder that lacks a file or was saved by another strategy, naming both.
        """
        path, trainer = Path(checkpoint_path), self._trainer()
        self._from_file = path.is_file() and not (self.load_full_weights and self.zero_stage_3)
        if self._from_file:
            return normalized(load_mapped(path))
        if path.is_dir():
            folder = Folder.at(path)
            folder.refuse_incomplete()
            if trainer.state.fn == TrainerFn.FITTING:
                refuse_another_strategy(path, trainer)
            elif self.zero_stage_3:  # DeepSpeed's own way fails where there is no optimizer (0.19.8)
                self._from_file = True
                with scratch_beside(path) as scratch:
                    return folder.assemble(scratch)
        return super().load_checkpoint(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Weights and buffers of an ordinary file; those of a folder are there already."""
        if not self._from_file:
            super().load_model_state_dict(checkpoint, strict)
            return
        engine: Any = self.deepspeed_engine
        load_weights(engine, checkpoint["state_dict"], strict=strict)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether the Trainer is to call `load_optimizer_state_dict`."""
        return self._from_file or super().lightning_restore_optimizer

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """The optimizer's state in an ordinary file, by parameter name, and the weights in full precision.

        Raises:
            CheckpointError: if it is of another model or stack, naming the blocks.
        """
        if not self._from_file:
            super().load_optimizer_state_dict(checkpoint)
            return
        engine: Any = self.deepspeed_engine
        optimizer, states = engine.basic_optimizer, checkpoint["optimizer_states"]
        if not isinstance(optimizer, SymOpt) or len(states) != 1:
            raise CheckpointError(
                f"the checkpoint has the state of {len(states)} optimizer(s) and this run has a "
                f"{type(optimizer).__name__}: under DeepSpeed an ordinary file can be resumed by one SymOpt alone"
            )
        if optimizer.distribution is None:
            optimizer.attach(engine)
        assert optimizer.distribution is not None
        load_named(optimizer, optimizer.distribution, named_state(states[0]), checkpoint["state_dict"])
        publish(engine)

    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer


def _complete(config: dict[str, Any]) -> None:
    """Set what DeepSpeed asks for before it takes an optimizer that it does not know.

    Raises:
        ConfigError: if the config says the contrary, or has an optimizer of its own, which Lightning would prefer.
    """
    if "optimizer" in config:
        given = config["optimizer"]
        kind = given.get("type", given) if isinstance(given, Mapping) else given
        raise ConfigError(
            f"the DeepSpeed config has an optimizer of its own, {kind!r}, and Lightning would use that one and never "
            "call configure_optimizers: remove the key `optimizer`"
        )
    for key, needed in (("zero_allow_untested_optimizer", True), ("zero_force_ds_cpu_optimizer", False)):
        if config.setdefault(key, needed) is not needed:
            raise ConfigError(
                f"the DeepSpeed config sets {key}: {str(not needed).lower()}, with which DeepSpeed accepts no "
                f"optimizer but its own; remove it"
            )
