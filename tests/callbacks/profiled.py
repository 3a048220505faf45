"""What the tests of `KernelTime` share: short windows, small modules, and what a run has left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_symopt.callbacks import KernelTime
from lit_symopt.profiling.attribution import attribute
from lit_symopt.profiling.costs import TraceCosts
from lit_symopt.profiling.events import Event, read_trace
from lit_symopt.profiling.run import RunProfile


def kernel_time(**options: Any) -> KernelTime:
    """One window: the steps 3 and 4."""
    return KernelTime(**{"wait": 1, "warmup": 1, "active": 2, "ceilings": False, **options})


def traces(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.pt.trace.json"))


def record(folder: Path, rank: int = 0) -> RunProfile:
    [path] = folder.rglob(f"kernel_time.rank{rank}.json")
    return RunProfile.load(path)


def costs(path: Path) -> TraceCosts:
    return attribute(read_trace(path))


def steps(path: Path) -> list[int]:
    """Numbers of the steps of a trace."""
    return [step.step for step in costs(path).steps]


def ranges(path: Path, prefix: str = "train/") -> list[Event]:
    """Ranges of a trace whose names begin so, in the order in which they begin."""
    found = [event for event in read_trace(path).events if event.name.startswith(prefix)]
    return sorted(found, key=lambda event: event.start_us)


def stages(path: Path) -> list[str]:
    return [event.name.removeprefix("train/") for event in ranges(path)]


def crossings(path: Path) -> list[tuple[str, str]]:
    """Pairs of ranges around the parts of a step of which neither contains the other."""
    every = [event for prefix in ("ProfilerStep#", "train/", "Optimizer.", "symopt/") for event in ranges(path, prefix)]
    every.sort(key=lambda event: event.start_us)
    return [
        (one.name, other.name)
        for index, one in enumerate(every)
        for other in every[index + 1 :]
        if other.start_us < one.end_us < other.end_us
    ]


def whole_traces_only(folder: Path) -> bool:
    for path in traces(folder):
        json.loads(path.read_text())
    return not list(folder.rglob("*.half"))


class Plain(L.LightningModule):
    """A plain module with an optimizer of torch; `manual` steps it itself, with two backward passes."""

    def __init__(self, *, manual: bool = False, fail_at: int | None = None, error: type[BaseException] = RuntimeError):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        self.automatic_optimization = not manual
        self.fail_at = fail_at
        self.error = error
        self.batches = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        self.batches += 1
        if self.batches == self.fail_at:
            raise self.error("in training_step")
        loss: Tensor = self.net(batch).square().mean()
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.manual_backward(self.net(batch + 1).square().mean())
        optimizer.step()
        return None

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def data(batches: int = 12, validation: int = 3) -> tuple[DataLoader[Tensor], DataLoader[Tensor]]:
    rows: Any = torch.randn(2 * batches, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(rows, batch_size=2), DataLoader(rows[: 2 * validation], batch_size=2)
