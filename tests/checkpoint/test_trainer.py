"""Runs of the Trainer moved from strategy to strategy. The oracle is the run of one process that was not moved."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_symopt.checkpoint import consolidate, describe
from lit_symopt.errors import CheckpointError
from lit_symopt.models import Qwen3
from lit_symopt.models.checkpoint import newest_checkpoint, open_checkpoint, open_header
from tests.checkpoint.trainer_runs import fit, module_of
from tests.sharding.processes import Ranks, RanksFailed

STEPS = 10
STATIONS = ["zero2", "fsdp2", "zero3", "ddp", "zero1", "one"]


@pytest.fixture(scope="module")
def one() -> Iterator[Ranks]:
    with Ranks(1, group=False) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2, group=False) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def unmoved(one: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process from beginning to end, and its ordinary file of step 3, as the Trainer writes it."""
    path = str(tmp_path_factory.mktemp("unmoved") / "step=3.ckpt")
    (found,) = one(fit, "one", STEPS, devices=1, save=path, save_at=3)
    assert "error" not in found
    return {**found, "path": path}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert "error" not in found, found
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).norm() <= 1e-5 * weight.norm(), name
    assert {key: found[key] for key in ("step", "tokens", "rates")} == {
        key: expected[key] for key in ("step", "tokens", "rates")
    }


@pytest.mark.deepspeed
def test_a_run_that_changes_its_strategy_again_and_again_is_the_run_that_does_not(
    one: Ranks, two: Ranks, unmoved: dict[str, Any], tmp_path: Path
) -> None:
    resume = unmoved["path"]
    for step, strategy in enumerate(STATIONS, start=STEPS + 1 - len(STATIONS)):
        ranks, devices = (one, 1) if strategy == "one" else (two, 2)
        saved = tmp_path / f"step={step}.ckpt"
        (found, *_) = ranks(fit, strategy, step, devices=devices, resume=resume, save=str(saved))
        assert found.get("step") == step, found
        assert f"step      {step}\n  model     qwen3\n  stack     symmetric" in describe(saved)
        resume = str(consolidate(saved, tmp_path / f"whole/step={step}.ckpt"))
    assert_same(found, unmoved)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_file_of_one_process_is_resumed_as_it_is(two: Ranks, unmoved: dict[str, Any], strategy: str) -> None:
    found, _ = two(fit, strategy, STEPS, resume=unmoved["path"])
    assert_same(found, unmoved)


@pytest.fixture(scope="module")
def folder(two: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What FSDP2 saved at step 3."""
    saved = tmp_path_factory.mktemp("fsdp2") / "step=3.ckpt"
    two(fit, "fsdp2", 3, save=str(saved))
    return saved


def test_a_folder_of_fsdp2_is_resumed(two: Ranks, unmoved: dict[str, Any], folder: Path) -> None:
    found, _ = two(fit, "fsdp2", STEPS, resume=str(folder))
    assert_same(found, unmoved)


def test_the_newest_checkpoint_may_be_a_folder_and_one_without_a_shard_is_passed_over(
    unmoved: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    module = module_of()
    file = tmp_path / "a.ckpt"
    shutil.copy(unmoved["path"], file)
    os.utime(file, (1_000, 1_000))
    whole = tmp_path / "b.ckpt"
    shutil.copytree(folder, whole)
    assert newest_checkpoint([(tmp_path, "*.ckpt")], module) == (whole, [])
    cut = tmp_path / "c.ckpt"
    shutil.copytree(folder, cut, copy_function=shutil.copyfile)  # written now
    (cut / "__1_0.distcp").unlink()
    found, (passed_over,) = newest_checkpoint([(tmp_path, "*.ckpt")], module)
    assert found == whole
    assert "c.ckpt/__1_0.distcp is missing or cut short" in passed_over
    assert open_header(whole)["global_step"] == 3
    with pytest.raises(CheckpointError, match="make one file of it first: lit-symopt checkpoint consolidate"):
        open_checkpoint(whole)


def test_a_folder_of_another_architecture_is_refused_by_name(folder: Path) -> None:
    other = Qwen3(vocab_size=31, hidden_size=24, intermediate_size=19, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match="hidden_size is 12 there and 24 here"):
        newest_checkpoint([(folder.parent, "*.ckpt")], other)


def test_a_kill_in_the_midst_of_a_save_leaves_the_folder_that_was_there(
    two: Ranks, unmoved: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "last.ckpt"
    shutil.copytree(folder, saved)
    with pytest.raises(RanksFailed) as failed:
        two(fit, "fsdp2", 5, resume=str(saved), save=str(saved), deadly=True)
    assert failed.value.outcomes[1].returncode == -signal.SIGKILL
    assert "step      3" in describe(saved)
    assert newest_checkpoint([(tmp_path, "*.ckpt")], module_of())[0] == saved
    found, _ = two(fit, "fsdp2", STEPS, resume=str(saved))
    assert_same(found, unmoved)


def test_another_stack_is_refused_with_its_blocks(two: Ranks, folder: Path, tmp_path: Path) -> None:
    file = consolidate(folder, tmp_path / "whole.ckpt")
    for found in two(fit, "fsdp2", STEPS, resume=str(file), stack="adamw"):
        assert "CheckpointError" in found["error"]
        assert "'model.model.embed_tokens.weight': rule is 'row_norm' there and 'adamw' here" in found["error"]
