"""Compare optimizer stacks on the quickstart recipe: tune each in the same number of trials, then rerun the winners.

    python profiles/quickstart_comparison.py                  # about 60 runs, an hour on two cores
    python profiles/quickstart_comparison.py --report         # only rebuild the tables from the finished runs

Each run is `lit-symopt fit --config configs/quickstart.yaml` with other rates, one thread, seed 1, validated once at
its end on the whole validation set. The search is a pattern search on a logarithmic grid: from the stated start, try
every neighbor of the best point a factor of two away in one rate, and move on while that helps; with the trials that
are left, go on at a factor of the square root of two. The best point of each contender is then run with three fresh
seeds. Finished runs are kept in `runs.jsonl` and not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "profiles" / "records" / "quickstart-comparison"
TRIALS = 12
TUNING_SEED, FRESH_SEEDS = 1, (2, 3, 4)
Rates = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A stack with the options that are tuned.

    Attributes:
        name: in the tables.
        stack: `--model.symopt.stack`.
        options: what is tuned; the first is the base rate.
        start: where the search starts.
        fixed: options that are the same in every run.
        trials: how many points the search may try.
    """

    name: str
    stack: str
    options: tuple[str, ...]
    start: Rates
    fixed: tuple[str, ...] = ()
    trials: int = TRIALS

    def arguments(self, rates: Rates) -> list[str]:
        """Command-line options of a run with these rates."""
        pairs = zip(self.options, rates, strict=True)
        return ["--model.symopt.stack", self.stack, *(text for pair in pairs for text in _option(*pair)), *self.fixed]


RATE = "lr"
DAMPING = tuple(f"--model.symopt.roles.{role}.row_damping" for role in ("embedding", "lm_head"))
EMBEDDING, HEAD = "roles.embedding.lr_multiplier", "roles.lm_head.lr_multiplier"
OWN = (RATE, EMBEDDING, HEAD)
CONTENDERS = (
    Contender(name="AdamW, one rate", stack="adamw", options=(RATE,), start=(5e-3,)),
    Contender(name="AdamW, own rates for embedding and head", stack="adamw", options=OWN, start=(5e-3, 10.0, 1.0)),
    Contender(name="Muon with AdamW, own rates", stack="muon", options=OWN, start=(0.02, 2.0, 0.2)),
    Contender(
        name="symmetric, own rates, no row damping",
        stack="symmetric",
        options=OWN,
        start=(5e-3, 8.0, 2.0),
        fixed=(DAMPING[0], "0.0", DAMPING[1], "0.0"),
    ),
    Contender(  # the default; the rates are those that were best without damping
        name="symmetric, the same rates, row damping 0.1",
        stack="symmetric",
        options=OWN,
        start=(2.5e-3, 16.0, 4.0),
        fixed=(DAMPING[0], "0.1", DAMPING[1], "0.1"),
        trials=1,
    ),
)


def _option(name: str, value: float) -> list[str]:
    return [f"--model.symopt.{name}", str(value)]


def neighbors(rates: Rates, factor: float) -> list[Rates]:
    """The points that differ in one rate by the factor."""
    moved = [
        (*rates[:axis], rates[axis] * step, *rates[axis + 1 :])
        for axis in range(len(rates))
        for step in (factor, 1 / factor)
    ]
    return [tuple(float(f"{rate:.6g}") for rate in point) for point in moved]


def next_points(losses: dict[Rates, float], start: Rates) -> list[Rates]:
    """What a pattern search tries next, given the losses so far; empty when there is nothing left to try."""
    if not losses:
        return [start]
    best = min(losses, key=lambda rates: losses[rates])
    for factor in (2.0, 2.0**0.5, 2.0**0.25):
        untried = [point for point in neighbors(best, factor) if point not in losses]
        if untried:
            # First those that leave the range tried so far: the best rates shall end up inside it.
            return sorted(untried, key=lambda point: not leaves_range(point, losses))
    return []


def leaves_range(point: Rates, tried: Iterable[Rates]) -> bool:
    """Whether a rate of the point is smaller or larger than every one tried."""
    return any(
        not min(values) <= rate <= max(values) for rate, values in zip(point, zip(*tried, strict=True), strict=True)
    )


def fit(contender: Contender, rates: Rates, seed: int) -> dict[str, Any]:
    """Run the recipe once and return what it logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    began = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "lit_symopt", "fit", "--config", str(ROOT / "configs" / "quickstart.yaml")),
            *contender.arguments(rates),
            *("--seed_everything", str(seed), "--trainer.logger.init_args.save_dir", folder),
            *("--trainer.limit_val_batches", "1.0", "--trainer.val_check_interval", "400"),
            *("--trainer.num_sanity_val_steps", "0"),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
        events = sorted(Path(folder).rglob("events.out.tfevents.*"))
        losses = []
        if events:
            accumulator = EventAccumulator(str(events[0])).Reload()
            if "val/loss" in accumulator.Tags()["scalars"]:
                losses = [(event.step, event.value) for event in accumulator.Scalars("val/loss")]
    diverged = "is not finite" in result.stderr
    if not diverged and (result.returncode or not losses):
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout[-1000:]}\n{result.stderr[-2000:]}")
    return {
        "contender": contender.name,
        "rates": dict(zip(contender.options, rates, strict=True)),
        "seed": seed,
        "loss": float("inf") if diverged else losses[-1][1],  # a diverged run counts
        "seconds": round(perf_counter() - began, 1),
    }


class Runs:
    """The finished runs, on disk as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            self.rows = [json.loads(line) for line in path.read_text().splitlines()]

    def losses(self, contender: Contender, seed: int) -> dict[Rates, float]:
        """Final losses of a contender by rates."""
        chosen = [row for row in self.rows if row["contender"] == contender.name and row["seed"] == seed]
        return {tuple(row["rates"][option] for option in contender.options): row["loss"] for row in chosen}

    def add(self, row: dict[str, Any]) -> None:
        """Keep a run."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{row['contender']:42} {row['rates']} seed {row['seed']}: {row['loss']:.4f} in {row['seconds']} s",
            flush=True,
        )

    def best(self, contender: Contender) -> Rates:
        """The rates with the lowest loss in the tuning runs."""
        losses = self.losses(contender, TUNING_SEED)
        return min(losses, key=lambda rates: losses[rates])


def run_all(runs: Runs, jobs: int) -> None:
    """Tune every contender, then run its winner with fresh seeds; `jobs` runs at once."""
    with ThreadPoolExecutor(jobs) as pool:
        while waiting := [task for contender in CONTENDERS for task in _tuning_tasks(runs, contender)]:
            _batch(pool, runs, waiting[:jobs])
        final = [
            (contender, runs.best(contender), seed)
            for contender in CONTENDERS
            for seed in FRESH_SEEDS
            if runs.best(contender) not in runs.losses(contender, seed)
        ]
        for first in range(0, len(final), jobs):
            _batch(pool, runs, final[first : first + jobs])


def _tuning_tasks(runs: Runs, contender: Contender) -> list[tuple[Contender, Rates, int]]:
    losses = runs.losses(contender, TUNING_SEED)
    left = contender.trials - len(losses)
    return [(contender, rates, TUNING_SEED) for rates in next_points(losses, contender.start)[:left]]


def _batch(pool: ThreadPoolExecutor, runs: Runs, tasks: list[tuple[Contender, Rates, int]]) -> None:
    for row in pool.map(lambda task: fit(*task), tasks):
        runs.add(row)


HEADER = """\
# Stacks on the quickstart recipe

Validation loss in nats a token after 400 steps of 2,048 tokens, over the whole validation set (files that were not
trained on). Every contender had at most {trials} trials of a pattern search over its rates with seed {tuning} (over one
rate it ends earlier, when steps of 2^(1/4) no longer help); its best was run again with seeds {fresh}. "Inside its
grid": smaller and larger values of every rate of the best were tried.

The last line is the default of the symmetric stack: the rates of the line above it, taken over without another search,
with the row damping that was chosen after it (losses with seeds 2 and 3: none 3.183 and 3.178, damping 0.01 3.174 and
3.171, damping 0.1 3.164 and 3.162). What was tried before the comparison, to choose where the searches start and the
rules of the symmetric stack, is in `exploration.md` and does not count as trials.

- command: `python profiles/quickstart_comparison.py`; the runs are in `runs.jsonl`
- recipe: `configs/quickstart.yaml`: warm-up of 40 steps, linear decay to zero, no clipping, decay 0.1 on matrices
- {environment}

"""


def report(runs: Runs) -> str:
    """The record as Markdown."""
    reference = CONTENDERS[-1]
    ours = _final(runs, reference)
    stored = RECORD / "environment.txt"
    header = HEADER.format(
        trials=TRIALS,
        tuning=TUNING_SEED,
        fresh=", ".join(map(str, FRESH_SEEDS)),
        environment=stored.read_text().strip() if stored.exists() else environment(),
    )
    lines = [
        "| stack | trials | best rates | inside its grid | loss: mean (min to max) | default − this |",
        "|---|---|---|---|---|---|",
    ]
    for contender in CONTENDERS:
        losses, best, final = runs.losses(contender, TUNING_SEED), runs.best(contender), _final(runs, contender)
        names = [option.removesuffix(".lr_multiplier").removeprefix("roles.") for option in contender.options]
        rates = ", ".join(
            f"{name} {'' if name == 'lr' else '×'}{rate:.3g}" for name, rate in zip(names, best, strict=True)
        )
        found = all(
            min(values) < rate < max(values) for rate, values in zip(best, zip(*losses, strict=True), strict=True)
        )
        difference = "" if contender is reference else f"{mean(ours) - mean(final):+.3f}"
        inside = "as above" if contender.trials == 1 else "yes" if found else "no"
        lines.append(
            f"| {contender.name} | {len(losses)} | {rates} | {inside} "
            f"| {mean(final):.3f} ({min(final):.3f} to {max(final):.3f}) | {difference} |"
        )
    return header + "\n".join(lines) + "\n"


def _final(runs: Runs, contender: Contender) -> list[float]:
    return [runs.losses(contender, seed).get(runs.best(contender), float("nan")) for seed in FRESH_SEEDS]


def environment() -> str:
    """Device, versions and commit of a record."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return (
        f"{platform.machine()} CPU, {os.cpu_count()} cores, one thread a run; torch {torch.__version__.split('+')[0]}; "
        f"Python {platform.python_version()}; commit {commit.stdout.strip() or 'unknown'}"
    )


def main() -> None:
    """Run what is missing, and print and write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once")
    parser.add_argument("--report", action="store_true", help="run nothing, only rebuild the tables")
    given = parser.parse_args()
    runs = Runs(RECORD / "runs.jsonl")
    if not given.report:
        run_all(runs, given.jobs)
        (RECORD / "environment.txt").write_text(environment() + "\n")
    text = report(runs)
    (RECORD / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
