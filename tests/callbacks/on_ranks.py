"""Fits for the tests of several processes: `python -m tests.callbacks.on_ranks FOLDER PROCESSES`.

Writes FOLDER/whole and FOLDER/resumed (raw arrays of a fit of eight steps, and of one continued from step 6) and
FOLDER/equal, which says whether the weights are those of a fit without callbacks.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from lit_symopt.callbacks import LoadImbalance, LogitNorms, RandomState, RouterStability
from tests.callbacks.moe import Save, Windows, equal, fit, olmoe

GLOBAL_BATCH = 4


def main(folder: Path, processes: int) -> None:
    """Runs the fits."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options: dict[str, Any] = {
        "devices": processes,
        "strategy": "ddp" if processes > 1 else "auto",
        "accumulate_grad_batches": 2,
        "use_distributed_sampler": False,
        "steps": 8,  # six are an epoch: the loader of these tests resumes only between two
    }

    def watched() -> list[Any]:
        three = (
            LoadImbalance(every_n_steps=2),
            RouterStability(every_n_steps=2),
            LogitNorms(every_n_steps=2, positions=99),
        )
        return [RandomState(), *three]

    def run(name: str, callbacks: list[Any], **more: Any) -> Any:
        # Rank r takes the windows r, r + processes, ...: together the batches of one process.
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        data = [
            DataLoader(Subset(windows, range(rank, len(windows), processes)), batch_size=GLOBAL_BATCH // processes)
            for windows in (Windows(12 * GLOBAL_BATCH, seed=0), Windows(3 * GLOBAL_BATCH, seed=1))
        ]
        return fit(folder / name, callbacks, model=olmoe(dropout=0.0), data=(data[0], data[1]), **options, **more)

    path = folder / "saved.ckpt"
    whole = run("whole", [*watched(), Save(path, step=6)])
    plain = run("plain", [RandomState()])
    run("resumed", watched(), ckpt_path=path)
    if whole.global_rank == 0:
        (folder / "equal").write_text(str(equal(whole, plain)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
