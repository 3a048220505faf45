"""Whole runs of Lightning's Trainer under any strategy: trained, saved, resumed and killed. Called on every rank.

A step takes the same six micro-batches whatever the number of ranks, which share them out and accumulate: one rank
takes all six, three ranks two each. The order of the data does the same. So all runs are one run, to rounding.
"""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MICRO_BATCHES = 6  # of a step, of all ranks together
WINDOWS = 2  # of a micro-batch
VOCABULARY = 61
LENGTH = 9
SAVED_AT, LAST = 5, 15
PLACES = {
    "1 process": (None, 1),
    "DDP of 2": ("ddp", 2),
    "ZeRO 1 of 2": ("zero1", 2),
    "ZeRO 2 of 3": ("zero2", 3),
    "ZeRO 3 of 2": ("zero3", 2),
    "FSDP2 of 2": ("fsdp2", 2),
    "FSDP2 of 3": ("fsdp2", 3),
}


def fit(
    place: str,
    folder: str,
    *,
    until: int = LAST,
    every: int | None = None,
    resume: str | None = None,
    kill: dict[str, int] | None = None,
    kill_in_save: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Train until step `until` and say what came out.

    Args:
        place: one of `PLACES`.
        folder: with the data; the checkpoints and the curve go there too.
        until: the last step.
        every: save a checkpoint every so many steps.
        resume: a checkpoint, or `last`: the newest whole one in the folder.
        kill: `rank` and `step`: which process ends as by `kill -9`, and after which step.
        kill_in_save: `rank` and `step`: which one ends in the midst of the first file that it writes after a step.

    Returns:
        Whole weights and what else must go on: `step`, `rates`, `schedule`, `tokens`, `consumed`, `counts` (of
        AdamW), the `curve` of losses by step; and `started_from`, `passed_over`, `strategy` and `rules`.
    """
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lit_symopt.checkpoint.io import WholeFiles
    from lit_symopt.models.checkpoint import newest_checkpoint

    warnings.simplefilter("ignore")
    world = PLACES[place][1]
    module = model()
    passed_over: list[str] = []
    if resume == "last":
        newest, passed_over = newest_checkpoint([(Path(folder), "*.ckpt")], module)
        resume = str(newest)
    curve = _curve()
    callbacks: list[Any] = [curve]
    if every is not None:
        callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1))
    if kill is not None:
        callbacks.append(_at(**kill, do=_die))
    if kill_in_save is not None:
        callbacks.append(_at(**kill_in_save, do=_die_in_the_next_save))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=_strategy(place),
        max_steps=until,
        max_epochs=-1,
        accumulate_grad_batches=MICRO_BATCHES // world,
        callbacks=callbacks,
        plugins=[] if place.startswith(("ZeRO", "FSDP2")) else [WholeFiles()],  # as the command line does
        logger=False,
        enable_checkpointing=every is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=folder,
    )
    trainer.fit(module, _data(folder), ckpt_path=resume)
    (wrapped,), (schedule,) = trainer.optimizers, trainer.lr_scheduler_configs
    optimizer: Any = getattr(wrapped, "optimizer", wrapped)  # DeepSpeed wraps ours
    loader: Any = trainer.train_dataloader
    counts = {float(state["step"]) for state in optimizer.state.values() if "step" in state}
    return {
        "weights": whole_weights(module),
        "step": trainer.global_step,
        "rates": {group["name"]: group["lr"] for group in optimizer.param_groups},
        "schedule": schedule.scheduler.last_epoch,
        "tokens": module.tokens_seen,
        "consumed": loader.sampler.consumed,
        "counts": counts,
        "curve": curve.losses,
        "started_from": None if resume is None else Path(resume).name,
        "passed_over": passed_over,
        "strategy": None if optimizer.distribution is None else optimizer.distribution.strategy,
        "rules": {group["rule"] for group in optimizer.param_groups},
    }


def model() -> Any:
    """A mixture of experts of awkward sizes under a rate that changes every step; the same every time."""
    from lit_symopt.config import RoleConfig, ScheduleConfig, SymOptConfig
    from lit_symopt.models import OLMoE

    torch.manual_seed(0)
    return OLMoE(
        vocab_size=VOCABULARY,
        hidden_size=12,
        intermediate_size=7,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=5,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
        load_balancing_loss=0.01,
        symopt=SymOptConfig(
            weight_decay=0.1,
            roles={"expert_down": RoleConfig(rule="adamw", lr=2e-3)},
            schedule=ScheduleConfig(kind="cosine", warmup_steps=3, total_steps=20),
        ),
    )


def write_data(folder: Path, *, micro_batches: int = 400) -> Path:
    """The training data of `fit`, an epoch of so many micro-batches: a random walk over tokens, something to learn."""
    from lit_symopt.data.shards import write_shard

    tokens = micro_batches * WINDOWS * LENGTH
    steps = torch.randint(1, 4, (tokens,), generator=torch.Generator().manual_seed(0))
    write_shard(folder / "train.bin", (steps.cumsum(0) % VOCABULARY).tolist(), vocab_size=VOCABULARY)
    return folder


def written_curve(folder: Path) -> list[tuple[int, float]]:
    """Steps and losses in the order that runs in a folder have written them, those of killed runs included."""
    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a model, put together on every rank."""
    found = {}
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_id"):
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
        else:
            found[name] = getattr(parameter, "full_tensor", parameter.clone)().detach()
    return found


def _data(folder: str) -> Any:
    from lit_symopt.data import TokenShards

    train = str(Path(folder) / "train.bin")
    return TokenShards(train, vocab_size=VOCABULARY, sequence_length=LENGTH, batch_size=WINDOWS, seed=3)


def _strategy(place: str) -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    kind = PLACES[place][0]
    if kind is None:
        return "auto"
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    from lit_symopt.strategies import CPUDeepSpeedStrategy, FSDP2Strategy

    if kind == "fsdp2":
        return FSDP2Strategy(process_group_backend="gloo")
    return CPUDeepSpeedStrategy(stage=int(kind[-1]))


def _curve() -> Any:
    """A callback that keeps the mean loss of every step, over all its micro-batches, and writes it down at once."""
    import lightning as L

    class Curve(L.Callback):
        def __init__(self) -> None:
            self.losses: dict[int, float] = {}
            self._parts: list[float] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self._parts.append(float(trainer.callback_metrics["train/loss"]))  # the mean over ranks
            if len(self._parts) < trainer.accumulate_grad_batches:
                return
            self.losses[trainer.global_step] = sum(self._parts) / len(self._parts)
            self._parts.clear()
            if trainer.is_global_zero:
                with (Path(trainer.default_root_dir) / "curve.jsonl").open("a") as file:
                    line = {"step": trainer.global_step, "loss": self.losses[trainer.global_step]}
                    file.write(json.dumps(line) + "\n")

    return Curve()


def _at(*, rank: int, step: int, do: Callable[[], None]) -> Any:
    import lightning as L

    class At(L.Callback):
        """Comes before the `ModelCheckpoint`, which Lightning calls last."""

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_rank == rank and trainer.global_step == step:
                do()

    return At()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in_the_next_save() -> None:
    """Every strategy writes its files with `torch.save`: the next one is left half-written."""
    save = torch.save

    def half(contents: Any, target: Any, *_: Any, **__: Any) -> None:
        whole = BytesIO()
        save(contents, whole)
        written = whole.getvalue()[: len(whole.getvalue()) // 2]
        if isinstance(target, str | os.PathLike):
            Path(target).write_bytes(written)
        else:
            target.write(written)
            target.flush()
        _die()

    torch.save = half  # type: ignore[assignment]  # as much of it as is called
