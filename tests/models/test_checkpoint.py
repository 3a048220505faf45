"""Which checkpoint is continued from, and which are refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lit_symopt.config import SymOptConfig
from lit_symopt.errors import CheckpointError, ConfigError
from lit_symopt.models import Qwen3
from lit_symopt.models.checkpoint import (
    SECTION,
    newest_checkpoint,
    open_checkpoint,
    refuse_another_architecture,
    refuse_another_run,
)
from lit_symopt.models.pretrained import export_checkpoint

TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
}


def contents(model: Qwen3, step: int = 1) -> dict[str, Any]:
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict(), "global_step": step, "loops": {}}
    model.on_save_checkpoint(checkpoint)
    return checkpoint


def save(path: Path, model: Qwen3, *, at: int, step: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(contents(model, step), path)
    os.utime(path, (at, at))
    return path


def test_the_newest_is_by_the_time_of_writing_not_by_step(tmp_path: Path) -> None:
    model = Qwen3(**TINY)
    save(tmp_path / "version_0/checkpoints/step=400.ckpt", model, at=1_000, step=400)
    newer = save(tmp_path / "version_1/checkpoints/step=200.ckpt", model, at=2_000, step=200)
    assert newest_checkpoint([(tmp_path, "*/checkpoints/*.ckpt")], model) == (newer, [])


def test_one_cut_short_by_a_kill_is_passed_over_and_named(tmp_path: Path) -> None:
    model = Qwen3(**TINY)
    whole = save(tmp_path / "a.ckpt", model, at=1_000)
    cut = tmp_path / "b.ckpt"
    for length in (0, 100, whole.stat().st_size // 2, whole.stat().st_size - 10):
        cut.write_bytes(whole.read_bytes()[:length])
        found, passed_over = newest_checkpoint([(tmp_path, "*.ckpt")], model)
        assert found == whole
        assert len(passed_over) == 1
        assert "b.ckpt is not a whole checkpoint" in passed_over[0]


def test_one_of_another_stack_is_passed_over_to_continue_but_good_enough_to_validate(tmp_path: Path) -> None:
    model = Qwen3(**TINY)
    own = save(tmp_path / "own.ckpt", model, at=1_000)
    other = save(tmp_path / "other.ckpt", Qwen3(**TINY, symopt=SymOptConfig(stack="adamw")), at=2_000)
    found, passed_over = newest_checkpoint([(tmp_path, "*.ckpt")], model)
    assert found == own
    assert "stack 'adamw', this run uses 'symmetric'" in passed_over[0]
    assert newest_checkpoint([(tmp_path, "*.ckpt")], model, resume=False) == (other, [])


def test_none_is_an_error_that_says_where_it_looked_and_what_it_passed_over(tmp_path: Path) -> None:
    model = Qwen3(**TINY)
    with pytest.raises(CheckpointError, match=f"looked for {tmp_path}/runs/\\*.ckpt"):
        newest_checkpoint([(tmp_path / "runs", "*.ckpt")], model)
    save(tmp_path / "a.ckpt", Qwen3(**{**TINY, "hidden_size": 32}), at=1)
    with pytest.raises(CheckpointError, match=r"passed over: .*a\.ckpt .*hidden_size is 32 there and 16 here"):
        newest_checkpoint([(tmp_path, "*.ckpt")], model)


def test_another_architecture_is_named_by_its_configuration_even_where_all_shapes_agree() -> None:
    checkpoint = contents(Qwen3(**TINY))
    refuse_another_architecture(checkpoint, Qwen3(**TINY, initializer_range=0.5, attention_dropout=0.1))
    with pytest.raises(CheckpointError, match=r"rope_parameters is .*1000000.0.* there and .*500.0.* here"):
        refuse_another_architecture(checkpoint, Qwen3(**TINY, rope_theta=500.0))
    with pytest.raises(CheckpointError, match="num_hidden_layers is 1 there and 2 here"):
        refuse_another_architecture(checkpoint, Qwen3(**{**TINY, "num_hidden_layers": 2}))


def test_a_module_that_does_not_describe_itself_is_compared_by_its_parameters() -> None:
    class Net(L.LightningModule):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(width, 2)

    checkpoint = {"state_dict": Net(3).state_dict()}
    refuse_another_architecture(checkpoint, Net(3))
    with pytest.raises(CheckpointError, match=r"layer.weight is \(2, 3\) there and \(2, 4\) here"):
        refuse_another_architecture(checkpoint, Net(4))
    with pytest.raises(CheckpointError, match=r"layer\.weight is only there"):
        refuse_another_architecture({"state_dict": {**Net(3).state_dict()}}, Qwen3(**TINY))


def test_another_stack_is_refused_by_name() -> None:
    checkpoint = contents(Qwen3(**TINY))
    with pytest.raises(CheckpointError, match="made with the stack 'symmetric', this run uses 'muon'"):
        refuse_another_run(checkpoint, Qwen3(**TINY, symopt=SymOptConfig(stack="muon")))


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        open_checkpoint(tmp_path / "none.ckpt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="is not a Trainer checkpoint: it has no state_dict, global_step, loops"):
        open_checkpoint(tmp_path / "other.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(CheckpointError, match="is not a Trainer checkpoint"):
        open_checkpoint(tmp_path / "list.ckpt")


@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_checkpoint_is_the_same_model_in_transformers(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = Qwen3(**TINY, tie_word_embeddings=tied)
    export_checkpoint(save(tmp_path / "a.ckpt", model, at=1), tmp_path / "weights")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "weights", local_files_only=True)
    input_ids = torch.arange(8)[None]
    assert torch.equal(exported(input_ids).logits, model(input_ids))
    with pytest.raises(ConfigError, match="not an empty folder"):
        export_checkpoint(tmp_path / "a.ckpt", tmp_path / "weights")


def test_a_checkpoint_that_does_not_describe_its_architecture_cannot_be_exported(tmp_path: Path) -> None:
    checkpoint = contents(Qwen3(**TINY))
    del checkpoint[SECTION]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="does not say which architecture"):
        export_checkpoint(tmp_path / "a.ckpt", tmp_path / "weights")
    assert not (tmp_path / "weights").exists()
