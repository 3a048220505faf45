"""What is kept of one run of a study: `runs/<name>/result.json`, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from lit_symopt.errors import ConfigError

FORMAT = 1
RUNS = "runs"
RESULT = "result.json"
Purpose = Literal["trial", "final"]
Status = Literal["finished", "diverged"]
Point = tuple[int, int, float, float]
"""Step, tokens, seconds, loss."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A run that trained to its end, or diverged. Losses are means in nats a token; what is not finite is left out.

    Attributes:
        run: its name, which is that of its folder.
        study, family, contender, purpose: what it was for.
        stack: of the optimizer.
        seed: of weights and order of the data.
        length: steps as a share of those of the study.
        steps: optimizer steps asked for.
        rates: what the search set, by option.
        options: everything that was set over the recipe, by option.
        status: whether it reached its end.
        loss: over the whole validation set after the last step; `None` if it diverged.
        tokens: trained on.
        seconds: training alone: no start-up, no validation.
        wall_seconds: the whole run.
        parameters: numbers that were trained.
        curve: validation losses on the way, on a few batches.
        train: training losses of single batches, about fifty of them.
        records: values of the recorded tags, `(step, value)`.
        environment: `torch`, `python`, `machine`, `threads`, `commit`.
    """

    run: str
    study: str
    family: str
    contender: str
    stack: str
    purpose: Purpose
    seed: int
    length: float
    steps: int
    rates: Mapping[str, float]
    options: Mapping[str, Any]
    status: Status
    loss: float | None
    tokens: int
    seconds: float
    wall_seconds: float
    parameters: int
    curve: tuple[Point, ...] = ()
    train: tuple[Point, ...] = ()
    records: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """Writes `result.json` into a folder that is there, as a whole or not at all, and returns its path.

        Raises:
            OSError: if it cannot be written, as on a full disk.
        """
        path = folder / RESULT
        half = path.with_name(f".{path.name}.half")
        try:
            half.write_text(
                json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False) + "\n", encoding="utf-8"
            )
            os.replace(half, path)
        except OSError:
            with suppress(OSError):
                half.unlink(missing_ok=True)
            raise
        return path

    @staticmethod
    def load(path: Path) -> Result:
        """Reads what `save` wrote.

        Raises:
            ConfigError: for a file that is not one.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value.pop("format") != FORMAT:
                raise ConfigError(f"{path} has another format than {FORMAT}; remove its folder and run the study again")
            value["curve"] = tuple(_point(point) for point in value["curve"])
            value["train"] = tuple(_point(point) for point in value["train"])
            value["records"] = {
                tag: tuple((int(step), float(number)) for step, number in values)
                for tag, values in value["records"].items()
            }
            missing = sorted({entry.name for entry in fields(Result)} - set(value))
            if missing:
                raise ValueError(f"no {', '.join(missing)}")
            return Result(**value)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{path} is not the result of a run ({error}); remove its folder and run the study again"
            ) from error


def read_results(folder: Path) -> list[Result]:
    """The results below the folder of a study, sorted by the names of the runs; none if there is no such folder.

    Raises:
        ConfigError: for a file that cannot be read, naming it.
    """
    return [
        Result.load(path) for path in sorted((folder / RUNS).glob(f"*/{RESULT}"), key=lambda path: path.parent.name)
    ]


def _point(values: Any) -> Point:
    step, tokens, seconds, loss = values
    return int(step), int(tokens), float(seconds), float(loss)
