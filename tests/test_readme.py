"""Every snippet of the README runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lit_symopt

ROOT = Path(__file__).parents[1]
SNIPPETS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in SNIPPETS if language == "python"]
COMMANDS = [
    shlex.split(line, comments=True) for language, text in SNIPPETS if language == "bash" for line in text.splitlines()
]

SHORT = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "1", "--trainer.limit_val_batches", "1"]
SHORT += ["--model.symopt.schedule.warmup_steps", "1"]


def test_the_readme_has_nothing_but_these_snippets() -> None:
    assert {language for language, _ in SNIPPETS} == {"python", "bash"}
    assert {command[0] for command in COMMANDS} == {"make", "lit-symopt", "fabric", "tensorboard"}


def run_python(index: int) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "readme"}
    exec(compile(PYTHON[index], f"README.md python snippet {index}", "exec"), namespace)
    return namespace


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_the_mixin_snippet_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = run_python(0)["Classifier"]()
    before = module.net[0].weight.detach().clone()
    batches = DataLoader(TensorDataset(torch.randn(16, 64), torch.randint(10, (16,))), batch_size=8)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    trainer.fit(module, batches)
    assert not torch.equal(module.net[0].weight, before)
    assert "net.0.weight" in capsys.readouterr().out


def test_the_plain_snippet_explains_the_head(capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = run_python(1)["optimizer"]
    assert isinstance(optimizer, lit_symopt.SymOpt)
    assert "the update is projected off it" in capsys.readouterr().out


def test_the_inference_snippet_is_proved(capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = run_python(2)["optimizer"]
    assert {"router", "expert_gate_up", "expert_down"} <= {group["role"] for group in optimizer.param_groups}
    assert capsys.readouterr().out.rstrip().endswith("passed")


@pytest.mark.parametrize("command", [c for c in COMMANDS if "audit" in c], ids=" ".join)
def test_an_audit_passes(command: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lit_symopt", *command[1:]], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-2000:]}"
    assert result.stdout.rstrip().endswith("passed")


def test_the_training_commands_run_in_their_order(tmp_path: Path) -> None:
    """With two steps and one validation batch instead of the recipe's."""
    for name in ("configs", "lit_symopt"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = [command for command in COMMANDS if {"fit", "validate"} & set(command) and not is_strategy(command)]
    commands = [command for command in commands if "configs/callbacks/kernel_time.yaml" not in command]
    assert len(commands) == 8
    for command in commands:
        run_in(tmp_path, [*command, *(three_steps(SHORT) if "last" in command else SHORT)])


@pytest.mark.deepspeed
def test_a_sharded_run_becomes_one_file_and_goes_on_under_another_strategy(tmp_path: Path) -> None:
    """The commands on strategies in their order, with two steps and then a third."""
    for name in ("configs", "lit_symopt"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = [command for command in COMMANDS if is_strategy(command)]
    assert [command[1] for command in commands] == ["fit", "checkpoint", "fit", "run"]
    for command in commands:
        steps = three_steps(SHORT) if "--ckpt_path" in command else SHORT
        run_in(tmp_path, command if "checkpoint" in command else [*command, *steps])


def test_what_updates_cost_is_in_tensorboard_after_the_command_that_says_so(tmp_path: Path) -> None:
    """With a window right at the start, and four steps."""
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

    for name in ("configs", "lit_symopt"):
        (tmp_path / name).symlink_to(ROOT / name)
    (command,) = (command for command in COMMANDS if "configs/callbacks/kernel_time.yaml" in command)
    early = ["--trainer.callbacks.wait", "0", "--trainer.callbacks.warmup", "1", "--trainer.callbacks.active", "2"]
    run_in(tmp_path, [*command, *early, *four_steps(SHORT)])
    (events,) = tmp_path.glob("runs/*/version_0/events.*")
    written = EventAccumulator(str(events), size_guidance={IMAGES: 0})
    written.Reload()
    tags = written.Tags()
    assert {f"profile/{picture}" for picture in ("cost", "timeline", "roofline", "memory")} <= set(tags["images"])
    assert {"profile/attributed_share", "profile/ms/expert_down", "profile/share/router"} <= set(tags["scalars"])
    assert "profile/table/text_summary" in tags["tensors"]
    assert len(list(tmp_path.glob("runs/*/version_0/traces/*.pt.trace.json"))) == 1


@pytest.mark.slow
def test_the_commands_on_cost_profile_and_compare(tmp_path: Path) -> None:
    """With one round of one short window."""
    for name in ("configs", "lit_symopt"):
        (tmp_path / name).symlink_to(ROOT / name)
    profile, compare = (command for command in COMMANDS if {"profile", "profile-compare"} & set(command))
    spec = tmp_path / "spec.yaml"
    spec.write_text("skip_first: 1\nwait: 0\nwarmup: 1\nactive: 2\nrepeat: 1\nrounds: 1\n")
    run_in(tmp_path, [*profile, "--spec", str(spec), "--output", "record"])
    run_in(tmp_path, [*compare[:2], "record", "record"])


@pytest.mark.slow
def test_the_command_that_times_steps_alone(tmp_path: Path) -> None:
    """On one layer, with two rounds."""
    (command,) = (command for command in COMMANDS if "bench" in command)
    run_in(tmp_path, [*command, "--layers", "1", "--rounds", "2", "--output", "timed"])


def test_the_errors_in_the_readme_are_those_of_the_record() -> None:
    made = subprocess.run(
        [sys.executable, "profiles/parity.py", "--table"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    (shown,) = re.findall(r"<!-- parity -->\n(.*?)<!-- /parity -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown.strip() == made.strip()


@pytest.mark.parametrize("study", ["learning", "batch"])
def test_the_losses_in_the_readme_are_those_of_the_record(study: str) -> None:
    made = subprocess.run(
        [sys.executable, "profiles/study_table.py", study], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    (shown,) = re.findall(rf"<!-- {study} -->\n(.*?)<!-- /{study} -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown.strip() == made.strip()
    assert "–" not in made


def is_strategy(command: list[str]) -> bool:
    return "checkpoint" in command or any("configs/strategy/" in argument for argument in command)


def three_steps(short: list[str]) -> list[str]:
    return [*short[:1], "3", *short[2:]]


def four_steps(short: list[str]) -> list[str]:
    return [*short[:1], "4", *short[2:]]


def run_in(folder: Path, command: list[str]) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(command, check=False, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "make"], ids=" ".join)
def test_a_make_target_exists(command: list[str]) -> None:
    subprocess.run([*command, "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "tensorboard" or "--help" in c], ids=" ".join)
def test_a_program_knows_its_options(command: list[str]) -> None:
    program = [sys.executable, "-m", "tensorboard.main" if command[0] == "tensorboard" else "lit_symopt"]
    options = ["--help"] if command[0] == "tensorboard" else command[1:]
    shown = subprocess.run([*program, *options], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for option in command[1:]:
        assert not option.startswith("--") or option.partition("=")[0] in shown
