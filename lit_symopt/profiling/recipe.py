"""The recipe of a profile: what it comes to, without building any of it, and what of it decides the cost."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lit_symopt.errors import ProfileError
from lit_symopt.profiling.spec import ProfileSpec
from lit_symopt.training import TrainingCLI, command_line

_OF_TRAINER = (
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "precision",
    "plugins",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "sync_batchnorm",
    "limit_train_batches",
    "overfit_batches",
)
_NOT_OF_COST = ("stack", "lr", "weight_decay", "schedule")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a recipe comes to.

    Attributes:
        name: of its first file.
        config: everything, as plain types.
    """

    name: str
    config: Mapping[str, Any]

    @staticmethod
    def resolve(arguments: Sequence[str]) -> Recipe:
        """Reads the arguments of `lit-symopt fit`; overlays and overrides are in.

        Raises:
            SymOptError, SystemExit: for wrong input, as `lit-symopt fit` would.
        """
        read = command_line(
            _ReadingCLI,
            arguments,
            parser_kwargs={"prog": "lit-symopt profile", "usage": "lit-symopt profile --config RECIPE [options]"},
            run=False,
            save_config_callback=None,
        )
        config = _plain(read.config.as_dict())
        files, _ = _files().parse_known_args(list(arguments))
        name = Path(files.config[0]).stem if files.config else _class_of(config["model"])
        return Recipe(name=name, config=config)

    @property
    def symopt(self) -> Mapping[str, Any] | None:
        """What the model's `SymOptConfig` says; `None` if it takes none."""
        chosen = (self.config["model"].get("init_args") or {}).get("symopt")
        return chosen if isinstance(chosen, Mapping) else None

    def essentials(self) -> dict[str, Any]:
        """What of model, data and trainer decides what a step costs, by dotted key; the stack is left out."""
        found: dict[str, Any] = {}
        for part in ("model", "data"):
            given = dict(self.config.get(part) or {})
            given["init_args"] = {key: v for key, v in (given.get("init_args") or {}).items() if key != "symopt"}
            found |= _flat(given, part)
        found.pop("data.init_args.seed", None)
        trainer = self.config["trainer"]
        return found | _flat({key: trainer.get(key) for key in _OF_TRAINER}, "trainer")

    def settings(self, *, against: bool) -> dict[str, Any]:
        """What the `SymOptConfig` says besides stack, rates and schedule; of another stack there are no roles."""
        given = {key: value for key, value in (self.symopt or {}).items() if key not in _NOT_OF_COST}
        if against:
            given["roles"] = {}
        return _flat(given, "")

    def check(self, spec: ProfileSpec) -> None:
        """Refuses what cannot be profiled.

        Raises:
            ProfileError: if the run is too short for the schedule, or on other machines too.
        """
        trainer = self.config["trainer"]
        most = trainer.get("max_steps", -1)
        if isinstance(most, int) and 0 <= most < spec.steps:
            raise ProfileError(
                f"trainer.max_steps={most} is less than the {spec.steps} optimizer steps that the spec needs "
                f"(skip_first={spec.skip_first} + {spec.repeat} × (wait={spec.wait} + warmup={spec.warmup} + "
                f"active={spec.active})); give --trainer.max_steps {spec.steps}, or a --spec of fewer steps"
            )
        if trainer.get("fast_dev_run"):
            raise ProfileError("trainer.fast_dev_run writes nothing, hence no profile; leave it out")
        if int(trainer.get("num_nodes") or 1) > 1:
            raise ProfileError(
                f"trainer.num_nodes={trainer['num_nodes']}: runs are started on this machine alone; give "
                "--trainer.num_nodes 1, or train with the callback KernelTime on all"
            )


class _ReadingCLI(TrainingCLI):
    """Reads a recipe as `fit` does, and builds nothing."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The one option of `fit` that is none of Trainer, model and data."""
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="a checkpoint to start from")

    @staticmethod
    def _roles(config: Any) -> Any:
        given = config.get("model.init_args.symopt")
        return None if given is None else given.get("roles")

    def _set_seed(self) -> None:
        """Nothing: it would say so, and leave variables in the environment."""

    def instantiate_classes(self) -> None:
        """Nothing."""

    def after_instantiate_classes(self) -> None:
        """Nothing."""


def _files() -> ArgumentParser:
    """Finds the files, which the config that was read does not name."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append")
    return parser


def _class_of(config: Mapping[str, Any]) -> str:
    return str(config.get("class_path", "recipe")).rpartition(".")[2].lower()


def _plain(value: Any) -> Any:
    """Types of JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; what is `None` or empty is left out, so that a new option changes nothing."""
    if isinstance(value, Mapping):
        items = ((f"{prefix}.{key}" if prefix else str(key), one) for key, one in value.items())
        return {name: leaf for key, one in items for name, leaf in _flat(one, key).items()}
    return {} if value is None or value == [] else {prefix: value}
