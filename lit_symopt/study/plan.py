"""The runs of a study: their names, and what each of them is as arguments of `lit-symopt fit`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lit_symopt.errors import ConfigError
from lit_symopt.study.result import RUNS, Purpose
from lit_symopt.study.spec import Study, short_name

_ACCUMULATE = "trainer.accumulate_grad_batches"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Args:
        family, contender: by name.
        purpose: a trial of the search, or a final run.
        seed: of weights and order of the data.
        length: steps as a share of those of the study.
        steps: optimizer steps.
        rates: what the search set, by option.
    """

    family: str
    contender: str
    purpose: Purpose
    seed: int
    length: float
    steps: int
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique in a study, and that of its folder: `qwen3-adamw-trial-lr0.005-s1`, `qwen3-adamw-final-x0.65-s2`."""
        if self.purpose == "trial":
            middle = "-".join(f"{short_name(option)}{rate:g}" for option, rate in self.rates.items())
        else:
            middle = f"x{self.length:g}"
        return f"{self.family}-{self.contender}-{self.purpose}-{middle}-s{self.seed}"

    def folder(self, study_folder: Path) -> Path:
        """Where its log and its result are."""
        return study_folder / RUNS / self.name

    def options(self, study: Study) -> dict[str, Any]:
        """All that is set over the recipe: study, family, contender, rates, then what the study sets itself."""
        family = study.family(self.family)
        own = {
            "seed_everything": self.seed,
            "trainer.max_steps": self.steps,
            "model.symopt.schedule.warmup_steps": min(round(study.warmup * self.steps), self.steps - 1),
            "model.symopt.schedule.total_steps": self.steps,
        }
        found: dict[str, Any] = {}
        for given in (study.set, family.set, study.contender(self.contender).set, self.rates, own):
            for option, value in given.items():
                found.pop(option, None)  # what is set again comes later, as on a command line
                found[option] = value
        return found

    def arguments(self, study: Study, folder: Path | None = None) -> list[str]:
        """What follows `lit-symopt fit` for a run that is this one but for what the study measures in it.

        Args:
            study: that it is of.
            folder: for files that callbacks write; default: that of the recipe.

        Raises:
            ConfigError: if the recipe cannot be read.
        """
        family, options = study.family(self.family), self.options(study)
        batches = options.get(_ACCUMULATE) or _accumulated(family.config)
        interval = math.ceil(self.steps / study.looks) * batches
        own: dict[str, Any] = {
            "trainer.max_epochs": -1,
            "trainer.check_val_every_n_epoch": None,
            "trainer.val_check_interval": interval,
            "trainer.limit_val_batches": study.look_batches,
            "trainer.num_sanity_val_steps": 0,
            "trainer.enable_checkpointing": False,
            "trainer.enable_progress_bar": False,
            "trainer.enable_model_summary": False,
            "trainer.logger": False,
            "trainer.callbacks": [*study.callbacks, *family.callbacks],
        }
        if folder is not None:
            own["trainer.default_root_dir"] = str(folder)
        return ["--config", family.config, *(f"--{name}={_text(value)}" for name, value in {**own, **options}.items())]


def trial(study: Study, *, family: str, contender: str, rates: Mapping[str, float]) -> Run:
    """The run that tries rates."""
    assert study.search is not None
    return Run(
        family=family,
        contender=contender,
        purpose="trial",
        seed=study.search.seed,
        length=1.0,
        steps=study.steps,
        rates=dict(rates),
    )


def finals(study: Study, *, family: str, contender: str, rates: Mapping[str, float]) -> list[Run]:
    """The final runs of a contender in a family, the longest first: all lengths with all seeds."""
    return [
        Run(
            family=family,
            contender=contender,
            purpose="final",
            seed=seed,
            length=length,
            steps=max(1, round(study.steps * length)),
            rates=dict(rates),
        )
        for length in sorted(study.contender(contender).lengths, reverse=True)
        for seed in study.seeds
    ]


class Names:
    """The names given so far: two different runs with one name would write the same files.

    Args:
        study: whose final runs, all but their rates, are known before anything has run.

    Raises:
        ConfigError: if two of these have the same name.
    """

    def __init__(self, study: Study) -> None:
        self._runs: dict[str, Run] = {}
        for family, contender in study.pairs():
            for run in finals(study, family=family.name, contender=contender.name, rates={}):
                self.add(run)

    def add(self, run: Run) -> None:
        """Takes a run in; the same one may come twice.

        Raises:
            ConfigError: if another run has its name.
        """
        bare = run if run.purpose == "trial" else replace(run, rates={})  # the best rates may change
        other = self._runs.setdefault(run.name, bare)
        if other != bare:
            raise ConfigError(
                f"two runs with the same name, {run.name}: {_said(other)} and {_said(run)}; rename a family or "
                "contender, or give values that differ in their first six digits"
            )


def _said(run: Run) -> str:
    return f"{run.contender} in {run.family} with {dict(run.rates)}, length {run.length}, seed {run.seed}"


def _text(value: Any) -> str:
    """A value as on the command line: YAML, of which JSON is a part."""
    return value if isinstance(value, str) else json.dumps(value)


def _accumulated(recipe: str) -> int:
    """Batches of an optimizer step, by the recipe."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        found = OmegaConf.select(OmegaConf.load(recipe), _ACCUMULATE)
    except OSError as error:
        raise ConfigError(f"the recipe {recipe} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"the recipe {recipe} is no such YAML file: {error}") from error
    return 1 if found is None else int(found)
