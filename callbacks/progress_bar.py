"""Lightning's rich progress bar, for runs that are measured in steps."""

from __future__ import annotations

from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme


class ProgressBar(RichProgressBar):
    """One bar that fills up with `max_steps`, also after a resume; Lightning's own shows `Epoch 0/-2` then.

    Args:
        refresh_rate: batches between two drawings; reading the loss to show it waits for the GPU.
    """

    def __init__(self, *, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate, theme=RichProgressBarTheme(metrics_format=".4g"))

    @property
    def total_train_batches(self) -> int | float:
        """Batches of this epoch: all of them, or as many as `max_steps` leaves room for."""
        trainer = self.trainer
        if trainer.max_steps < 0:
            return super().total_train_batches
        # Between two epochs the counter still holds the full length of the last one.
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready % (trainer.num_training_batches or 1)
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(trainer.num_training_batches, done + left)

    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_epochs in (None, -1):
            return "Training" if current_epoch == 0 else f"Training, epoch {current_epoch}"
        return super()._get_train_description(current_epoch)
