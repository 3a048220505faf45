"""`lit-symopt checkpoint`, and `--ckpt_path` with folders. The oracle of a resume is the run that was not moved."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lit_symopt.cli import main
from tests.checkpoint.runs import trained_and_saved
from tests.cli.conftest import command, prepare


def test_it_writes_one_file_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = trained_and_saved("one", str(tmp_path / "a.ckpt"))
    assert main(["checkpoint", "consolidate", str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path}/b.ckpt\n"
    weights = torch.load(tmp_path / "b.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(weights[name], weight) for name, weight in held["weights"].items())
    assert main(["checkpoint", "info", str(tmp_path / "b.ckpt")]) == 0
    assert re.search(r"b\.ckpt is whole\n  saved as +one ordinary file\n  step +3\n", capsys.readouterr().out)


def test_what_is_wrong_is_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained_and_saved("one", str(tmp_path / "a.ckpt"))
    arguments = ["checkpoint", "consolidate", str(tmp_path / "a.ckpt"), str(tmp_path / "a.ckpt")]
    assert main(arguments) == 2
    assert "a.ckpt exists (--force replaces it)" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert main(["checkpoint", "info", str(tmp_path / "none")]) == 2
    assert "none is missing" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.deepspeed
def test_a_recipe_moves_from_zero_2_to_one_device_by_the_command_line(tmp_path: Path) -> None:
    folder = prepare(tmp_path)
    sharded = [
        *("--trainer.strategy", "lit_symopt.strategies.CPUDeepSpeedStrategy", "--trainer.strategy.stage", "2"),
        *("--trainer.devices", "2", "--data.init_args.batch_size", "2", "--model.init_args.attention_dropout", "0"),
    ]
    plain = ["--model.init_args.attention_dropout", "0"]

    def fit(*options: str) -> str:
        done = command("fit", "--config", "tiny.yaml", *options, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    fit(*sharded, "--trainer.max_steps", "10")
    saved = "runs/tiny/version_0/checkpoints/last.ckpt"
    assert (folder / saved).is_dir()
    said = fit(*sharded, "--ckpt_path", "last", "--trainer.max_steps", "15")
    assert f"continuing from {saved}" in said
    refused = command("fit", "--config", "tiny.yaml", *plain, "--ckpt_path", saved, cwd=folder)
    assert refused.returncode == 2
    assert "was saved by DeepSpeed ZeRO 2 on 2 rank(s), and this run is SingleDeviceStrategy" in refused.stderr
    assert refused.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in refused.stderr

    moved = command("checkpoint", "consolidate", saved, "whole.ckpt", cwd=folder)
    assert moved.returncode == 0, moved.stderr
    said = fit(*plain, "--ckpt_path", "whole.ckpt", "--trainer.max_steps", "15")
    assert "Finished at step 15." in said
    ends = [folder / f"runs/tiny/version_{version}/checkpoints/step=15.ckpt" for version in (1, 2)]
    assert ends[0].is_dir()
    assert ends[1].is_file()
