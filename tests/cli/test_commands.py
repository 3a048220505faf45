"""The command line on wrong and on small input: messages, exit codes, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_symopt import __version__
from lit_symopt.cli import main
from tests.cli.conftest import command

# LightningCLI in this process: what it and its parts warn about on every start is not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`seed_everything` writes to the environment."""
    with monkeypatch.context() as patch:
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")
        yield


def test_help_names_the_commands_and_imports_neither_lightning_nor_transformers() -> None:
    code = (
        "import sys; from lit_symopt.cli import main; assert main(['--help']) == 0;"
        "assert not {'lightning', 'transformers', 'tensorboard'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("fit", "validate", "test", "data", "export", "--ckpt_path last", "--model.symopt.stack adamw"):
        assert name in done.stdout


def test_no_argument_is_a_request_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: lit-symopt")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lit-symopt {__version__}\n"


def test_an_unknown_command_is_an_error_that_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    said = capsys.readouterr().err
    assert "no command 'train'; the commands are fit, validate, test, export, checkpoint, data" in said


WRONG: list[tuple[list[str], str]] = [
    (["--model.symopt.stack", "lion"], "'symmetric', 'muon', 'polargrad', 'ssd', 'scion', 'adamw'"),
    (["--model.symopt.roles.routers.lr", "1"], "unknown role(s) 'routers' in roles; known: embedding, lm_head"),
    (["--model.symopt.roles.embedding.rule", "newton"], "rule 'newton' is not known; choose one of spectral"),
    (["--model.symopt.roles.embedding.scale", "big"], "unknown scale 'big'; known: none, spectral"),
    (["--model.symopt.lr", "-1"], "lr=-1"),
    (["--model.symopt.roles.embedding.momentum", "1.5"], "momentum"),
    (["--model.symopt.roles.router.lr", "0.1"], "no block has this role; the roles here are embedding"),
    (["--model.symopt.schedule.total_steps", "1"], "total_steps greater than warmup_steps=2, not 1"),
    (["--model.num_key_value_heads", "3"], "num_key_value_heads=3 does not divide num_attention_heads=4"),
    (["--model.pretrained", "Qwen/Qwen3-0.6B"], "nothing is downloaded"),
    (["--model.vocab_size", "32"], "give the model vocab_size=64 or more"),
    (["--model.hidden_size", "many"], "Expected a <class 'int'>"),
    (["--model.hiden_size", "32"], "hiden_size"),
    (["--model.vocab_size", "${data.init_args.vocabulary}"], "cannot be resolved"),
    (["--data.train", "none.bin"], "none.bin"),
    (["--data.batch_size", "1000"], "1000 are needed for one batch"),
    (["--trainer.accelerator", "cuda"], "CUDA"),
    (["--ckpt_path", "last"], "looked for runs/tiny/*/checkpoints/*.ckpt"),
    (["--ckpt_path", "none.ckpt"], "there is no checkpoint none.ckpt"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[" ".join(options) for options, _ in WRONG])
def test_wrong_input_is_one_clear_error_and_leaves_nothing(
    workplace: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    if options[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has what the test says it lacks")
    before = sorted(path.name for path in workplace.iterdir())
    try:
        code = main(["fit", "--config", "tiny.yaml", *options])
    except SystemExit as exit_:  # from parsing
        code = int(exit_.code or 0)
    said = capfd.readouterr().err
    assert code == 2
    assert "error: " in said
    assert message in said
    assert "Traceback" not in said
    assert sorted(path.name for path in workplace.iterdir()) == before


def test_a_checkpoint_of_another_architecture_or_stack_is_refused_before_anything_is_written(
    workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from lit_symopt.config import SymOptConfig
    from lit_symopt.models import Qwen3

    architecture: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    others = {
        "wide.ckpt": (Qwen3(**{**architecture, "hidden_size": 64}), "hidden_size is 64 there and 32 here"),
        "muon.ckpt": (Qwen3(**architecture, symopt=SymOptConfig(stack="muon")), "made with the stack 'muon'"),
    }
    for name, (model, message) in others.items():
        checkpoint: dict[str, Any] = {"state_dict": model.state_dict(), "global_step": 1, "loops": {}}
        model.on_save_checkpoint(checkpoint)
        torch.save(checkpoint, name)
        assert main(["fit", "--config", "tiny.yaml", "--ckpt_path", name]) == 2
        assert message in capfd.readouterr().err
    assert not (workplace / "runs").exists()


def test_an_override_reaches_every_value_interpolated_from_it(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data.vocab_size", "128", "--model.symopt.roles.lm_head.lr", "0.5", "--print_config"]
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", "tiny.yaml", *options])
    assert exit_.value.code in (0, None)
    printed = capsys.readouterr().out
    assert printed.count("vocab_size: 128") == 2
    assert "lr: 0.5" in printed


def test_overrides_of_several_roles_add_up_with_each_other_and_with_the_recipe(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "roles.yaml").write_text("model: {init_args: {symopt: {roles: {up: {lr: 0.125}}}}}\n")
    one, other = (["--model.symopt.roles.embedding.lr", "0.25"], ["--model.symopt.roles.lm_head.lr_multiplier=3.5"])
    for recipe in ([], ["--config", "roles.yaml"]):
        with pytest.raises(SystemExit):
            main(["fit", "--config", "tiny.yaml", *recipe, *one, *other, "--print_config"])
        printed = capsys.readouterr().out
        assert "lr: 0.25" in printed
        assert "lr_multiplier: 3.5" in printed
        assert ("lr: 0.125" in printed) == bool(recipe)


def test_the_process_exits_with_the_code_and_no_traceback(workplace: Path) -> None:
    done = command("fit", "--config", "tiny.yaml", "--model.num_key_value_heads", "3", cwd=workplace)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: num_key_value_heads=3")
    assert "Traceback" not in done.stderr


def test_data_commands_convert_text_and_describe_a_shard(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "text.txt").write_text("to be or not to be\n" * 200)
    assert main(["data", "convert", '["text.txt"]', "shards", "--vocab_size", "257"]) == 0
    assert main(["data", "info", "shards/train_000000.bin"]) == 0
    assert "bytes per token 2" in capsys.readouterr().out


def test_data_commands_refuse_a_file_that_is_no_shard(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "bad.bin").write_bytes(b"\0" * 2000)
    assert main(["data", "info", "bad.bin"]) == 2
    assert "error: " in capsys.readouterr().err


def test_export_writes_a_folder_for_transformers(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lit_symopt.models import Qwen3

    model = Qwen3(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict(), "global_step": 1, "loops": {}}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, "a.ckpt")
    assert main(["export", "a.ckpt", "weights"]) == 0
    assert capsys.readouterr().out.endswith("wrote weights\n")
    assert torch.equal(Qwen3(pretrained="weights").model.lm_head.weight, model.model.lm_head.weight)
    assert main(["export", "none.ckpt", "other"]) == 2
