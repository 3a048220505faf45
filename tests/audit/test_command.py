"""`lit-symopt audit` as a user runs it: what it prints, how it ends, and that it writes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lit_symopt.audit.command import first_samples
from lit_symopt.cli import main
from lit_symopt.models import Qwen3
from tests.cli.conftest import command, prepare

# LightningCLI in this process: what it and its parts warn about on every start is not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The tiny recipe in the current folder; `seed_everything` may write to the environment."""
    prepare(tmp_path)
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")
        yield tmp_path


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_recipe_passes_prints_the_block_table_and_the_report_and_writes_nothing(tmp_path: Path) -> None:
    before = files(prepare(tmp_path))
    done = command("audit", "--config", "tiny.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "model.model.embed_tokens.weight" in done.stdout
    table, updates = done.stdout.index("Change of the loss"), done.stdout.index("Updates, distance from commuting")
    assert done.stdout.index("parameter") < table < updates
    assert done.stdout.rstrip().endswith("passed")
    assert files(tmp_path) == before


def test_a_stack_whose_updates_do_not_commute_ends_with_1_and_names_the_blocks(tmp_path: Path) -> None:
    prepare(tmp_path)
    done = command("audit", "--config", "tiny.yaml", "--model.symopt.stack", "muon", cwd=tmp_path)
    assert done.returncode == 1, done.stderr + done.stdout
    failed = [line for line in done.stdout.splitlines() if "FAIL" in line]
    assert [line.split()[0] for line in failed] == [
        "model.model.embed_tokens.weight",
        "model.lm_head.weight",
        "FAILED:",
    ]


def test_with_loss_only_such_a_stack_passes(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--config", "tiny.yaml", "--model.symopt.stack", "adamw", "--loss-only"]) == 0
    assert "Updates" not in capsys.readouterr().out


def write_trained(path: Path) -> None:
    """A checkpoint of the recipe's model as after training: its gains differ, which rotations do not survive."""
    torch.manual_seed(0)
    model = Qwen3(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=16,
        attention_dropout=0.2,
    )
    with torch.no_grad():
        model.model.model.norm.weight[0] = 2.0
    checkpoint = {"state_dict": model.state_dict(), "global_step": 1, "loops": {}}
    model.on_save_checkpoint(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)


def test_the_weights_of_a_checkpoint_are_audited(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trained(recipe / "trained.ckpt")
    assert main(["audit", "--config", "tiny.yaml", "--loss-only", "--ckpt_path", "trained.ckpt"]) == 0
    said = capsys.readouterr().out
    assert "using trained.ckpt" in said
    assert "the gains of 'model.model.norm.weight' are not constant" in said


def test_the_newest_checkpoint_of_the_recipes_runs_is_found(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older, newer = (recipe / "runs" / "tiny" / f"version_{n}" / "checkpoints" / "last.ckpt" for n in (1, 0))
    for path, written in ((newer, 2_000_000_000), (older, 1_000_000_000)):
        write_trained(path)
        os.utime(path, (written, written))
    before = files(recipe)
    assert main(["audit", "--config", "tiny.yaml", "--loss-only", "--ckpt_path", "last"]) == 0
    said = capsys.readouterr().out
    assert "using runs/tiny/version_0/checkpoints/last.ckpt" in said
    assert "the gains of 'model.model.norm.weight' are not constant" in said
    assert files(recipe) == before


def test_without_a_run_it_says_where_it_looked(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--config", "tiny.yaml", "--loss-only", "--ckpt_path", "last"]) == 2
    assert "looked for runs/tiny/*/checkpoints/*.ckpt" in capsys.readouterr().err


WRONG: list[tuple[list[str], str]] = [
    (["--model.symopt.roles.tied_embedding.centered", "true", "--model.tie_word_embeddings", "true"], "sees the shift"),
    (["--ckpt_path", "none.ckpt"], "there is no checkpoint none.ckpt"),
    (["--model.symopt.stack", "lion"], "'symmetric', 'muon'"),
    (["--model.num_key_value_heads", "3"], "num_key_value_heads=3 does not divide"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[options[0] for options, _ in WRONG])
def test_wrong_input_ends_with_2_and_one_error(
    recipe: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    before = files(recipe)
    try:
        code = main(["audit", "--config", "tiny.yaml", *options])
    except SystemExit as exit_:  # from parsing
        code = int(exit_.code or 0)
    said = capfd.readouterr().err
    assert code == 2
    assert message in said
    assert "Traceback" not in said
    assert files(recipe) == before


def test_a_few_samples_of_a_batch_are_enough() -> None:
    batch = {"ids": torch.zeros(8, 256), "labels": [torch.zeros(8)], "scale": torch.ones(()), "name": "x"}
    cut = first_samples(batch)
    assert cut["ids"].shape == (2, 256)
    assert cut["labels"][0].shape == (2,)
    assert (cut["scale"], cut["name"]) == (torch.ones(()), "x")
    assert first_samples(torch.zeros(3, 4000)).shape == (1, 4000)
