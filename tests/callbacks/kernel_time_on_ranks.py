"""Fits on two processes for the tests of `KernelTime`: `python -m tests.callbacks.kernel_time_on_ranks FOLDER CASE`.

Each case writes what it leaves to FOLDER; rank 0 says how it ended in FOLDER/ended.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lit_symopt.errors import SymOptError
from lit_symopt.sharding.transport import end_process_group
from lit_symopt.strategies import CPUDeepSpeedStrategy, FSDP2Strategy
from tests.callbacks.moe import Save, equal, fit, loaders, olmoe
from tests.callbacks.profiled import kernel_time

TWO: dict[str, Any] = {"devices": 2, "strategy": "ddp"}


def main(folder: Path, case: str) -> None:
    """Runs the fits of a case."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    options = {**TWO, "model": olmoe(dropout=0.0), "data": loaders(shuffle=False), "steps": 6}
    ended: object = None
    if case == "all":
        model = fit(
            folder, [kernel_time(ranks="all", ceilings=True)], logger=TensorBoardLogger(folder, "run"), **options
        )
        alone = fit(folder / "alone", [], **{**options, "model": olmoe(dropout=0.0)})
        ended = equal(model, alone)
    elif case == "one":
        stop = kernel_time(ranks=[1], stop_when_done=True)
        fit(folder, [stop, Save(folder / "saved.ckpt", step=4)], **{**options, "steps": 100})
        ended = "stopped"
    elif case == "unwritable":
        callback = kernel_time(ranks="all", folder=str(folder / f"folder of {rank}"))
        if rank == 1:
            (folder / "folder of 1").touch()
        try:
            fit(folder, [callback], **options)
        except SymOptError as error:
            ended = f"{type(error).__name__}: {error}"
    elif case in ("zero2", "fsdp2"):
        strategy = CPUDeepSpeedStrategy(stage=2) if case == "zero2" else FSDP2Strategy(process_group_backend="gloo")
        fit(folder, [kernel_time(ranks="all")], **{**options, "strategy": strategy, "steps": 5})
        ended = "trained"
    if rank == 0:
        (folder / "ended").write_text(str(ended))
    end_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
