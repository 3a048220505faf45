"""Load imbalance and stability of routers under three update rules, on the tiny mixtures of experts, as curves.

    python profiles/router_curves.py                # about 36 runs of two minutes each, one thread a run
    python profiles/router_curves.py --report       # only redraw the pictures and rebuild the tables

Each run is `lit-symopt fit --config configs/FAMILY_tiny.yaml` with another rule and rate for the router's weight;
everything else, the callbacks that measure included, is as in the recipe. Every rule has the same three rates with the
tuning seed; the one with the lowest validation loss is run again with fresh seeds, and those runs are drawn. A finished
run is a file in `runs/` and is not repeated, so the script can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "profiles" / "records" / "router-curves"
FAMILIES = {"olmoe": "OLMoE", "gpt_oss": "gpt-oss"}
RULES = {"left_spectral": "left_spectral, centered", "row_norm": "row_norm, centered", "adamw": "adamw"}
RATES = (0.000625, 0.0025, 0.01)  # a factor of four around the recipe's; the scales make them comparable
TUNING_SEED, FRESH_SEEDS = 1, (2, 3, 4)
STEPS = 300

# Panels: array of the callback's file, its name, and what it becomes over layers.
LOAD = {
    "assignments/cv": "assignments: coefficient of variation",
    "mass/cv": "probability mass: coefficient of variation",
    "balance_loss": "balance loss (1: even)",
}
STABILITY = {
    "changed": "share of assignments changed since the last look",
    "token_entropy": "token entropy (nats)",
    "logit_rms": "root mean square of router logits",
}
SHOWN = {"load_imbalance": LOAD, "router_stability": STABILITY}
ALSO = {"load_imbalance": ("assignments/largest_share", "assignments/dead_experts"), "router_stability": ("shift",)}


@dataclass(frozen=True, order=True)
class Run:
    """One fit of a recipe with another router rule."""

    family: str
    rule: str
    rate: float
    seed: int

    @property
    def path(self) -> Path:
        """Where its result is kept."""
        return RECORD / "runs" / f"{self.family}-{self.rule}-{self.rate:g}-{self.seed}.json"

    @property
    def result(self) -> dict[str, Any] | None:
        """What it gave, if it is finished."""
        if not self.path.exists():
            return None
        found: dict[str, Any] = json.loads(self.path.read_text())
        return found

    def arguments(self, folder: str) -> list[str]:
        """The command line after `lit-symopt`."""
        options = {
            "--model.symopt.roles.router.rule": self.rule,
            "--model.symopt.roles.router.centered": "false" if self.rule == "adamw" else "true",
            "--model.symopt.roles.router.lr": str(self.rate),
            "--seed_everything": str(self.seed),
            "--trainer.max_steps": str(STEPS),
            "--trainer.val_check_interval": str(STEPS),
            "--trainer.num_sanity_val_steps": "0",
            "--trainer.logger.init_args.save_dir": folder,
        }
        recipe = ROOT / "configs" / f"{self.family}_tiny.yaml"
        return ["fit", "--config", str(recipe), *(text for pair in options.items() for text in pair)]


def fit(run: Run) -> None:
    """Run the recipe once and keep what it logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    began = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lit_symopt", *run.arguments(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout[-1000:]}\n{result.stderr[-3000:]}")
        [events] = Path(folder).rglob("events.out.tfevents.*")
        curves = {file: _curves(next(Path(folder).rglob(f"{file}.npz")), file) for file in SHOWN}
        loss = EventAccumulator(str(events)).Reload().Scalars("val/loss")[-1].value
    kept = {"loss": loss, "seconds": round(perf_counter() - began, 1), **curves}
    run.path.parent.mkdir(parents=True, exist_ok=True)
    partial = run.path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(kept) + "\n")
    partial.replace(run.path)
    print(f"{run.family:8} {run.rule:14} {run.rate:<9g} seed {run.seed}: {loss:.4f} in {kept['seconds']} s", flush=True)


def _curves(path: Path, file: str) -> dict[str, Any]:
    """Every curve by layer, `[looks][layers]`, rounded to five digits."""
    with np.load(path) as arrays:
        names = (*SHOWN[file], *ALSO[file])
        rounded = {name: [[float(f"{v:.5g}") for v in row] for row in arrays[name]] for name in names}
        return {"steps": arrays["steps"].tolist(), **rounded}


def tuning() -> list[Run]:
    """The runs that choose a rate for every family and rule."""
    return [Run(f, rule, rate, TUNING_SEED) for f in FAMILIES for rule in RULES for rate in RATES]


def best(family: str, rule: str) -> float:
    """The rate with the lowest validation loss of those tried."""
    losses = {rate: _result(Run(family, rule, rate, TUNING_SEED))["loss"] for rate in RATES}
    return min(losses, key=lambda rate: losses[rate])


def final() -> list[Run]:
    """The runs that are drawn; the tuning runs must be finished."""
    return [Run(f, rule, best(f, rule), seed) for f in FAMILIES for rule in RULES for seed in FRESH_SEEDS]


def run_all(jobs: int) -> None:
    """Run what is missing, `jobs` at once."""
    for wanted in (tuning, final):
        missing = [run for run in wanted() if run.result is None]
        with ThreadPoolExecutor(jobs) as pool:
            for _ in pool.map(fit, missing):
                pass


def _result(run: Run) -> dict[str, Any]:
    found = run.result
    if found is None:
        raise SystemExit(f"{run.path} is missing: run the script without --report first")
    return found


def _over_layers(run: Run, file: str, name: str) -> Any:
    """A curve `[looks]`: the mean over layers."""
    return np.array(_result(run)[file][name], dtype=float).mean(1)


def draw(family: str) -> None:
    """One picture: load imbalance above, stability below, a line a rule: mean of the seeds, band from min to max."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3)
    for row, (file, names) in zip(panels, SHOWN.items(), strict=True):
        for axes, (name, title) in zip(row, names.items(), strict=True):
            for rule, label in RULES.items():
                rate = best(family, rule)
                runs = [Run(family, rule, rate, seed) for seed in FRESH_SEEDS]
                steps = np.array(_result(runs[0])[file]["steps"])
                lines = np.stack([_over_layers(run, file, name) for run in runs])
                seen = ~np.isnan(lines).any(0)  # nothing can have changed at the first look
                steps, lines = steps[seen], lines[:, seen]
                axes.plot(steps, lines.mean(0), label=f"{label}, lr {rate:g}")
                axes.fill_between(steps, lines.min(0), lines.max(0), alpha=0.2)
            axes.set(title=title, xlabel="optimizer step")
            axes.grid(alpha=0.3)
    panels[0, 0].legend()
    seeds = ", ".join(map(str, FRESH_SEEDS))
    figure.suptitle(
        f"{FAMILIES[family]} (configs/{family}_tiny.yaml), routers by rule: mean over layers and seeds {seeds}, "
        "band from lowest to highest seed"
    )
    canvas.print_png(RECORD / f"{family}.png")


HEADER = """\
# Routers under three update rules

Load imbalance (on the training batches) and stability (on a fixed probe set) of the routers of two tiny mixtures of
experts, 8 experts a layer and 2 a token, 4 layers, {steps} steps, without a balance loss. Only the rule of the router's
weight differs: `left_spectral` and `row_norm`, both centered (the symmetric rules of a softmax router), and `adamw`.
All else is the recipe's symmetric stack. Each rule had {count} rates ({rates}) with seed {tuning}; the rate with the
lowest validation loss was run again with seeds {fresh}: mean (lowest to highest). All numbers are means over layers.

![OLMoE](olmoe.png)

![gpt-oss](gpt_oss.png)

- command: `python profiles/router_curves.py`; the runs are in `runs/`, one file each
- recipes: `configs/olmoe_tiny.yaml`, `configs/gpt_oss_tiny.yaml`; a look every 20 steps
- {environment}

The tables give the coefficient of variation of the assignments (0 is even) and the balance loss (1 is even) at the last
look, the share of assignments that changed from one look to the next as a mean over the second half of the run, and the
root mean square of the router's logits at the last look.
"""


def report() -> str:
    """The record as Markdown."""
    stored = RECORD / "environment.txt"
    text = HEADER.format(
        steps=STEPS,
        count=len(RATES),
        rates=", ".join(f"{rate:g}" for rate in RATES),
        tuning=TUNING_SEED,
        fresh=", ".join(map(str, FRESH_SEEDS)),
        environment=stored.read_text().strip() if stored.exists() else environment(),
    )
    for family, shown in FAMILIES.items():
        text += f"\n## {shown}\n\n| router rule | best rate | inside the three | validation loss | variation | "
        text += "balance loss | changed | logit rms |\n|---|---|---|---|---|---|---|---|\n"
        for rule, label in RULES.items():
            rate = best(family, rule)
            runs = [Run(family, rule, rate, seed) for seed in FRESH_SEEDS]
            inside = "yes" if min(RATES) < rate < max(RATES) else "no"
            columns = [_spread([_result(run)["loss"] for run in runs]), *(_spread(v) for v in _ends(runs))]
            text += f"| {label} | {rate:g} | {inside} | {' | '.join(columns)} |\n"
        text += f"\nThe same with seed {TUNING_SEED} at every rate:\n\n"
        text += "| router rule | rate | validation loss | variation | balance loss | changed | logit rms |\n"
        text += "|---|---|---|---|---|---|---|\n"
        for rule, label in RULES.items():
            for rate in RATES:
                run = Run(family, rule, rate, TUNING_SEED)
                numbers = [_result(run)["loss"], *(values[0] for values in _ends([run]))]
                text += f"| {label} | {rate:g} | {' | '.join(f'{number:.3f}' for number in numbers)} |\n"
    reading = RECORD / "reading.md"  # written by hand, for these runs
    return f"{text}\n{reading.read_text()}" if reading.exists() else text


def _ends(runs: list[Run]) -> list[list[float]]:
    """By run: variation and balance loss at the end, changes in the second half, logits at the end."""
    changed = [_over_layers(run, "router_stability", "changed") for run in runs]
    return [
        [float(_over_layers(run, "load_imbalance", "assignments/cv")[-1]) for run in runs],
        [float(_over_layers(run, "load_imbalance", "balance_loss")[-1]) for run in runs],
        [float(curve[len(curve) // 2 :].mean()) for curve in changed],
        [float(_over_layers(run, "router_stability", "logit_rms")[-1]) for run in runs],
    ]


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def environment() -> str:
    """Device, versions and commit of a record."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", "lit_symopt", "callbacks", "configs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return (
        f"{platform.machine()} CPU, {os.cpu_count()} cores, one thread a run; torch {torch.__version__.split('+')[0]}; "
        f"Python {platform.python_version()}; commit {commit.stdout.strip() or 'unknown'}"
        + (" with changes that were not committed" if changed.stdout.strip() else "")
    )


def main() -> None:
    """Run what is missing, draw and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once")
    parser.add_argument("--report", action="store_true", help="run nothing, only redraw and rebuild the tables")
    given = parser.parse_args()
    if not given.report:
        RECORD.mkdir(parents=True, exist_ok=True)
        (RECORD / "environment.txt").write_text(environment() + "\n")
        run_all(given.jobs)
    for family in FAMILIES:
        draw(family)
    text = report()
    (RECORD / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
