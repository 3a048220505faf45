"""Trainings of a small network under any strategy, with the same batches whatever the number of processes."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 6  # of all processes together


def module_of(**options: Any) -> Any:
    """A network with odd sizes, a tied weight, a frozen one and a buffer; made here, so that lightning is late."""
    import lightning as L

    from lit_symopt import Block, BlockTaxonomy, Role, ScheduleConfig, SymOptConfig, SymOptMixin

    class Net(SymOptMixin, L.LightningModule):
        symopt = SymOptConfig(lr=0.02, schedule=ScheduleConfig(warmup_steps=2), **options.get("symopt", {}))

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.embed = nn.Embedding(9, 5)
            self.mix = nn.Linear(5, options.get("width", 7))
            self.frozen = nn.Linear(options.get("width", 7), 5).requires_grad_(False)
            self.head = nn.Linear(5, 9)
            self.head.weight = self.embed.weight
            self.register_buffer("seen", torch.zeros(2))
            self.poisoned = -1

        def block_taxonomy(self) -> BlockTaxonomy:
            return BlockTaxonomy(
                [
                    Block("embed.weight", role=Role.TIED_EMBEDDING),
                    Block("mix.weight", role=Role.LINEAR),
                    Block("*bias", role=Role.VECTOR),
                ]
            )

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            tokens, targets = share(self.global_step, rank=self.global_rank, world=self.trainer.world_size)
            self.get_buffer("seen").add_(1.0)
            hidden = self.embed(tokens) + self.frozen(torch.tanh(self.mix(self.embed(tokens))))
            loss = nn.functional.cross_entropy(self.head(hidden).float(), targets)
            bad = self.global_step == self.poisoned and self.global_rank == self.trainer.world_size - 1
            return loss * torch.nan if bad else loss

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("loss", self.training_step(batch, batch_idx), sync_dist=True)

    return Net()


def share(step: int, *, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """One process's tokens and targets of a step, whatever a loader that was resumed would give."""
    tokens = torch.randint(9, (BATCH,), generator=torch.Generator().manual_seed(100 + step))
    return tokens[rank::world], tokens.roll(1)[rank::world]


def batches() -> Any:
    """As many batches as are asked for, with nothing in them."""
    from torch.utils.data import DataLoader

    return DataLoader(torch.zeros(100, 1), batch_size=1)  # type: ignore[arg-type]


def strategy_of(stage: int | None, **options: Any) -> Any:
    """`CPUDeepSpeedStrategy`, or nothing for one process."""
    if stage is None:
        return "auto"
    from lit_symopt.strategies import CPUDeepSpeedStrategy

    return CPUDeepSpeedStrategy(zero_optimization=stage > 0, stage=stage, **options)


def fit(
    stage: int | None,
    steps: int,
    *,
    devices: int = 1,
    resume: str | None = None,
    save: str | None = None,
    precision: str = "32-true",
    poisoned: int = -1,
    strategy: dict[str, Any] | None = None,
    module: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train until `steps`, and say what came out: whole weights on every rank, and the optimizer's."""
    import lightning as L

    warnings.simplefilter("ignore")
    net = module_of(**(module or {}))
    net.poisoned = poisoned
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        strategy=strategy_of(stage, **(strategy or {})),
        use_distributed_sampler=False,
        precision=precision,  # type: ignore[arg-type]
        **options,
    )
    found: dict[str, Any] = {"error": ""}
    try:
        trainer.fit(net, batches(), ckpt_path=resume)
    except ValueError as error:
        found["error"] = f"{type(error).__name__}: {error}"
    if save is not None:
        trainer.save_checkpoint(save)
    if not found["error"]:
        found |= {"weights": whole(net), "step": trainer.global_step, "seen": net.get_buffer("seen").clone()}
        (optimizer,) = trainer.optimizers
        symopt: Any = getattr(optimizer, "basic_optimizer", getattr(optimizer, "optimizer", optimizer))
        found["attached"] = None if symopt.distribution is None else symopt.distribution.strategy
        found["lr"] = [group["lr"] for group in symopt.param_groups]
    return found


def whole(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a model, put together."""
    found = {}
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_id"):
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([parameter]):
                found[name] = parameter.detach().float().clone()
        else:
            found[name] = parameter.detach().float().clone()
    return found


def die_while_saving(stage: int, path: str, where: str) -> None:
    """Train, save, and kill the last process in the midst of writing."""
    import signal

    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    save = TorchCheckpointEngine.save

    def write_or_die(self: Any, state_dict: Any, path: str) -> None:
        if where in Path(path).name:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, state_dict, path)

    TorchCheckpointEngine.save = write_or_die
    fit(stage, 1, devices=2, save=path)
