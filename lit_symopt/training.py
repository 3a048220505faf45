"""`fit`, `validate` and `test`: LightningCLI over any LightningModule and LightningDataModule."""

from __future__ import annotations

import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from time import time
from typing import Any, TypeVar

import lightning as L
from jsonargparse import set_parsing_settings
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

from lit_symopt.checkpoint.io import WholeFiles
from lit_symopt.checkpoint.strategy import refuse_another_strategy
from lit_symopt.errors import ConfigError, SymOptError
from lit_symopt.models.checkpoint import (
    newest_checkpoint,
    open_header,
    refuse_another_architecture,
    refuse_another_run,
)
from lit_symopt.sharding.transport import end_process_group

_ROLE_OPTION = re.compile(r"(?P<roles>--model\.(init_args\.)?symopt\.roles)\.(?P<role>\w+)\.\w+")


class TrainingCLI(LightningCLI):
    """LightningCLI with one addition: the checkpoint to start from is found and checked before anything is written.

    `--ckpt_path last` is the newest whole checkpoint of earlier runs of the recipe (Lightning's own `last` looks in
    the new run's empty folder). A checkpoint of another architecture or, to train on, of another stack is refused.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods that are commands, each with the arguments that are not options."""
        known = LightningCLI.subcommands()
        return {name: known[name] for name in ("fit", "validate", "test")}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the command line, `--model.symopt.roles.ROLE.KEY VALUE` included for a role the recipe leaves out.

        jsonargparse sets a key inside a dict of dataclasses only where the dict has entries already. So the command
        line is first read without such options, and where the recipe has no roles an entry is made for the first.
        """
        arguments = sys.argv[1:] if args is None else args
        if isinstance(arguments, list):
            first = next((match for argument in arguments if (match := _ROLE_OPTION.match(argument))), None)
            if first and not self._roles(parser.parse_args(_without_roles(arguments))):
                arguments = _with_entry(arguments, first)
            self.config = parser.parse_args(arguments)
        else:
            super().parse_arguments(parser, args)

    @staticmethod
    def _roles(config: Any) -> Any:
        given = config.get(f"{config.subcommand}.model.init_args.symopt")
        return None if given is None else given.get("roles")

    def instantiate_classes(self) -> None:
        """Builds data, model and Trainer; what they say about wrong input is not buried in a parsing error."""
        _refuse_repeated(self._get(self.config, "trainer.callbacks"))
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise said_by_us(error) or self._said_by_strategy() or error from None

    def _said_by_strategy(self) -> SymOptError | None:
        """Why a strategy of ours cannot be built: jsonargparse keeps no cause where a type has alternatives."""
        strategy = self._get(self.config, "trainer.strategy")
        path = str(getattr(strategy, "class_path", ""))
        if path.startswith("lit_symopt."):
            try:
                resolve_name(path)(**strategy.init_args.as_dict())
            except SymOptError as error:
                return error
        return None

    def after_instantiate_classes(self) -> None:
        """Finds and checks the checkpoint, and sees to it that those of this run are written whole."""
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = WholeFiles()
        asked = self._get(self.config, "ckpt_path")
        if asked is None or asked == "best" or "://" in str(asked):
            return  # Lightning's own meaning
        resume = self.subcommand == "fit"
        if asked == "last":
            path, passed_over = newest_checkpoint(checkpoint_places(self.trainer), self.model, resume=resume)
            _announce([f"passed over: {reason}" for reason in passed_over])
        else:
            path = Path(asked)
            refuse = refuse_another_run if resume else refuse_another_architecture
            refuse(open_header(path), self.model, source=str(path))
        if path.is_dir():
            refuse_another_strategy(path, self.trainer)
        _announce([f"{'continuing from' if resume else 'using'} {path}"])
        for config in (self.config, self.config_init):  # what is saved with the run, and what is run
            config[self.subcommand]["ckpt_path"] = str(path)


def _refuse_repeated(callbacks: Any) -> None:
    """Refuses a callback of ours that is listed twice: both would keep the same state and write the same files."""
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    paths = [str(callback.get("class_path")) for callback in listed if callback is not None]
    for path in dict.fromkeys(paths):
        if path.startswith("lit_symopt.callbacks.") and paths.count(path) > 1:
            raise ConfigError(
                f"trainer.callbacks lists {path} {paths.count(path)} times, as when an overlay of configs/callbacks "
                "adds what the recipe has already; keep one"
            )


def checkpoint_places(trainer: L.Trainer) -> list[tuple[Path, str]]:
    """Where the Trainer's ModelCheckpoint put the checkpoints of earlier runs: folders, each with a glob pattern."""
    own = [callback.dirpath for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    fixed = [(Path(folder), "*.ckpt") for folder in own if folder is not None]
    if fixed:
        return fixed
    if not trainer.loggers:
        return [(Path(trainer.default_root_dir) / "checkpoints", "*.ckpt")]
    logger = trainer.loggers[0]
    return [(Path(logger.save_dir or trainer.default_root_dir) / str(logger.name), "*/checkpoints/*.ckpt")]


def run(arguments: Sequence[str] | None) -> None:
    """Run a Trainer command; `None` takes the process's arguments.

    Raises:
        SymOptError: for wrong input that parsing does not see.
        SystemExit: with code 2 for wrong input that it does.
    """
    usages = {name: {"usage": f"lit-symopt {name} --config RECIPE [options]"} for name in TrainingCLI.subcommands()}
    command_line(
        TrainingCLI,
        arguments,
        parser_kwargs={"prog": "lit-symopt", **usages},
        trainer_defaults={"callbacks": [_NothingHalfWritten()]},
    )
    end_process_group()


CLI = TypeVar("CLI", bound=TrainingCLI)


def command_line(
    kind: type[CLI], arguments: Sequence[str] | None, *, parser_kwargs: dict[str, Any], **options: Any
) -> CLI:
    """A command line over any LightningModule and LightningDataModule, with what goes wrong said as a SymOptError.

    Args:
        kind: the class that reads it, and runs what it says.
        arguments: the arguments; `None` takes the process's.
        parser_kwargs: name and usage of the program.
        options: of `LightningCLI`.
    """
    # `omegaconf+` resolves ${...} after the command line is read, so that an override reaches every value made of it.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    # Lightning 2.6 against torch 2.13 and newer; nothing the user could do about it.
    warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")
    try:
        return kind(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_kwargs={"parser_mode": "omegaconf+", **parser_kwargs},
            args=None if arguments is None else list(arguments),
            **options,
        )
    except OmegaConfBaseException as error:
        raise ConfigError(f"an interpolation of the recipe cannot be resolved: {error}") from error
    except MisconfigurationException as error:
        raise ConfigError(str(error)) from error


class _NothingHalfWritten(L.Callback):
    """Removes the log folder of a run that wrong input ended before its first batch."""

    def __init__(self) -> None:
        self._began = time()
        self._ran = False

    def on_train_batch_start(self, *_: Any) -> None:
        self._ran = True

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._ran or not isinstance(exception, SymOptError) or not trainer.is_global_zero or not trainer.loggers:
            return
        folder = Path(trainer.loggers[0].log_dir or "")
        files = [path for path in folder.rglob("*") if path.is_file()] if folder != Path() else []
        # A folder with anything older than this process is somebody else's.
        if files and all(path.stat().st_mtime >= self._began for path in files):
            shutil.rmtree(folder)
            for parent in list(folder.parents)[:2]:  # the logger's name and save_dir
                if parent != Path() and not any(parent.iterdir()):
                    parent.rmdir()


def said_by_us(error: BaseException) -> SymOptError | None:
    """The SymOptError that an error was raised for, if there is one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, SymOptError):
        cause = cause.__cause__ or cause.__context__
    return cause


def _without_roles(arguments: Sequence[str]) -> list[str]:
    """The arguments without those that reach into a role, and without those that only print."""
    kept, skip = [], False
    for argument in arguments:
        reaches = _ROLE_OPTION.match(argument) is not None
        if not (skip or reaches or argument.startswith("--print_config")):
            kept.append(argument)
        skip = reaches and "=" not in argument  # its value comes next
    return kept


def _with_entry(arguments: Sequence[str], option: re.Match[str]) -> list[str]:
    """The arguments with an empty entry made for the role that `option`, one of them, reaches into."""
    where = arguments.index(option.string)
    return [*arguments[:where], f"{option['roles']}.{option['role']}={{}}", *arguments[where:]]


@rank_zero_only
def _announce(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, flush=True)
