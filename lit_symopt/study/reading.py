"""A study from its YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from lit_symopt.errors import ConfigError
from lit_symopt.study.checks import listed, refuse_unknown
from lit_symopt.study.spec import Axis, Contender, Family, Search, Study


def load(path: str | Path) -> Study:
    """Reads a study.

    Raises:
        ConfigError: for a file that cannot be read, an unknown key, or what does not fit together.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        loaded = OmegaConf.load(path)
        value: Any = OmegaConf.to_container(loaded, resolve=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the study {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"the study {path} is no such YAML file: {error}") from error
    try:
        return from_dict(value)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def from_dict(value: Any) -> Study:
    """A study of plain types, as YAML gives them.

    Raises:
        ConfigError: as of `load`.
    """
    entries = _mapping(value, "the study", Study)
    families = _named(entries.pop("families"), "families")
    contenders = _named(entries.pop("contenders"), "contenders")
    if entries.get("search") is not None:
        entries["search"] = Search(**_mapping(entries["search"], "search", Search))
    entries["seeds"] = listed(entries["seeds"], "seeds")
    for key in ("record", "callbacks"):
        if entries.get(key):
            entries[key] = listed(entries[key], key)
        else:
            entries.pop(key, None)  # an empty list is the default
    return Study(
        families=tuple(_family(name, one) for name, one in families.items()),
        contenders=tuple(_contender(name, one) for name, one in contenders.items()),
        **entries,
    )


def _family(name: str, value: Any) -> Family:
    where = f"families.{name}"
    entries = _mapping({"config": value} if isinstance(value, str) else value, where, Family, name=name)
    if entries.get("callbacks"):
        entries["callbacks"] = listed(entries["callbacks"], f"{where}.callbacks")
    else:
        entries.pop("callbacks", None)
    return Family(**entries)


def _contender(name: str, value: Any) -> Contender:
    where = f"contenders.{name}"
    entries = _mapping({} if value is None else value, where, Contender, name=name)
    search = entries.pop("search", None)
    axes = [] if search is None else [_axis(option, axis) for option, axis in _named(search, f"{where}.search").items()]
    for key in ("lengths", "families"):
        if entries.get(key) is not None:
            entries[key] = listed(entries[key], f"{where}.{key}")
        else:
            entries.pop(key, None)
    return Contender(search=tuple(axes), **entries)


def _axis(option: str, value: Any) -> Axis:
    entries = _mapping(value, f"search of {option}", Axis, option=option)
    if entries.get("families") is not None:
        entries["families"] = listed(entries["families"], f"families of the search of {option}")
    return Axis(**entries)


def _mapping(value: Any, where: str, kind: type, **given: Any) -> dict[str, Any]:
    """The entries of a mapping, if it has all that `kind` needs and nothing that it does not know."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a mapping of keys to values, not {value!r}")
    keys = [entry.name for entry in fields(kind) if entry.name not in given]
    refuse_unknown([str(key) for key in value], keys, f"key of {where}")
    found = {str(key): one for key, one in value.items()} | given
    for entry in fields(kind):
        if entry.default is MISSING and entry.default_factory is MISSING and found.get(entry.name) is None:
            raise ConfigError(f"{where} has no {entry.name}")
        if entry.name in found and found[entry.name] is None and entry.default is not None:
            del found[entry.name]  # an empty entry is the default
    return found


def _named(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(f"{where} must name at least one entry, not {value!r}")
    found = {str(key): one for key, one in value.items()}
    if len(found) < len(value):
        raise ConfigError(f"{where}: a name is there twice, once as text and once as a number")
    return found
