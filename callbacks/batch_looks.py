"""Looks at training batches: every forward pass of one optimizer step is watched, then all ranks add up."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning as L

from lit_symopt.blocks import BlockTaxonomy
from lit_symopt.callbacks.looks import Looks
from lit_symopt.metrics.heads import HeadWatch
from lit_symopt.metrics.watch import RouterWatch


class BatchLooks(Looks):
    """Watches the training batches of single optimizer steps: the first one and every multiple of `every_n_steps`.

    All micro-batches of the step count (`accumulate_grad_batches`), on all ranks. Between two looks no hook is there.
    """

    def __init__(self, *, every_n_steps: int, folder: str | None) -> None:
        super().__init__(every_n_steps=every_n_steps, folder=folder)
        self._watch: RouterWatch | HeadWatch | None = None
        self._before: int | None = None  # steps done when the look began
        self._seen = 0
        self._found = False

    @abstractmethod
    def _find(self, pl_module: L.LightningModule, taxonomy: BlockTaxonomy) -> str | None:
        """Finds what to watch; returns why there is nothing to watch, if so."""

    @abstractmethod
    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts a look with an empty metric."""

    @abstractmethod
    def _watching(self) -> RouterWatch | HeadWatch:
        """What watches one batch."""

    @abstractmethod
    def _finish(self, trainer: L.Trainer) -> None:
        """Publishes a look."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds out where the run is."""
        super().on_train_start(trainer, pl_module)
        self._found, self._before = False, None
        self._due = 1 if trainer.global_step == 0 else self._due

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts to watch if a look is due."""
        if self._off or trainer.global_step + 1 < self._due or not self._ready(trainer, pl_module, batch):
            return
        if self._before is None:
            self._before, self._seen = trainer.global_step, 0
            self._begin(trainer, pl_module)
        self._watch = self._watching()
        self._watch.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Publishes the look if its optimizer step is done."""
        if self._watch is None or self._before is None:
            return
        watch, self._watch = self._watch, None
        watch.close()
        self._seen += watch.seen
        if trainer.global_step == self._before:
            return  # more micro-batches follow
        self._before, self._due = None, self._next(trainer.global_step)
        if trainer.strategy.reduce_boolean_decision(self._seen > 0, all=False):
            self._finish(trainer)
        else:
            self._turn_off(f"nothing it watches ran in {type(pl_module).__name__} (a compiled module runs no hooks)")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stops to watch, and writes the file."""
        self._stop()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stops to watch."""
        self._stop()

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.close(finish=False)
            self._watch = None

    def _ready(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> bool:
        """Finds what to watch, once a fit."""
        if self._found:
            return True
        taxonomy = self._taxonomy(pl_module, batch)
        if taxonomy is None:
            return False
        why = self._find(pl_module, taxonomy)
        if why is not None:
            self._turn_off(why)
            return False
        self._warn_of_loggers(trainer)
        self._found = True
        return True
