"""What entries of a study may be; what they may not be is a `ConfigError` that names them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lit_symopt.errors import ConfigError

MANAGED = (
    "config",
    "ckpt_path",
    "seed_everything",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.max_time",
    "trainer.callbacks",
    "trainer.logger",
    "trainer.default_root_dir",
    "trainer.enable_checkpointing",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.num_sanity_val_steps",
    "trainer.limit_val_batches",
    "trainer.val_check_interval",
    "trainer.check_val_every_n_epoch",
    "model.symopt.schedule.warmup_steps",
    "model.symopt.schedule.total_steps",
)
"""Options that a study sets itself."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_OPTION = re.compile(r"[A-Za-z_]\w*(\.\w+)*\+?")


def listed(value: Any, where: str) -> tuple[Any, ...]:
    """A list that is not empty and repeats nothing."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(f"{where} must be a list, not {value!r}")
    found = tuple(value)
    if not found:
        raise ConfigError(f"{where} is empty; give at least one value, or leave it out")
    refuse_repeated(found, where)
    return found


def refuse_repeated(values: Iterable[Any], where: str) -> None:
    """Refuses values of which one is there twice."""
    found = list(values)
    for value in found:
        if found.count(value) > 1:
            raise ConfigError(f"{where}: {value!r} is there twice; keep one")


def refuse_unknown(values: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuses values of which one is not known."""
    known = list(known)
    for value in values:
        if value not in known:
            raise ConfigError(f"unknown {where}: {value!r}; known: {', '.join(known)}")


def check_name(name: Any, what: str) -> None:
    """Refuses what cannot be part of file names."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a {what}: it becomes part of file names; use letters, digits, _ . -"
        )


def check_option(option: str, where: str) -> None:
    """Refuses what is no option of `lit-symopt fit`, or one that a study sets itself."""
    if not _OPTION.fullmatch(option):
        raise ConfigError(f"{where}: {option!r} is no option; write it as of lit-symopt fit, such as model.symopt.lr")
    managed = next((name for name in MANAGED if option.rstrip("+") == name or option.startswith(f"{name}.")), None)
    if managed:
        raise ConfigError(f"{where}: {option} is set by the study itself (steps, warmup, seeds, looks, callbacks)")


def check_set(value: Any, where: str) -> None:
    """Refuses what does not map options to values."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a mapping of options to values, not {value!r}")
    for option in value:
        check_option(str(option), where)


def number(value: Any, where: str) -> float:
    """A finite number as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{value!r} ({where}) must be a number")
    return float(value)


def check_whole(value: Any, where: str, *, least: int) -> None:
    """Refuses what is no whole number, or too small."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{where}: {value!r} must be a whole number, at least {least}")
