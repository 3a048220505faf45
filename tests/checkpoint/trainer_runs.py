"""A tiny Qwen3 trained by the Trainer under any strategy, on the same batches whatever the number of processes."""

from __future__ import annotations

import os
import signal
import warnings
from typing import Any

import torch
from torch import Tensor

GLOBAL_BATCH = 6


def fit(
    strategy: str,
    steps: int,
    *,
    devices: int = 2,
    resume: str | None = None,
    save: str | None = None,
    save_at: int | None = None,
    deadly: bool = False,
    stack: Any = "symmetric",
) -> dict[str, Any]:
    """Train until `steps`; called in every process.

    Args:
        strategy: `one`, `ddp`, `fsdp2`, `zero1`, `zero2` or `zero3`.
        steps: in all, those of the checkpoint included.
        devices: processes.
        resume: a checkpoint.
        save: where to put one.
        save_at: after this many steps; default: at the end.
        deadly: kill the last process in the midst of that save.
        stack: of the optimizer.

    Returns:
        Whole weights, global step, tokens seen and rates; `error` if it was one of ours.
    """
    import lightning as L

    from lit_symopt.errors import SymOptError

    warnings.simplefilter("ignore")
    module = module_of(stack)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        strategy=_strategy(strategy),
        use_distributed_sampler=False,
        callbacks=[_saving(save, steps if save_at is None else save_at, deadly=deadly)] if save else [],
    )
    try:
        trainer.fit(module, _batches(), ckpt_path=resume)
    except SymOptError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    (optimizer,) = trainer.optimizers
    optimizer = getattr(optimizer, "basic_optimizer", getattr(optimizer, "optimizer", optimizer))
    return {
        "weights": _whole(module),
        "step": trainer.global_step,
        "tokens": module.tokens_seen,
        "rates": [group["lr"] for group in optimizer.param_groups],
    }


def module_of(stack: Any = "symmetric") -> Any:
    """The model, the same every time; made here, so that lightning is late."""
    from lit_symopt import ScheduleConfig, SymOptConfig
    from lit_symopt.models import Qwen3

    class Steady(Qwen3):
        """Takes the batch of the global step: a loader that was resumed would begin anew."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            tokens = torch.randint(0, 31, (GLOBAL_BATCH, 8), generator=torch.Generator().manual_seed(self.global_step))
            return super().training_step({"input_ids": tokens[self.global_rank :: self.trainer.world_size]}, batch_idx)

    torch.manual_seed(0)
    return Steady(
        vocab_size=31,
        hidden_size=12,
        intermediate_size=19,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        max_position_embeddings=16,
        symopt=SymOptConfig(
            stack=stack, lr=1e-2, schedule=ScheduleConfig(kind="cosine", warmup_steps=2, total_steps=12)
        ),
    )


def _batches() -> Any:
    from torch.utils.data import DataLoader

    blank = {"input_ids": torch.zeros(8, dtype=torch.long)}
    return DataLoader([blank] * 100, batch_size=1)  # type: ignore[arg-type]


def _strategy(name: str) -> Any:
    if name in ("one", "ddp"):
        return {"one": "auto", "ddp": "ddp"}[name]
    if name == "fsdp2":
        from lit_symopt.strategies import FSDP2Strategy

        return FSDP2Strategy()
    from lit_symopt.strategies import CPUDeepSpeedStrategy

    return CPUDeepSpeedStrategy(stage=int(name[-1]))


def _saving(path: str, at: int, *, deadly: bool) -> Any:
    """A callback that saves after a number of steps."""
    import lightning as L

    class Saving(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step != at:
                return
            if deadly and trainer.global_rank == trainer.world_size - 1:
                torch.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
            trainer.save_checkpoint(path)

    return Saving()


def _whole(module: torch.nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_id"):
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
        else:
            found[name] = getattr(parameter, "full_tensor", parameter.clone)().detach()
    return found
