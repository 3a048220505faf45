"""ProgressBar: its length, when steps end the run."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from lit_symopt.callbacks import ProgressBar


def bar(
    *, max_steps: int, step: int, done: int, batches: int, accumulate: int = 1, max_epochs: int = -1
) -> ProgressBar:
    shown = ProgressBar()
    shown._trainer = Mock(
        max_steps=max_steps,
        global_step=step,
        num_training_batches=batches,
        accumulate_grad_batches=accumulate,
        max_epochs=max_epochs,
    )
    shown._trainer.fit_loop.epoch_loop.batch_progress.current.ready = done
    return shown


@pytest.mark.parametrize(
    ("expected", "shown"),
    [
        (400, bar(max_steps=400, step=0, done=0, batches=1431)),  # one epoch is longer than the run
        (400, bar(max_steps=400, step=100, done=100, batches=1431)),  # resumed in the middle of it
        (16, bar(max_steps=20, step=0, done=0, batches=16)),  # the run is longer than an epoch
        (4, bar(max_steps=20, step=16, done=16, batches=16)),  # its second epoch is about to start
        (4, bar(max_steps=20, step=18, done=2, batches=16)),  # in the middle of its second epoch
        (80, bar(max_steps=10, step=0, done=0, batches=1000, accumulate=8)),  # 8 batches a step
        (1431, bar(max_steps=-1, step=0, done=0, batches=1431, max_epochs=1)),  # epochs end the run
    ],
)
def test_it_is_as_long_as_the_batches_that_will_run(expected: int, shown: ProgressBar) -> None:
    assert shown.total_train_batches == expected


def test_it_names_epochs_only_where_there_are_some() -> None:
    steps = bar(max_steps=400, step=0, done=0, batches=1431)
    assert steps._get_train_description(0) == "Training"
    assert steps._get_train_description(2) == "Training, epoch 2"
    epochs = bar(max_steps=-1, step=0, done=0, batches=10, max_epochs=3)
    assert epochs._get_train_description(1).strip() == "Epoch 1/2"
