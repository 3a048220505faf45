"""The overlays of configs/strategy: parsed with every recipe, and run on two CPU processes."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from lit_symopt import strategies
from tests.cli.conftest import command, prepare, scalars
from tests.cli.test_recipes import CONFIGS, RECIPES, TINY, parse

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload")
FOLDERS = {"gpu": CONFIGS / "strategy", "cpu": CONFIGS / "strategy" / "cpu"}
ON_CPU = [CONFIGS / "quickstart.yaml", *TINY]

pytestmark = pytest.mark.deepspeed


def test_there_is_an_overlay_a_strategy_for_gpus_and_for_cpus() -> None:
    for folder in FOLDERS.values():
        assert sorted(path.stem for path in folder.glob("*.yaml")) == sorted(STRATEGIES)


@pytest.mark.parametrize("where", FOLDERS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_an_overlay_states_purpose_command_hardware_and_result(name: str, where: str) -> None:
    overlay = FOLDERS[where] / f"{name}.yaml"
    header = [line for line in overlay.read_text().splitlines() if line.startswith("#")]
    for word in ("Purpose", "Command", "Hardware", "Result"):
        assert any(line.startswith(f"# {word}") for line in header), word
    assert f"--config {overlay.relative_to(CONFIGS.parent)}" in " ".join(header)
    for mentioned in re.findall(r"configs/\S+\.yaml", " ".join(header)):
        assert (CONFIGS.parent / mentioned).is_file(), mentioned
    assert max(map(len, overlay.read_text().splitlines())) <= 120


plainly = cache(parse)


@pytest.mark.parametrize(
    ("where", "recipe"),
    [("gpu", recipe) for recipe in RECIPES] + [("cpu", recipe) for recipe in ON_CPU],
    ids=lambda given: getattr(given, "stem", given),
)
@pytest.mark.parametrize("name", STRATEGIES)
def test_an_overlay_changes_the_strategy_of_every_recipe_and_nothing_else(name: str, where: str, recipe: Path) -> None:
    plain, config = plainly(recipe).as_dict(), parse(recipe, FOLDERS[where] / f"{name}.yaml").as_dict()
    chosen = config["trainer"].pop("strategy")
    del plain["trainer"]["strategy"]
    if where == "cpu":
        assert (config["trainer"].pop("accelerator"), config["trainer"].pop("devices")) == ("cpu", 2)
        del plain["trainer"]["accelerator"], plain["trainer"]["devices"]
    assert config == plain
    if name == "ddp":
        assert chosen == "ddp"
        return
    kind = {("fsdp2", where): "FSDP2Strategy"}.get(
        (name, where), "CPUDeepSpeedStrategy" if where == "cpu" else "DeepSpeedStrategy"
    )
    assert chosen["class_path"] == f"lit_symopt.strategies.{kind}"
    assert hasattr(strategies, kind)
    if name.startswith("zero"):
        assert chosen["init_args"]["stage"] == int(name[4])
        assert bool(chosen["init_args"].get("offload_optimizer")) == name.endswith("offload")


def run(folder: Path, name: str, recipe: str, *options: str) -> dict[tuple[str, int], float]:
    """What three steps of a recipe log under an overlay."""
    overlay = FOLDERS["cpu"] / f"{name}.yaml"
    done = command(
        *("fit", "--config", recipe, "--config", str(overlay), "--trainer.max_steps", "3"),
        *("--trainer.logger.name", name, "--trainer.val_check_interval", "3", *options),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return scalars(folder / "runs" / name / "version_0")


@pytest.fixture(scope="module")
def workplace_of_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("strategies"))


@pytest.fixture(scope="module")
def one_process(workplace_of_all: Path) -> dict[tuple[str, int], float]:
    """The losses of one process that accumulates two batches for every one of two processes'."""
    done = command(
        *("fit", "--config", "tiny.yaml", "--trainer.max_steps", "3", "--trainer.accumulate_grad_batches", "2"),
        *("--trainer.logger.name", "one", "--trainer.val_check_interval", "6", *NO_DROPOUT),
        cwd=workplace_of_all,
    )
    assert done.returncode == 0, done.stderr
    return scalars(workplace_of_all / "runs/one/version_0")


NO_DROPOUT = ("--model.attention_dropout", "0.0")


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_an_overlay_runs_on_two_processes_to_the_loss_of_one(
    name: str, workplace_of_all: Path, one_process: dict[tuple[str, int], float]
) -> None:
    logged = run(workplace_of_all, name, "tiny.yaml", *NO_DROPOUT)
    assert logged["val/loss", 2] == pytest.approx(one_process["val/loss", 2], rel=1e-5)
    saved = workplace_of_all / "runs" / name / "version_0" / "checkpoints" / "last.ckpt"
    assert saved.exists()
    assert torch.isfinite(torch.tensor(list(logged.values()))).all()


# Every recipe for CPUs and every overlay at least once.
TOGETHER = list(zip(itertools.cycle(ON_CPU), STRATEGIES, strict=False))


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "name"), TOGETHER, ids=lambda given: getattr(given, "stem", given))
def test_an_overlay_runs_as_its_header_says(recipe: Path, name: str, tmp_path: Path) -> None:
    limits = ("--trainer.limit_val_batches", "1", "--data.batch_size", "2", "--model.symopt.schedule.warmup_steps", "0")
    logged = run(tmp_path, name, str(recipe), *limits)
    assert 0.0 < logged["val/loss", 2] < 9.0


@pytest.mark.deepspeed
def test_what_a_strategy_refuses_is_said_without_a_traceback(tmp_path: Path) -> None:
    config = '{"optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 2}}'
    arguments = [sys.executable, "-m", "lit_symopt", "fit"]
    for recipe in ("quickstart.yaml", "strategy/cpu/zero2.yaml"):
        arguments += ["--config", str(CONFIGS / recipe)]
    arguments += ["--trainer.strategy.init_args.config", config]
    result = subprocess.run(arguments, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert "the DeepSpeed config has an optimizer of its own, 'Adam'" in result.stderr
    assert "Traceback" not in result.stderr
