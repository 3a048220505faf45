"""What the callbacks that look at routers and logits share: when they look, and where what they see goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

from lit_symopt.blocks import BlockTaxonomy
from lit_symopt.callbacks.random_state import capture, restore
from lit_symopt.errors import ConfigError, TaxonomyError
from lit_symopt.metrics.histogram import buckets
from lit_symopt.metrics.history import History
from lit_symopt.metrics.layers import Over, over_layers
from lit_symopt.metrics.pictures import heat_map

Array = NDArray[Any]

# Arrays of the `.npz` files that are not one row a look.
CONSTANTS = ("layers", "experts", "heads", "edges")


class Looks(L.Callback):
    """Looks every so many optimizer steps, and logs, draws, keeps and sums up what it sees.

    - Scalars go to every logger, at the step at which the Trainer logs the loss of the same batch.
    - Heat maps and histograms go to TensorBoard. Other loggers get the scalars only; one warning names them.
    - The raw arrays go to an `.npz` file in the run's log folder (in `default_root_dir` without a logger), written at
      each validation and checkpoint and at the end, always as a whole. They are in the checkpoints, too: a resumed
      run continues them, whichever folder it writes to. An older file of another run is never touched.
    - At the end of the fit rank 0 prints the first and the last look.

    With `fast_dev_run` nothing is written.

    Args:
        every_n_steps: optimizer steps between two looks.
        folder: where the `.npz` file goes, in place of the log folder.
    """

    file: ClassVar[str]
    """Name of the `.npz` file, without ending."""

    def __init__(self, *, every_n_steps: int, folder: str | None) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"{type(self).__name__}: every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self.folder = folder
        self.history = History()
        self.layers: list[str] = []
        self._due = 0
        self._path: Path | None = None
        self._off = False
        self._ends: list[tuple[int, dict[str, float]]] = []  # step and scalars of the first and of the last look

    # -- a run ---------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds out where the run is, and where its files go."""
        self._off = False
        self._due = self._next(trainer.global_step)
        self.history.cut(trainer.global_step)
        self._ends = [end for end in self._ends if end[0] <= trainer.global_step]
        log_dir = None if _is_trial(trainer) else trainer.log_dir  # on every rank: they agree on it
        self._path = None
        if trainer.is_global_zero and not _is_trial(trainer):
            folder = self.folder or (log_dir if trainer.loggers else None) or trainer.default_root_dir
            self._path = self._place(Path(folder), trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the file."""
        self._save()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writes the file."""
        self._save()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the file and prints the summary."""
        self._save()
        if trainer.is_global_zero and not self._off:
            print("\n" + self.text(), flush=True)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Writes the file."""
        self._save()

    def state_dict(self) -> dict[str, Any]:
        """The raw arrays so far, and the numbers of the first and the last look."""
        return {"history": self.history.state_dict(), "ends": self._ends}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the arrays of the run that wrote the checkpoint."""
        self.history.load_state_dict(state_dict["history"])
        self._ends = [(int(step), dict(scalars)) for step, scalars in state_dict["ends"]]

    def text(self) -> str:
        """The summary as printed."""
        name = type(self).__name__
        if not self._ends:
            return f"{name}: no look was taken; every_n_steps={self.every_n_steps}"
        (began, first), (ended, last) = self._ends[0], self._ends[-1]
        lines = [f"{name}: {len(self.history)} look(s) at {', '.join(self.layers)}."]
        several = "   highest and lowest layer at the end" if len(self.layers) > 1 else ""
        lines.append(f"  {'':36} {f'step {began:,}':>12} {f'step {ended:,}':>12}{several}")
        for tag in [tag for tag in last if not any(tag.endswith(f"/{layer}") for layer in self.layers)]:
            before = f"{first[tag]:12.4g}" if tag in first else f"{'':12}"
            each = {layer: last[f"{tag}/{layer}"] for layer in self.layers if f"{tag}/{layer}" in last}
            ends = sorted(each.items(), key=lambda item: -item[1])
            range_ = f"   {ends[0][1]:.4g} ({ends[0][0]}) to {ends[-1][1]:.4g} ({ends[-1][0]})" if len(ends) > 1 else ""
            lines.append(f"  {tag:36} {before} {last[tag]:12.4g}{range_}")
        if self._path is not None:
            lines.append(f"  arrays in {self._path}")
        return "\n".join(lines)

    # -- for the callbacks ---------------------------------------------------------------------------------------

    def _next(self, step: int) -> int:
        """The step after which the next look is due, when `step` are done: a multiple of `every_n_steps`."""
        return (step // self.every_n_steps + 1) * self.every_n_steps

    def _turn_off(self, why: str) -> None:
        """No more looks in this fit; says so."""
        self._off = True
        rank_zero_warn(f"{type(self).__name__} does nothing: {why}")

    def _taxonomy(self, pl_module: L.LightningModule, batch: Any) -> BlockTaxonomy | None:
        """The blocks of the module, from its structure if it declares none; None, with a warning, if that fails."""
        try:
            return BlockTaxonomy.of(pl_module)
        except TaxonomyError:
            kept = capture()
            try:
                return BlockTaxonomy.infer(pl_module, batch)
            except (TaxonomyError, ConfigError) as error:
                self._turn_off(f"{type(pl_module).__name__} declares no blocks, and {error}")
                return None
            finally:
                restore(kept)

    def _publish(
        self,
        trainer: L.Trainer,
        *,
        step: int,
        arrays: Mapping[str, Array],
        scalars: Mapping[str, float],
    ) -> None:
        """Keeps and logs one look."""
        self.history.append(step, arrays)
        self._ends = [*self._ends[:1], (step, dict(scalars))]
        for logger in trainer.loggers:
            logger.log_metrics(dict(scalars), step=logged_step(trainer))

    def _draw(self, trainer: L.Trainer, tag: str, values: Array, *, title: str, bar: str, **limits: float) -> None:
        """A heat map of layers × experts."""
        for logger in self._with_pictures(trainer):
            image = heat_map(values, rows=self.layers, title=title, bar=bar, **limits)
            logger.experiment.add_image(tag, image, logged_step(trainer), dataformats="HWC")

    def _histogram(self, trainer: L.Trainer, tag: str, counts: Tensor) -> None:
        """A histogram of counts in the bins of `lit_symopt.metrics.histogram`."""
        limits, numbers = buckets(counts)
        for logger in self._with_pictures(trainer) if numbers else ():
            middle = np.array([limits[0], *(np.array(limits[1:]) + np.array(limits[:-1])) / 2])
            middle = np.clip(middle, -1e9, 1e9)  # the open bins
            logger.experiment.add_histogram_raw(
                tag,
                min=limits[0],
                max=min(limits[-1], 1e9),
                num=sum(numbers),
                sum=float(middle @ numbers),
                sum_squares=float(middle**2 @ numbers),
                bucket_limits=limits,
                bucket_counts=numbers,
                global_step=logged_step(trainer),
            )

    def _with_pictures(self, trainer: L.Trainer) -> list[TensorBoardLogger]:
        if _is_trial(trainer) or not trainer.is_global_zero:
            return []
        return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]

    def _warn_of_loggers(self, trainer: L.Trainer) -> None:
        """Names the loggers that get no pictures."""
        others: list[Logger] = [] if _is_trial(trainer) else list(trainer.loggers)
        names = sorted({type(logger).__name__ for logger in others if not isinstance(logger, TensorBoardLogger)})
        if names:
            rank_zero_warn(
                f"{type(self).__name__} draws for TensorBoard; {', '.join(names)} get(s) the scalars, without "
                "heat maps and histograms"
            )

    # -- files ---------------------------------------------------------------------------------------------------

    def _place(self, folder: Path, step: int) -> Path:
        """The file to write; one that is there already is continued if it is of this run, else left alone."""
        path = folder / f"{self.file}.npz"
        if path.exists() and not len(self.history) and step > 0:
            self.history.read(path, constants=CONSTANTS)
            self.history.cut(step)
        version = 1
        while path.exists() and not len(self.history):
            path = folder / f"{self.file}-v{version}.npz"
            version += 1
        return path

    def _save(self) -> None:
        if self._path is not None and len(self.history):
            self.history.save(self._path)


def by_layer(
    prefix: str, values: Mapping[str, Tensor], layers: Sequence[str], over: Mapping[str, Over]
) -> dict[str, float]:
    """Tags with their numbers, over all layers and for each: `prefix/name` and `prefix/name/layer_0`.

    What is not a number because there was nothing to compute it from (all layers) is left out.
    """
    tags: dict[str, float] = {}
    for name, value in values.items():
        each = value.reshape(len(layers)).to("cpu", torch.float64)
        if not each.isnan().all():
            tags[f"{prefix}/{name}"] = float(over_layers(each, over[name]))
            tags |= {f"{prefix}/{name}/{layer}": float(number) for layer, number in zip(layers, each, strict=True)}
    return tags


def as_array(values: Tensor, *shape: int) -> Array:
    """A metric's tensor as an array of the shape it has before torchmetrics turns one element into a scalar."""
    array: Array = values.detach().cpu().numpy().reshape(shape)
    return array


def _is_trial(trainer: L.Trainer) -> bool:
    """Whether this is a `fast_dev_run`, which writes nothing."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by a part of the Trainer


def logged_step(trainer: L.Trainer) -> int:
    """The step at which the Trainer logs what a training step logs."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
