"""A checkpoint is whole or it is refused, and saying so names the file."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from lit_symopt.checkpoint import Folder, consolidate, describe
from lit_symopt.checkpoint.io import WholeFiles
from lit_symopt.checkpoint.storage import Foreign, Scratch, load_mapped, save_whole
from lit_symopt.checkpoint.strategy import refuse_another_strategy
from lit_symopt.errors import CheckpointError
from tests.checkpoint.runs import trained_and_saved
from tests.sharding.processes import Ranks

STRATEGIES = ["zero1", "zero2", "zero3", "bf16_optimizer", "fsdp2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of every strategy."""
    base = tmp_path_factory.mktemp("saved")
    with Ranks(2) as ranks:
        for strategy in STRATEGIES:
            ranks(trained_and_saved, strategy, str(base / strategy))
    return base


@pytest.mark.deepspeed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_file_of_a_folder_is_missed_by_name(saved: Path, tmp_path: Path, strategy: str) -> None:
    files = [path.relative_to(saved / strategy) for path in (saved / strategy).rglob("*") if path.is_file()]
    needed = [file for file in files if file.suffix != ".py"]  # DeepSpeed puts recovery scripts beside its shards
    assert len(needed) >= 4
    for file in needed:
        copy = tmp_path / file.name
        shutil.copytree(saved / strategy, copy)
        Folder.at(copy).refuse_incomplete()
        (copy / file).unlink()
        with pytest.raises(CheckpointError, match=f"{file.name} is missing") as refused:
            consolidate(copy, tmp_path / "whole.ckpt")
        assert "use an earlier one" in str(refused.value)
        assert not (tmp_path / "whole.ckpt").exists()


@pytest.mark.deepspeed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_shard_that_was_cut_short_is_named(saved: Path, tmp_path: Path, strategy: str) -> None:
    shards = [path for path in (saved / strategy).rglob("*") if path.suffix in (".pt", ".distcp")]
    assert len(shards) >= 3
    for shard in shards:
        copy = tmp_path / shard.name
        shutil.copytree(saved / strategy, copy)
        cut = copy / shard.relative_to(saved / strategy)
        cut.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
        with pytest.raises(CheckpointError, match=shard.name):
            Folder.at(copy).refuse_incomplete()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint that is known here"):
        consolidate(tmp_path, tmp_path.parent / "whole.ckpt")
    with pytest.raises(CheckpointError, match=r"none\.ckpt is missing"):
        consolidate(tmp_path / "none.ckpt", tmp_path / "whole.ckpt")


@pytest.mark.deepspeed
def test_a_target_is_replaced_only_by_force(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "whole.ckpt"
    target.write_text("something")
    with pytest.raises(CheckpointError, match=r"whole\.ckpt exists \(--force replaces it\)"):
        consolidate(saved / "zero1", target)
    assert target.read_text() == "something"
    consolidate(saved / "zero1", target, force=True)
    assert "state_dict" in torch.load(target, weights_only=True)
    with pytest.raises(CheckpointError, match="is a folder"):
        consolidate(saved / "zero1", tmp_path, force=True)


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        ("zero1", "DeepSpeed ZeRO 1, 2 rank(s)"),
        ("zero2", "DeepSpeed ZeRO 2, 2 rank(s)"),
        ("zero3", "DeepSpeed ZeRO 3, 2 rank(s)"),
        ("bf16_optimizer", "DeepSpeed ZeRO 1 (BF16_Optimizer), 2 rank(s)"),
        ("fsdp2", "FSDP2, 2 rank(s)"),
    ],
)
def test_a_folder_says_what_it_is(saved: Path, tmp_path: Path, strategy: str, says: str) -> None:
    said = describe(saved / strategy)
    assert says in said
    assert "step      3" in said
    for line in (
        "linear            spectral, lr 0.02, 1 parameter(s)",
        "down              adamw, lr 0.02, 1 parameter(s)",
    ):
        assert line in said
        assert line in describe(consolidate(saved / strategy, tmp_path / "whole.ckpt", force=True))


@pytest.mark.deepspeed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_folder_is_not_handed_to_a_strategy_that_cannot_read_it(saved: Path, strategy: str) -> None:
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, barebones=True)
    with pytest.raises(CheckpointError, match=r"on 2 rank\(s\), and this run is SingleDeviceStrategy on 1 rank\(s\)"):
        refuse_another_strategy(saved / strategy, trainer)


def test_what_a_file_holds_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return shutil.copyfile, (str(tmp_path / "a.pt"), str(tmp_path / "made"))

    torch.save({"weight": torch.ones(2), "evil": Evil()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"holds objects of shutil\.copyfile, and is not read"):
        load_mapped(tmp_path / "a.pt")
    loaded = load_mapped(tmp_path / "a.pt", foreign=True)
    assert isinstance(loaded["evil"], Foreign)
    assert torch.equal(loaded["weight"], torch.ones(2))
    assert not (tmp_path / "made").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from lit_symopt.checkpoint.storage import save_whole

class Killing:
    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)

save_whole({"weight": torch.zeros(1000), "last": Killing()}, Path(sys.argv[1]))
"""


def test_a_kill_in_the_midst_of_a_save_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    save_whole({"weight": torch.ones(1000)}, target)
    dead = subprocess.run([sys.executable, "-c", KILLED, str(target)], capture_output=True, text=True, check=False)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert torch.equal(torch.load(target)["weight"], torch.ones(1000))
    save_whole({"weight": torch.full((10,), 2.0)}, target)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]  # what the killed one left is gone


def test_a_save_that_fails_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    io = WholeFiles()
    io.save_checkpoint({"weight": torch.ones(2)}, str(tmp_path / "a/last.ckpt"))
    with pytest.raises(AttributeError, match="pickle"):
        io.save_checkpoint({"function": lambda: None}, str(tmp_path / "a/last.ckpt"))
    assert torch.equal(io.load_checkpoint(tmp_path / "a/last.ckpt")["weight"], torch.ones(2))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["last.ckpt"]


def test_scratch_tensors_are_ordinary_but_for_where_they_lie(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        tensor = scratch.empty((3, 5), dtype)
        assert tensor.dtype == dtype
        assert torch.equal(tensor, torch.zeros(3, 5, dtype=dtype))
        tensor += 1
        assert tensor.sum() == 15
    assert scratch.empty((0, 5), torch.float32).shape == (0, 5)
    assert not list(tmp_path.iterdir())
