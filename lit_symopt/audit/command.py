"""`lit-symopt audit`: the audit of a recipe, at its initial weights or those of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

from lit_symopt.audit.run import audit, taxonomy_of
from lit_symopt.config import SymOptConfig
from lit_symopt.errors import ConfigError
from lit_symopt.models.checkpoint import newest_checkpoint, open_checkpoint, refuse_another_architecture
from lit_symopt.optim import SymOpt
from lit_symopt.table import print_table
from lit_symopt.training import TrainingCLI, checkpoint_places, command_line, said_by_us

TOKENS = 512
"""About as many entries of the largest tensor of a batch are kept, and at least one sample."""

FAILED = 1


class AuditCLI(TrainingCLI):
    """Reads a recipe as `fit` does, and builds its model and data. There is no Trainer: nothing is run or written."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options that are the audit's own."""
        parser.add_argument(
            "--loss-only",
            action="store_true",
            help="leave the updates out, for stacks whose rules are not meant to commute",
        )
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="audit the weights of a checkpoint; `last` is the newest"
        )

    @staticmethod
    def _roles(config: Any) -> Any:
        given = config.get("model.init_args.symopt")
        return None if given is None else given.get("roles")

    def instantiate_classes(self) -> None:
        """Builds data, model, and what belongs to the Trainer, but no Trainer."""
        try:
            self.config_init = self.parser.instantiate_classes(self.config)
        except ValueError as error:
            raise said_by_us(error) or error from None
        self.datamodule, self.model = self.config_init.get("data"), self.config_init["model"]
        self.model.configure_model()

    def after_instantiate_classes(self) -> None:
        """Nothing: the checkpoint is looked for by `load_weights`."""

    def load_weights(self) -> None:
        """Loads the checkpoint that was asked for.

        Raises:
            CheckpointError: if there is none, or it is of another architecture.
        """
        asked = self.config.get("ckpt_path")
        if asked is None:
            return
        if asked == "last":
            chosen = {name: self.config_init.trainer.get(name) for name in ("logger", "callbacks", "default_root_dir")}
            trainer = L.Trainer(accelerator="cpu", devices=1, **chosen)  # only says where checkpoints are
            path, _ = newest_checkpoint(checkpoint_places(trainer), self.model, resume=False)
        else:
            path = Path(asked)
        checkpoint = open_checkpoint(path)
        refuse_another_architecture(checkpoint, self.model, source=str(path))
        self.model.load_state_dict(checkpoint["state_dict"])
        print(f"using {path}")

    def batch(self) -> Any:
        """The first samples of the first training batch.

        Raises:
            ConfigError: if the recipe has no training data.
        """
        if self.datamodule is not None:
            self.datamodule.prepare_data()
            self.datamodule.setup("fit")
        source = self.model if self.datamodule is None else self.datamodule
        loader = source.train_dataloader()
        if not hasattr(loader, "__iter__"):
            raise ConfigError(
                f"{type(source).__name__} has no training data, and an audit needs a batch; give data: ..."
            )
        return first_samples(next(iter(loader)))


def run(arguments: Sequence[str]) -> int:
    """Audit a recipe, print the block table and the report, and return the exit code: 0, or 1 if anything failed.

    Args:
        arguments: what follows the command's name.

    Raises:
        SymOptError: for wrong input that parsing does not see.
        SystemExit: with code 2 for wrong input that it does.
    """
    usage = "lit-symopt audit --config RECIPE [--loss-only] [--ckpt_path FILE] [options]"
    recipe = command_line(
        AuditCLI,
        arguments,
        parser_kwargs={"prog": "lit-symopt audit", "usage": usage},
        run=False,
        save_config_callback=None,
    )
    recipe.load_weights()
    model, batch = recipe.model, recipe.batch()
    taxonomy, config = taxonomy_of(model, batch), getattr(model, "symopt", SymOptConfig())
    print_table(SymOpt.for_module(model, taxonomy, config=config), taxonomy.frozen(model))
    report = audit(model, batch, taxonomy=taxonomy, config=config, loss_only=bool(recipe.config.get("loss_only")))
    print(f"\n{report}")
    return 0 if report.passed else FAILED


def first_samples(batch: Any) -> Any:
    """The first samples of a batch, as many as have about `TOKENS` entries in its largest tensor.

    >>> import torch
    >>> first_samples({"input_ids": torch.zeros(8, 256)})["input_ids"].shape
    torch.Size([2, 256])
    """
    tensors = [tensor for tensor in _tensors(batch) if tensor.dim() > 0]
    if not tensors:
        return batch
    samples = len(tensors[0])
    largest = max((tensor.shape[1] if tensor.dim() > 1 else 1) for tensor in tensors)
    return _cut(batch, samples, max(1, TOKENS // max(largest, 1)))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _cut(value: Any, samples: int, kept: int) -> Any:
    if isinstance(value, Tensor):
        return value[:kept] if value.dim() > 0 and len(value) == samples else value
    if isinstance(value, Mapping):
        return {name: _cut(item, samples, kept) for name, item in value.items()}
    return type(value)(_cut(item, samples, kept) for item in value) if type(value) in (list, tuple) else value
