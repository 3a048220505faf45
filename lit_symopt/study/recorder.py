"""What is measured inside a run: losses, tokens and seconds of training, and logged tags."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger

from lit_symopt.errors import ConfigError, SymOptError
from lit_symopt.study.result import Point

LOOK = "val/loss"
LOSS = "train/loss"
POINTS = 50
"""Training losses of a run; between two of them no loss is read."""


class DivergedError(SymOptError):
    """A loss that is not finite."""


class Clock:
    """Seconds of training: it stands still from the last batch before a validation to its end.

    Args:
        now: the time in seconds.

    Example:
        >>> times = iter([10.0, 12.0, 13.0, 20.0, 21.0])
        >>> clock = Clock(lambda: next(times))
        >>> clock.go()
        >>> clock.mark(), clock.mark()
        (2.0, 3.0)
        >>> clock.go()    # 7 seconds of validation are left out
        >>> clock.mark()
        4.0
    """

    def __init__(self, now: Any = perf_counter) -> None:
        self._now = now
        self._from = 0.0
        self._before = 0.0
        self.seconds = 0.0

    def go(self) -> None:
        """Counts from here on; what has passed since the last mark is left out."""
        self._from, self._before = self._now(), self.seconds

    def mark(self) -> float:
        """The seconds until now, kept as `seconds`."""
        self.seconds = self._before + self._now() - self._from
        return self.seconds


class Recorder(L.Callback):
    """Measures a run of a known number of steps, and ends it when it diverges.

    Training losses are read about fifty times in a run, at the first step and the last one, and validation losses at
    every validation; seconds are those of training alone. On an accelerator reading a loss waits for it, so that the
    points of the curves are honest and the steps between them are not slowed down.

    Args:
        steps: optimizer steps of the run.

    Raises:
        DivergedError: out of the fit, when one of these losses is not finite.
    """

    def __init__(self, *, steps: int) -> None:
        self.steps = steps
        self.clock = Clock()
        self.tokens = 0
        self.curve: list[Point] = []
        self.train: list[Point] = []
        self._every = max(1, steps // POINTS)
        self._read = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self.clock.go()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads the clock, and the loss if a point is due."""
        self.tokens += _tokens(batch) * trainer.world_size
        step = trainer.global_step
        if step > self._read and (step == 1 or step % self._every == 0 or step == self.steps):
            self._read = step
            loss = trainer.callback_metrics.get(LOSS)
            value = float(outputs["loss"] if loss is None else loss)
            self._add(self.train, step, self.clock.mark(), value, "training")
        else:
            self.clock.mark()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Waits for an accelerator, whose work of the last steps counts as training."""
        if pl_module.device.type == "cuda" and trainer.state.fn == "fit":
            torch.cuda.synchronize(pl_module.device)
            self.clock.mark()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the loss of a validation, and lets the clock go on."""
        if trainer.state.fn != "fit":
            return
        found = trainer.callback_metrics.get(LOOK)
        if found is None:
            raise ConfigError(f"{type(pl_module).__name__} logs no {LOOK}, of which a study compares its runs; log it")
        self._add(self.curve, trainer.global_step, self.clock.seconds, float(found), "validation")
        self.clock.go()

    def _add(self, points: list[Point], step: int, seconds: float, loss: float, what: str) -> None:
        if not math.isfinite(loss):
            raise DivergedError(f"the {what} loss of step {step} is {loss}")
        points.append((step, self.tokens, round(seconds, 4), loss))


class Tags(Logger):
    """A logger that keeps chosen tags in memory; what is not finite is left out.

    Args:
        tags: to keep.
        folder: where callbacks put their files.
    """

    def __init__(self, tags: Sequence[str], folder: str) -> None:
        super().__init__()
        self.values: dict[str, list[tuple[int, float]]] = {tag: [] for tag in tags}
        self._folder = folder

    @property
    def name(self) -> str:
        """Of no meaning here."""
        return "study"

    @property
    def version(self) -> str:
        """Of no meaning here."""
        return ""

    @property
    def save_dir(self) -> str:
        """Where callbacks put their files."""
        return self._folder

    @property
    def log_dir(self) -> str:
        """Where callbacks put their files."""
        return self._folder

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keeps the chosen tags."""
        for tag, values in self.values.items():
            if tag in metrics and math.isfinite(value := float(metrics[tag])):
                values.append((int(step or 0), value))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: a result has the options."""

    def found(self) -> dict[str, tuple[tuple[int, float], ...]]:
        """The tags that were logged."""
        return {tag: tuple(values) for tag, values in self.values.items() if values}


def parameters_of(module: torch.nn.Module) -> int:
    """Numbers that are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _tokens(batch: Any) -> int:
    """Tokens of a batch; 0 where it says of none."""
    from lit_symopt.data.sizes import tokens

    return tokens(batch) if isinstance(batch, Mapping) and "input_ids" in batch else 0
