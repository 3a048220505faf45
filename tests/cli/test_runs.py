"""Whole runs in processes of their own. The oracle of every resume is the uninterrupted run."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.cli.conftest import command, prepare, scalars

ROOT = Path(__file__).parents[2]


def weights(version: Path, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(version / "checkpoints" / name, weights_only=True)
    return loaded


def same(one: Any, other: Any) -> bool:
    """Bitwise equality of nested plain data."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of 20 steps that nothing interrupted; an epoch of its data is 16 steps."""
    folder = prepare(tmp_path_factory.mktemp("whole"))
    finished = command("fit", "--config", "tiny.yaml", cwd=folder)
    assert finished.returncode == 0, finished.stderr
    (folder / "stdout.txt").write_text(finished.stdout)
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, killed at step 13 and continued by `--ckpt_path last`, killed at step 18 and continued again."""
    folder = prepare(tmp_path_factory.mktemp("killed"))
    for step, resume in ((13, ()), (18, ("--ckpt_path", "last"))):
        kill = ("--trainer.callbacks+=killer.KillAt", f"--trainer.callbacks.step={step}")
        dead = command("fit", "--config", "tiny.yaml", *resume, *kill, cwd=folder)
        assert dead.returncode == -signal.SIGKILL, dead.stderr
    finished = command("fit", "--config", "tiny.yaml", "--ckpt_path", "last", cwd=folder)
    assert finished.returncode == 0, finished.stderr
    assert "continuing from runs/tiny/version_1/checkpoints/last.ckpt" in finished.stdout
    return folder


def test_a_run_leaves_its_config_logs_and_checkpoints_in_a_folder_of_its_own(whole: Path) -> None:
    version = whole / "runs/tiny/version_0"
    assert sorted(path.name for path in (version / "checkpoints").iterdir()) == [
        "last.ckpt",
        "step=10.ckpt",
        "step=15.ckpt",
        "step=20.ckpt",
        "step=5.ckpt",
    ]
    saved = yaml.safe_load((version / "config.yaml").read_text())
    assert saved["model"]["init_args"]["vocab_size"] == 64  # interpolations are resolved in it
    assert list(version.glob("events.out.tfevents.*"))


def test_a_run_logs_losses_tokens_and_a_rate_for_every_role(whole: Path) -> None:
    logged = scalars(whole / "runs/tiny/version_0")
    tags = {tag for tag, _ in logged}
    assert {"train/loss", "train/tokens", "val/loss", "val/perplexity"} <= tags
    assert {tag.rsplit("/")[-1] for tag in tags if tag.startswith("lr-")} >= {"embedding", "query", "lm_head", "vector"}
    assert logged["train/tokens", 19] == 20 * 4 * 16
    assert logged["val/loss", 19] < logged["val/loss", 4] < 4.16  # the walk is learned; log 64 = 4.16


def test_a_run_says_what_it_did_and_where_to_look(whole: Path) -> None:
    said = (whole / "stdout.txt").read_text()
    assert "model.model.embed_tokens.weight" in said  # the block table
    assert "Finished at step 20." in said
    assert "at step 0, " in said
    assert "trained on        1,280 tokens" in said
    assert "tensorboard --load_fast=false --logdir runs/tiny" in said


def test_the_same_seed_gives_bitwise_the_same_weights_twice(whole: Path, killed: Path) -> None:
    # Up to the kill at step 13 the second run is a run of its own.
    one, two = (weights(folder / "runs/tiny/version_0", "step=10.ckpt") for folder in (whole, killed))
    assert same(one["state_dict"], two["state_dict"])
    assert same(one["optimizer_states"], two["optimizer_states"])


def test_a_killed_run_continues_to_bitwise_the_same_weights_and_optimizer(whole: Path, killed: Path) -> None:
    one = weights(whole / "runs/tiny/version_0", "step=20.ckpt")
    two = weights(killed / "runs/tiny/version_2", "step=20.ckpt")
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "random_state", "lit_symopt", "global_step"):
        assert same(one[part], two[part]), part


def test_the_curves_of_a_killed_run_equal_those_of_the_uninterrupted_one(whole: Path, killed: Path) -> None:
    expected = scalars(whole / "runs/tiny/version_0")
    pieces = [scalars(killed / f"runs/tiny/version_{n}") for n in range(3)]
    for piece in pieces:  # nothing logged before a kill is lost or different, nothing is logged differently after
        assert piece.items() <= expected.items()
    assert pieces[0] | pieces[1] | pieces[2] == expected
    assert ("train/loss", 11) in pieces[0]  # logged up to the step before the kill, beyond the checkpoint of step 10


def test_validate_and_test_measure_the_checkpoint(whole: Path) -> None:
    expected = scalars(whole / "runs/tiny/version_0")["val/loss", 19]
    for name, tag in (("validate", "val/loss"), ("test", "test/loss")):
        done = command(name, "--config", "tiny.yaml", "--ckpt_path", "last", cwd=whole)
        assert done.returncode == 0, done.stderr
        newest = max((whole / "runs/tiny").glob("version_*"), key=lambda path: int(path.name.rsplit("_")[-1]))
        measured = [value for (logged, _), value in scalars(newest).items() if logged == tag]
        assert measured == [pytest.approx(expected, rel=1e-6)]
        shutil.rmtree(newest)


def test_the_saved_config_runs_again(whole: Path) -> None:
    saved = "runs/tiny/version_0/config.yaml"
    again = command("fit", "--config", saved, "--trainer.max_steps", "1", "--trainer.logger.name", "again", cwd=whole)
    assert again.returncode == 0, again.stderr
    first = scalars(whole / "runs/tiny/version_0")["train/loss", 0]
    assert scalars(whole / "runs/again/version_0")["train/loss", 0] == first


def test_fabric_runs_the_package_by_the_path_of_its_main_file(whole: Path) -> None:
    script = str(ROOT / "lit_symopt/__main__.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    fabric = [str(Path(sys.executable).with_name("fabric")), "run"]
    launch = [*fabric, "--accelerator", "cpu", "--devices", "1", "--main-port", port, script]
    options = ["fit", "--config", "tiny.yaml", "--trainer.max_steps", "1", "--trainer.logger.name", "fabric"]
    done = subprocess.run([*launch, *options], cwd=whole, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first = scalars(whole / "runs/tiny/version_0")["train/loss", 0]
    assert scalars(whole / "runs/fabric/version_0")["train/loss", 0] == first


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["adamw", "muon", "polargrad", "ssd", "scion"])
def test_every_stack_trains_by_one_option(whole: Path, stack: str) -> None:
    options = ["--model.symopt.stack", stack, "--trainer.logger.name", stack]
    done = command("fit", "--config", "tiny.yaml", *options, cwd=whole)
    assert done.returncode == 0, done.stderr
    logged = scalars(whole / f"runs/{stack}/version_0")
    assert logged["val/loss", 19] < 4.16
