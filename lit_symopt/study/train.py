"""One run of a study in this process: `lit-symopt fit` with a recorder, then a validation over the whole set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from lit_symopt.errors import ConfigError, GradientError
from lit_symopt.sharding.transport import end_process_group
from lit_symopt.study.plan import Run
from lit_symopt.study.recorder import LOOK, DivergedError, Recorder, Tags, parameters_of
from lit_symopt.study.result import Result, Status
from lit_symopt.study.spec import Study
from lit_symopt.training import TrainingCLI, command_line


class StudyCLI(TrainingCLI):
    """A command line that keeps tags, and validates on everything after the fit."""

    tags: Tags
    look_batches: int
    loss: float = math.nan

    def after_instantiate_classes(self) -> None:
        """Puts the logger in, and spreads what is looked at during the fit over the validation set."""
        super().after_instantiate_classes()
        if self.tags.values:
            self.trainer.loggers = [self.tags]
        whole = self.datamodule.val_dataloader
        self.datamodule.val_dataloader = lambda: spread(whole(), self.look_batches)

    def after_fit(self) -> None:
        """The loss over the whole validation set; the callbacks of the fit have no part in it."""
        trainer: Any = self.trainer
        del self.datamodule.val_dataloader  # the whole set again
        trainer.limit_val_batches, trainer.callbacks, trainer.loggers = 1.0, [], []
        (found,) = trainer.validate(self.model, datamodule=self.datamodule, verbose=False) or [{}]
        self.loss = float(found.get(LOOK, math.nan))


def spread(loader: Any, batches: int) -> Any:
    """A loader of so many batches, of examples evenly spread over a data set: its first ones need not be typical.

    What is no plain DataLoader over a data set with a length stays as it is, and so does one that has no more batches.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> [batch.tolist() for batch in spread(DataLoader(range(12), batch_size=2), 2)]
        [[0, 3], [6, 9]]
    """
    from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Subset

    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or type(loader.batch_sampler) is not BatchSampler
        or loader.batch_size is None
        or len(loader) <= batches
    ):
        return loader
    examples, count = len(loader.dataset), batches * loader.batch_size  # type: ignore[arg-type]  # it has a length
    return DataLoader(
        Subset(loader.dataset, [index * examples // count for index in range(count)]),
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
    )


def train(run: Run, study: Study, folder: Path, environment: Mapping[str, Any]) -> Result:
    """Trains, and returns what was measured. Everything but divergence is raised.

    Args:
        run: which.
        study: that it is of.
        folder: of the run, for files of callbacks.
        environment: for the result.

    Raises:
        SymOptError: for wrong input.
        SystemExit: for wrong input that is seen when arguments are parsed; it has been printed.
    """
    began = perf_counter()
    recorder, loss = Recorder(steps=run.steps), math.nan
    status: Status = "finished"
    holder: list[StudyCLI] = []

    class OfThisRun(StudyCLI):
        tags = Tags(study.record, str(folder))
        look_batches = study.look_batches

        def after_instantiate_classes(self) -> None:
            holder.append(self)
            super().after_instantiate_classes()

    try:
        cli = command_line(
            OfThisRun,
            ["fit", *run.arguments(study, folder)],
            parser_kwargs={"prog": "lit-symopt"},
            save_config_callback=None,
            trainer_defaults={"callbacks": [recorder]},
        )
        loss = cli.loss
        if not math.isfinite(loss):
            raise DivergedError(f"the validation loss at the end is {loss}")
    except (DivergedError, GradientError) as error:
        if isinstance(error, GradientError) and "is not finite" not in str(error):
            raise  # no matter of rates
        print(f"diverged: {error}", flush=True)
        status = "diverged"
    finally:
        end_process_group()
    (made,) = holder
    return _result(run, study, made, recorder, status, environment, loss=loss, wall=perf_counter() - began)


def _result(
    run: Run,
    study: Study,
    made: StudyCLI,
    recorder: Recorder,
    status: Status,
    environment: Mapping[str, Any],
    *,
    loss: float,
    wall: float,
) -> Result:
    symopt = getattr(made.model, "symopt", None)
    if symopt is None:
        raise ConfigError(f"{type(made.model).__name__} has no symopt, of which a study says the stack")
    return Result(
        run=run.name,
        study=study.name,
        family=run.family,
        contender=run.contender,
        stack=str(symopt.stack),
        purpose=run.purpose,
        seed=run.seed,
        length=run.length,
        steps=run.steps,
        rates=run.rates,
        options=run.options(study),
        status=status,
        loss=loss if status == "finished" else None,
        tokens=recorder.tokens,
        seconds=round(recorder.clock.seconds, 3),
        wall_seconds=round(wall, 3),
        parameters=parameters_of(made.model),
        curve=tuple(recorder.curve),
        train=tuple(recorder.train),
        records=made.tags.found(),
        environment={**environment},
    )
