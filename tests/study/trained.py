"""Studies of a recipe that trains in a second, and runs of them by the command line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from lit_symopt.cli import main
from tests.cli.conftest import prepare

STEPS = 6
TOKENS = STEPS * 4 * 16
"""Of a run of length 1."""

PLAIN: dict[str, Any] = {
    "name": "small",
    "families": {"two": "tiny.yaml", "one": {"config": "tiny.yaml", "set": {"model.num_hidden_layers": 1}}},
    "steps": STEPS,
    "set": {"model.hidden_size": 16, "model.attention_dropout": 0.0},
    "contenders": {
        "adamw": {
            "set": {"model.symopt.stack": "adamw"},
            "search": {
                "model.symopt.lr": {"start": 0.01, "span": 8},
                "model.symopt.roles.embedding.lr_multiplier": {"start": 2, "span": 4, "families": ["two"]},
            },
            "lengths": [1.0, 0.5],
        },
        "symmetric": {"set": {"model.symopt.stack": "symmetric", "model.symopt.lr": 0.003}, "families": ["two"]},
    },
    "search": {"sampler": "random", "trials": 2, "seed": 1},
    "seeds": [2],
    "reference": "adamw",
    "record": ["train/loss"],
    "looks": 3,
    "look_batches": 2,
}
RUNS = 9
"""Two trials and two lengths in two families, and one run without a search."""


def write(folder: Path, **changes: Any) -> Path:
    """The recipe, its data and a study in a folder; keys of the study may be changed."""
    prepare(folder)
    (folder / "study.yaml").write_text(yaml.safe_dump({**PLAIN, **changes}, sort_keys=False))
    return folder


def start(folder: Path) -> subprocess.Popen[str]:
    """`lit-symopt study` as a process of its own; its runs are in `out`."""
    return subprocess.Popen(
        [sys.executable, "-m", "lit_symopt", "study", "--config", "study.yaml", "--out", "out", "--jobs", "1"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def study(folder: Path) -> subprocess.CompletedProcess[str]:
    """The same called in this process: what runs are forked from is started once for all studies of a module."""
    arguments = ["study", "--config", "study.yaml", "--out", "out", "--jobs", "1"]
    out, err = io.StringIO(), io.StringIO()
    before = Path.cwd()
    os.chdir(folder)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main(arguments)
    finally:
        os.chdir(before)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def results(folder: Path) -> dict[str, tuple[int, bytes]]:
    """When each result was written, and what it says."""
    found = sorted((folder / "out" / "runs").glob("*/result.json"))
    return {path.parent.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}
