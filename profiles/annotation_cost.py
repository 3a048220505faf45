"""What the named ranges of a step cost when no profiler runs: steps with and without them, paired.

    python profiles/annotation_cost.py            # three minutes; one thread
    python profiles/annotation_cost.py --steps 20 --processes 3

The build without them is made from the same source: a copy of the package in which every `with phase(...): body` is its
body alone. It and two copies of the package as it is are loaded side by side in one process, and in every round each
takes one step on the same gradients, in random order. Where the tensors of a copy happen to lie makes it a little
faster or slower for the whole of a process, so several processes are asked. The two equal copies show the noise of the
method. The second part times the hooks of `KernelTime` between two windows.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "profiles" / "records" / "annotation-cost"
RANGES = {"phase", "range_of_step"}

# The launch-bound case is the worst one: thousands of parameters, a step of two milliseconds.
SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
}
TINY: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
CASES = {"Qwen3 of configs/qwen3_tiny.yaml": TINY, "Qwen3 of 5,600 parameters": SMALL}


class _Stripped(ast.NodeTransformer):
    """Replaces `with phase(...): body` by its body."""

    def __init__(self) -> None:
        self.count = 0

    def visit_With(self, node: ast.With) -> Any:
        """The body alone, if the range is all that the statement opens."""
        self.generic_visit(node)
        calls = [item.context_expr for item in node.items]
        if len(calls) == 1 and isinstance(calls[0], ast.Call) and getattr(calls[0].func, "id", "") in RANGES:
            self.count += 1
            return node.body
        return node


def strip(source: str) -> tuple[str, int]:
    """A module without ranges, and how many it had.

    >>> print(*strip("with phase(of, 'rule'): x = 1"))
    x = 1 1
    """
    stripped = _Stripped()
    tree = stripped.visit(ast.parse(source))
    return ast.unparse(ast.fix_missing_locations(tree)), stripped.count


def copy_without_ranges(folder: Path) -> int:
    """Copies the package and takes its ranges out; returns how many."""
    shutil.copytree(ROOT / "lit_symopt", folder / "lit_symopt", ignore=shutil.ignore_patterns("__pycache__"))
    count = 0
    for path in (folder / "lit_symopt").rglob("*.py"):
        text, found = strip(path.read_text())
        if found:
            path.write_text(text)
        count += found
    return count


@contextmanager
def _package_from(folder: Path) -> Iterator[ModuleType]:
    """A package of its own, whose modules nobody else sees."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "lit_symopt"}
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("lit_symopt")
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == "lit_symopt"]:
            del sys.modules[name]
        sys.modules.update(before)


def stepper(folder: Path, sizes: dict[str, Any]) -> Callable[[], float]:
    """A function that takes one step of the package in `folder`, and returns its seconds."""
    with _package_from(folder) as package:
        torch.manual_seed(0)
        model = importlib.import_module("lit_symopt.models").Qwen3(**sizes)
        optimizer = package.SymOpt.for_module(model)
        if not str(package.__file__).startswith(str(folder)):
            raise RuntimeError(f"{package.__file__} was imported in place of {folder}")
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()  # what is imported late is imported now

    def timed() -> float:
        began = perf_counter()
        optimizer.step()
        return perf_counter() - began

    return timed


def compare(sizes: dict[str, Any], *, steps: int, seed: int) -> dict[str, float]:
    """Median ratios of the seconds of steps with ranges, with ranges again, and without, in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        copy_without_ranges(Path(scratch))
        folders = {"with": ROOT, "with again": ROOT, "without": Path(scratch)}
        shuffled, generator = list(folders), random.Random(seed)
        generator.shuffle(shuffled)
        arms = {name: stepper(folders[name], sizes) for name in shuffled}
        taken: dict[str, list[float]] = {name: [] for name in arms}
        for index in range(steps + 5):
            generator.shuffle(shuffled)
            for name in shuffled:
                seconds = arms[name]()
                if index >= 5:
                    taken[name].append(seconds)
    return {
        "step_ms": median(taken["without"]) * 1e3,
        "with/without": _ratio(taken["with"], taken["without"]),
        "with/with again": _ratio(taken["with"], taken["with again"]),
    }


def _ratio(over: list[float], under: list[float]) -> float:
    return median(a / b for a, b in zip(over, under, strict=True))


def in_processes(name: str, *, steps: int, processes: int) -> dict[str, Any]:
    """What `compare` says in each of several processes: the median, the lowest and the highest."""
    found = []
    for seed in range(processes):
        command = [sys.executable, str(Path(__file__)), "--steps", str(steps), "--one", name, "--seed", str(seed)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        key: {"median": median(values), "low": min(values), "high": max(values)}
        for key in found[0]
        for values in [[round(one[key], 5) for one in found]]
    }


def idle_callback(step_ms: float) -> dict[str, float]:
    """Milliseconds that the hooks of `KernelTime` take in a training step outside every window."""
    import lightning as L

    from lit_symopt.callbacks import KernelTime
    from lit_symopt.models import Qwen3

    seconds: list[float] = []

    class Timed(KernelTime):
        """Adds up the time of its own hooks."""

    def wrap(name: str) -> None:
        inner = getattr(KernelTime, name)

        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            began = perf_counter()
            try:
                return inner(self, *args, **kwargs)
            finally:
                seconds.append(perf_counter() - began)

        setattr(Timed, name, hook)

    hooks = [name for name in vars(KernelTime) if name.startswith(("on_train_batch", "on_before", "on_after"))]
    for name in hooks:
        wrap(name)
    model = Qwen3(**SMALL)
    tokens = torch.randint(32, (64, 8))
    rows: Any = [{"input_ids": row} for row in tokens]
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=4)
    steps = 200
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            callbacks=[Timed(wait=steps - 6, warmup=1, active=1, ceilings=False, memory=False, folder=folder)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(model, loader)
    idle = seconds[: (steps - 10) * len(hooks)]
    per_step = sum(idle) / (steps - 10) * 1e3
    return {"hooks": len(hooks), "ms_per_step": round(per_step, 5), "share_of_update": round(per_step / step_ms, 5)}


def page(result: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [
        "# What the ranges cost when nobody profiles",
        "",
        f"- command: `python profiles/annotation_cost.py`, {result['steps']} rounds a process; data: `result.json`",
        f"- {result['machine']}, one thread; torch {result['torch']}; commit {result['commit']}",
        f"- {result['processes']} processes; in each the median of the paired ratios. Shown are the median of these,",
        "  the lowest and the highest. `with / with again` are two equal builds: what the method cannot tell apart.",
        "",
        "| model | step | with / without ranges | with / with again |",
        "|---|---|---|---|",
    ]
    for name, case in result["cases"].items():
        cells = [f"{case[key]['median']:.4f} ({case[key]['low']:.4f} to {case[key]['high']:.4f})" for key in _RATIOS]
        lines.append(f"| {name} | {case['step_ms']['median']:.2f} ms | {' | '.join(cells)} |")
    idle = result["idle"]
    lines += [
        "",
        f"`KernelTime` between two windows: {idle['hooks']} hooks, {idle['ms_per_step'] * 1e3:.1f} µs a training step, "
        f"{100 * idle['share_of_update']:.2f} % of the optimizer's step of the tiny recipe alone.",
        "",
    ]
    return "\n".join(lines)


_RATIOS = ("with/without", "with/with again")


def main() -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--processes", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RECORD)
    parser.add_argument("--one", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.one:
        print(json.dumps(compare(CASES[given.one], steps=given.steps, seed=given.seed)))
        return
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    cases = {name: in_processes(name, steps=given.steps, processes=given.processes) for name in CASES}
    result = {
        "steps": given.steps,
        "processes": given.processes,
        "machine": f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown",
        "cases": cases,
        "idle": idle_callback(next(iter(cases.values()))["step_ms"]["median"]),
    }
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (given.output / "README.md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
