"""The folder of a study: whose it is, and that no two studies write to it at once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from lit_symopt.errors import ConfigError
from lit_symopt.study.search import JOURNAL
from lit_symopt.study.spec import Study

STUDIES = Path("runs") / "studies"
SPEC = "spec.yaml"
LOCK = ".lock"


@contextmanager
def claimed(study: Study, folder: Path) -> Iterator[None]:
    """Makes the folder this study's for a while, and keeps the study in it as `spec.yaml`.

    Raises:
        ConfigError: if another study runs there, or its runs are of a study that this one does not extend.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}; choose another folder with --out") from error
    try:
        with FileLock(folder / LOCK, timeout=0):
            refuse_another(study, folder)
            # A study that was killed while it wrote leaves Optuna's own lock, for which the next would wait forever.
            for left in folder.glob(f"{JOURNAL}.lock*"):
                left.unlink()
            _write(folder / SPEC, yaml.safe_dump(described(study), sort_keys=False, allow_unicode=True))
            yield
    except Timeout:
        raise ConfigError(f"a study is running in {folder}; wait for it, or choose another folder with --out") from None


def refuse_another(study: Study, folder: Path) -> None:
    """Compares a study with the one whose runs are in the folder, if any.

    It may have more families, contenders, lengths, seeds and trials, other families of a contender or of an option of
    its search, and another reference.

    Raises:
        ConfigError: saying what differs.
    """
    path = folder / SPEC
    if not path.exists():
        return
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = list(differences(before, described(study)))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{path} is not the description of a study ({error}); choose another folder with --out"
        ) from None
    if found:
        raise ConfigError(
            f"{folder} has the runs of another study; what differs: {'; '.join(found)}. Choose another folder with "
            "--out, or undo that"
        )


def described(study: Study) -> dict[str, Any]:
    """A study with what its recipes come to, as plain types."""
    return {"study": study.to_dict(), "recipes": {family.name: _recipe(family.config) for family in study.families}}


def differences(before: Any, now: Any, *, path: tuple[str, ...] = ()) -> Iterator[str]:
    """What makes `now` another study than `before`, and not one with more of the same.

    Example:
        >>> list(differences({"study": {"steps": 1, "seeds": [2]}}, {"study": {"steps": 3, "seeds": [2, 4]}}))
        ['steps was 1 and is 3']
    """
    if before == now or path == ("study", "reference") or (path == ("study", "search") and before is None):
        return
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            if key not in before and path in (("study", "families"), ("study", "contenders"), ("recipes",)):
                continue
            yield from differences(before.get(key), now.get(key), path=(*path, str(key)))
    elif not _extends(before, now, path):
        where = f"recipe of {path[1]}" if path[0] == "recipes" else ".".join(path[1:])
        was, is_ = (value if path[0] != "recipes" else f"of content {value}" for value in (before, now))
        yield f"{where} was {was} and is {is_}"


def _extends(before: Any, now: Any, path: tuple[str, ...]) -> bool:
    if path[:2] == ("study", "contenders") and path[-1] == "families":
        return True  # who takes part; results that do not fit the search are refused when they are told
    if path == ("study", "seeds") or (path[:2] == ("study", "contenders") and path[3:] == ("lengths",)):
        return all(value in now for value in before)
    return path == ("study", "search", "trials") and bool(before and now and now > before)


def _recipe(path: str) -> str:
    """A short hash of what a recipe says; comments and order do not count."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except OSError as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"the recipe {path} is no such YAML file: {error}") from error
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _write(path: Path, text: str) -> None:
    half = path.with_name(f".{path.name}.half")
    half.write_text(text, encoding="utf-8")
    os.replace(half, path)
