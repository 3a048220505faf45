"""`fabric run` with two processes under DDP. Oracle: one process that accumulates the batches of both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import command, prepare, scalars

ROOT = Path(__file__).parents[2]
STEPS = 3
DDP = str(ROOT / "configs/strategy/cpu/ddp.yaml")
OPTIONS = (
    *("fit", "--config", "tiny.yaml", "--trainer.max_steps", str(STEPS), "--model.attention_dropout", "0.0"),
    *("--trainer.num_sanity_val_steps", "0"),
)

# Writes down, on every rank, who it is and what the optimizer was attached to.
WITNESS = """\
import json
from dataclasses import asdict
from pathlib import Path

from lightning import Callback


class Witness(Callback):
    def on_train_end(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        found = {
            "strategy": getattr(optimizer.distribution, "strategy", None),
            "world": trainer.world_size,
            "steps": trainer.global_step,
            "report": asdict(optimizer.plan_report()) if optimizer.distribution else {},
            "weights": sum(float(weight.double().sum()) for weight in pl_module.parameters()),
        }
        Path(f"rank-{trainer.global_rank}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = prepare(tmp_path_factory.mktemp("fabric"))
    (place / "witness.py").write_text(WITNESS)
    return place


@pytest.fixture(scope="module")
def launched(folder: Path) -> list[dict[str, Any]]:
    """What each rank of the run has to say; its logs are in `runs/fabric/version_0`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    fabric = [str(Path(sys.executable).with_name("fabric")), "run", "--accelerator", "cpu", "--devices", "2"]
    done = subprocess.run(
        [
            *fabric,
            *("--main-port", port, str(ROOT / "lit_symopt/__main__.py"), *OPTIONS, "--config", DDP),
            *("--trainer.logger.name", "fabric", "--trainer.val_check_interval", str(STEPS)),
            "--trainer.callbacks+=witness.Witness",
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"Finished at step {STEPS}." in done.stdout
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_take_part_and_share_the_work_of_the_updates(launched: list[dict[str, Any]]) -> None:
    for rank in launched:
        assert (rank["strategy"], rank["world"], rank["steps"]) == ("DDP", 2, STEPS)
        one, other = rank["report"]["work"]
        assert 0 < one < 2 * other < 4 * one
        assert rank["report"]["routes"]["query"] == {"owner": 2}  # one rank computes, the other receives
    assert launched[0]["weights"] == launched[1]["weights"]


def test_the_validation_loss_is_that_of_one_process_with_the_same_global_batch(
    folder: Path, launched: list[dict[str, Any]]
) -> None:
    alone = command(
        *(*OPTIONS, "--trainer.accumulate_grad_batches", "2", "--trainer.logger.name", "one"),
        *("--trainer.val_check_interval", str(2 * STEPS)),
        cwd=folder,
    )
    assert alone.returncode == 0, alone.stderr
    one, two = (scalars(folder / f"runs/{name}/version_0") for name in ("one", "fabric"))
    assert two["val/loss", STEPS - 1] == pytest.approx(one["val/loss", STEPS - 1], rel=1e-5)
    assert two["train/tokens", STEPS - 1] == STEPS * 2 * 4 * 16
    assert not (folder / "runs/fabric/version_1").exists()  # one folder for both processes
