"""What a run did, in five lines at its end."""

from __future__ import annotations

from math import exp
from pathlib import Path
from shlex import quote
from time import perf_counter
from typing import Any

import lightning as L

_MOST = 700.0  # the largest loss whose exponential is a number


class RunReport(L.Callback):
    """Prints the validation loss at the start and at the end, tokens, seconds, and where to look at the run.

    The loss at the start is that of a validation before the first step: set the Trainer's `num_sanity_val_steps: -1`
    and it is taken over the same batches as the one at the end. A resumed run reports the start of the first one.
    Nothing is printed if the fit ends with an error; only rank 0 prints.

    Args:
        metric: the logged metric to report, a mean loss in nats.

    Example:
        >>> report = RunReport(metric="val/loss")
    """

    def __init__(self, *, metric: str = "val/loss") -> None:
        self.metric = metric
        self._start: tuple[int, float] | None = None
        self._end: tuple[int, float] | None = None
        self._seconds_before = 0.0
        self._began = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The loss at the start and the seconds so far."""
        return {"start": self._start, "end": self._end, "seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the report of the run that wrote the checkpoint."""
        self._start, self._end = _pair(state_dict["start"]), _pair(state_dict["end"])
        self._seconds_before = float(state_dict["seconds"])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._began = perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the loss of this validation."""
        loss = trainer.callback_metrics.get(self.metric)
        if loss is None:
            return
        self._end = (trainer.global_step, float(loss))
        if self._start is None:
            self._start = self._end

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the report."""
        text = self.text(trainer, pl_module)
        if trainer.is_global_zero:
            print("\n" + text, flush=True)

    def text(self, trainer: L.Trainer, pl_module: L.LightningModule) -> str:
        """The report as printed. Call it on every rank: they agree on the log folder."""
        lines = [f"Finished at step {trainer.global_step:,}."]
        if self._start is None or self._end is None:
            lines.append(f"  validation loss   not measured: no validation logged {self.metric!r}")
        else:
            looks = [self._start] if self._start == self._end else [self._start, self._end]
            losses = ", ".join(f"{loss:.4f} at step {step:,}" for step, loss in looks)
            lines.append(f"  validation loss   {losses} (nats a token)")
            lines.append(f"  perplexity        {', '.join(f'{exp(min(loss, _MOST)):,.2f}' for _, loss in looks)}")
            if self._end[0] < trainer.global_step:
                lines.append(f"                    no validation since step {self._end[0]:,}: see val_check_interval")
        tokens = getattr(pl_module, "tokens_seen", None)
        seconds = self._seconds()
        if tokens is not None:
            lines.append(f"  trained on        {tokens:,} tokens in {seconds:,.1f} s, validation included")
        else:
            lines.append(f"  took              {seconds:,.1f} s, validation included")
        log_dir = trainer.log_dir
        if log_dir is not None and trainer.loggers:
            folder = Path(log_dir)
            lines.append(f"  logs              {folder}")
            lines.append(f"  to look at them   tensorboard --load_fast=false --logdir {quote(str(folder.parent))}")
        return "\n".join(lines)

    def _seconds(self) -> float:
        running = perf_counter() - self._began if self._began else 0.0
        return self._seconds_before + running


def _pair(value: Any) -> tuple[int, float] | None:
    return None if value is None else (int(value[0]), float(value[1]))
