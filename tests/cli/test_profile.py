"""`lit-symopt profile` from the command line: what a run writes, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from signal import SIGINT, SIGTERM
from time import monotonic, sleep

import pytest

from lit_symopt.cli import main
from lit_symopt.profiling.compare import compare
from lit_symopt.profiling.costs import STAGES
from lit_symopt.profiling.record import Record
from tests.cli.conftest import command, prepare

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SPEC = "skip_first: 0\nwait: 0\nwarmup: 1\nactive: 2\nrepeat: 2\nrounds: 1\nthreads: 1\n"
OVERLAY = """\
trainer:
  callbacks+:
    - class_path: lit_symopt.callbacks.RunReport
model:
  init_args:
    symopt:
      roles:
        down: {rule: row_norm}
"""
DEMO = """\
trainer: {accelerator: cpu, max_epochs: 1}
model: {class_path: lightning.pytorch.demos.boring_classes.BoringModel}
data: {class_path: lightning.pytorch.demos.boring_classes.BoringDataModule}
"""
# The model of the recipe, in a process in which one rule takes three times as long.
SLOWED = """\
from dataclasses import replace
from time import perf_counter

from lit_symopt.models import Qwen3
from lit_symopt.rules import registry

rule = registry.RULES["spectral"]


def slow(*args, **kwargs):
    began = perf_counter()
    update = rule.function(*args, **kwargs)
    until = perf_counter() + 2 * (perf_counter() - began)
    while perf_counter() < until:
        pass
    return update


registry.RULES["spectral"] = replace(rule, function=slow)


class Slowed(Qwen3):
    pass
"""


# Tests that a shell has started in the background ignore Ctrl-C, and would hand that down.
HEARING = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which a recipe with an overlay was profiled against another stack, and what that printed."""
    folder = prepare(tmp_path_factory.mktemp("profiled"))
    (folder / "spec.yaml").write_text(SPEC)
    (folder / "overlay.yaml").write_text(OVERLAY)
    options = ["--config", "tiny.yaml", "--config", "overlay.yaml", "--spec", "spec.yaml", "--against", "adamw"]
    done = command("profile", *options, "--output", "record", "--data.batch_size=2", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_folder_of_a_record_has_everything_and_nothing_is_left_elsewhere(profiled: tuple[Path, str]) -> None:
    folder, _ = profiled
    given = {"tiny.yaml", "overlay.yaml", "spec.yaml", "train.bin", "val.bin", "killer.py"}
    assert {path.name for path in folder.iterdir()} - given == {"record"}
    found = {path.name for path in (folder / "record").iterdir()}
    pictures = {f"{stack}-{what}.png" for stack in ("symmetric", "adamw") for what in ("costs", "timeline", "memory")}
    assert found >= {"README.md", "summary.json", "kernels.csv", "traces", "stacks.png", *pictures}
    for stack in ("symmetric", "adamw"):
        assert len(list((folder / "record" / "traces" / stack).glob("rank0.*.pt.trace.json"))) == 1


def test_the_summary_says_what_was_measured_and_on_what(profiled: tuple[Path, str]) -> None:
    record = Record.load(profiled[0] / "record")
    assert record.own == "symmetric"
    assert list(record.stacks) == ["symmetric", "adamw"]
    assert record.command.startswith("lit-symopt profile --config tiny.yaml --config overlay.yaml --spec spec.yaml")
    assert record.recipe["name"] == "tiny"
    assert record.recipe["essentials"]["data.init_args.batch_size"] == 2
    assert record.device["type"] == "cpu"
    assert record.device["threads"] == 1
    assert record.world == 1
    assert record.spec["active"] == 2
    for stack in record.stacks.values():
        assert set(stack.stages) == set(STAGES)
        for samples in (*stack.blocks.values(), *stack.stages.values(), stack.wall, stack.update):
            assert [[len(window) for window in round_] for round_ in samples] == [[2, 2]]
        assert stack.attributed_share > 0.5
        assert stack.memory[0]["parameters"] > 0
        assert stack.ceilings is not None
        assert {point["role"] for point in stack.roofline} >= {"query", "down", "embedding"}
        assert all(point["share"] > 0 for point in stack.roofline)


def test_the_roles_of_a_recipe_are_its_own_and_not_those_of_the_stack_it_is_held_against(
    profiled: tuple[Path, str],
) -> None:
    stacks = Record.load(profiled[0] / "record").stacks
    assert {"down/row_norm", "query/spectral"} <= set(stacks["symmetric"].blocks)
    assert {"down/adamw", "query/adamw"} <= set(stacks["adamw"].blocks)


def test_every_kernel_is_in_the_table_of_kernels(profiled: tuple[Path, str]) -> None:
    with (profiled[0] / "record" / "kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["stack"] for row in rows} == {"symmetric", "adamw"}
    assert any(row["stack"] == "symmetric" and row["role"] == "query" and "eigh" in row["kernel"] for row in rows)
    update = sum(float(row["ms"]) for row in rows if row["stack"] == "adamw" and row["role"])
    assert update > 0


def test_the_page_and_the_terminal_say_what_a_step_costs_and_compare_the_stacks(profiled: tuple[Path, str]) -> None:
    folder, said = profiled
    page = (folder / "record" / "README.md").read_text()
    assert page.startswith("# What each update costs: tiny\n")
    for words in ("The update of `symmetric` takes", "- command: `lit-symopt profile", "- commit: ", "- device: "):
        assert words in page
    for picture in (folder / "record").glob("*.png"):
        assert f"]({picture.name})" in page
    assert "[1/2] the recipe's own stack, round 1 of 1 ..." in said
    assert "[2/2] adamw, round 1 of 1 ..." in said
    assert "query" in said
    assert "against own" in said
    assert said.rstrip().endswith("wrote record")


def test_a_record_compared_with_itself_shows_no_regression(
    profiled: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    record = str(profiled[0] / "record")
    assert main(["profile-compare", record, record]) == 0
    assert "no regression" in capsys.readouterr().out


def test_a_doctored_record_is_flagged(profiled: tuple[Path, str], tmp_path: Path) -> None:
    path = profiled[0] / "record" / "summary.json"
    value = json.loads(path.read_text())
    # Two windows on a busy machine may be noisier than 20 %: here the noise is taken out.
    for stack in value["stacks"].values():
        for samples in (*stack["blocks"].values(), *stack["stages"].values()):
            for round_ in samples:
                round_[:] = [[sorted(round_[0])[0]] * len(window) for window in round_]
    for name, factor in (("a", 1.0), ("b", 1.2)):
        blocks = value["stacks"]["symmetric"]["blocks"]
        blocks["query/spectral"] = [[[factor * us for us in window] for window in r] for r in blocks["query/spectral"]]
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(value))
    assert main(["profile-compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1


@pytest.mark.slow
def test_a_rule_made_slower_is_flagged_and_the_same_code_measured_twice_is_not(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "spec.yaml").write_text("skip_first: 2\nactive: 6\nrepeat: 3\nrounds: 3\nthreads: 1\n")
    (workplace / "slowed.py").write_text(SLOWED)
    recipe = (workplace / "tiny.yaml").read_text().replace("max_steps: 20", "max_steps: 30")
    (workplace / "tiny.yaml").write_text(recipe)
    (workplace / "slowed.yaml").write_text(recipe.replace("lit_symopt.models.Qwen3", "slowed.Slowed"))
    for file, name in (("tiny", "one"), ("tiny", "two"), ("slowed", "three")):
        options = ["--config", f"{file}.yaml", "--spec", "spec.yaml", "--output", name]
        done = command("profile", *options, cwd=workplace)
        assert done.returncode == 0, done.stderr
    assert main(["profile-compare", "one", "two"]) == 0, capsys.readouterr().out
    assert main(["profile-compare", "one", "three", "--anyway"]) == 1
    flagged = compare(Record.load("one"), Record.load("three"), anyway=True).regressions
    names = {change.name for change in flagged}
    assert names >= {"query/spectral", "down/spectral"}
    assert not names & {"embedding/row_norm", "lm_head/row_norm", "vector/adamw"}
    assert main(["profile-compare", "three", "one", "--anyway"]) == 0


@pytest.mark.slow
def test_two_processes_are_profiled_both_and_their_times_are_means(workplace: Path) -> None:
    (workplace / "spec.yaml").write_text(SPEC + "ranks: all\n")
    options = ["--config", "tiny.yaml", "--spec", "spec.yaml", "--output", "record"]
    trainer = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = command("profile", *options, *trainer, cwd=workplace)
    assert done.returncode == 0, done.stderr
    record = Record.load(workplace / "record")
    assert record.world == 2
    assert [use["rank"] for use in record.stacks["symmetric"].memory] == [0, 1]
    names = sorted(path.name.split(".")[0] for path in (workplace / "record" / "traces" / "symmetric").iterdir())
    assert names == ["rank0", "rank1"]


# -- wrong input -------------------------------------------------------------------------------------------------


@pytest.fixture
def place(workplace: Path) -> Path:
    (workplace / "spec.yaml").write_text(SPEC)
    (workplace / "typo.yaml").write_text("activ: 3\n")
    (workplace / "long.yaml").write_text("repeat: 100\n")
    (workplace / "full").mkdir()
    (workplace / "full" / "thesis.txt").write_text("do not delete")
    (workplace / "record").mkdir()
    (workplace / "record" / "summary.json").write_text("{}")
    return workplace


WRONG: list[tuple[list[str], str]] = [
    (["--against", "lion"], "unknown stack 'lion'; known: symmetric, muon"),
    (["--spec", "none.yaml"], "the spec none.yaml cannot be read"),
    (["--spec", "typo.yaml"], "typo.yaml has unknown key(s) activ; known: skip_first, wait"),
    (["--spec", "long.yaml"], "trainer.max_steps=20 is less than the 805 optimizer steps that the spec needs"),
    (["--rounds", "0"], "rounds=0"),
    (["--output", "full"], "full is not empty, and no record"),
    (["--output", "record"], "record holds a record; give --output another folder, or --overwrite"),
    (["--output", "spec.yaml"], "spec.yaml is a file"),
    (["--output", "spec.yaml/record"], "cannot be written"),
    (["--trainer.fast_dev_run", "true"], "fast_dev_run writes nothing"),
    (["--trainer.num_nodes", "2"], "runs are started on this machine alone"),
    (["--model.symopt.stack", "lion"], "'symmetric', 'muon'"),
    (["--model.hiden_size", "32"], "hiden_size"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[" ".join(options) for options, _ in WRONG])
def test_wrong_input_is_one_clear_error_before_anything_is_run(
    place: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    before = sorted(str(path) for path in place.rglob("*"))
    spec = [] if "--spec" in options else ["--spec", "spec.yaml"]
    try:
        code = main(["profile", "--config", "tiny.yaml", *spec, *options])
    except SystemExit as exit_:  # from parsing
        code = int(exit_.code or 0)
    said = capfd.readouterr()
    assert code == 2
    assert "error: " in said.err
    assert message in said.err
    assert "Traceback" not in said.err
    assert "[1/" not in said.out
    assert sorted(str(path) for path in place.rglob("*") if path.name != "__pycache__") == before


def test_another_stack_is_refused_for_a_model_that_takes_none(
    workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (workplace / "demo.yaml").write_text(DEMO)
    (workplace / "spec.yaml").write_text(SPEC)
    assert main(["profile", "--config", "demo.yaml", "--spec", "spec.yaml", "--against", "muon"]) == 2
    assert "BoringModel has no argument symopt, by which another stack could be set" in capfd.readouterr().err


def test_a_run_that_fails_is_told_with_its_own_error_and_leaves_nothing(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in place.iterdir())
    options = ["--config", "tiny.yaml", "--spec", "spec.yaml", "--data.train", "none.bin", "--output", "new"]
    assert main(["profile", *options]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert "none.bin" in said
    assert "Traceback" not in said
    assert sorted(path.name for path in place.iterdir()) == before


@pytest.mark.parametrize(("number", "code"), [(SIGTERM, 143), (SIGINT, 130)])
def test_what_ends_a_profile_ends_its_run_and_leaves_nothing(place: Path, number: int, code: int) -> None:
    scratch = place / "scratch"
    scratch.mkdir()
    options = ["--config", "tiny.yaml", "--spec", "spec.yaml", "--output", "new"]
    profile = subprocess.Popen(
        [sys.executable, "-c", HEARING, sys.executable, "-m", "lit_symopt", "profile", *options],
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = monotonic() + 60
    while not (logs := list(scratch.glob("*/*.log"))) and monotonic() < deadline:
        sleep(0.05)
    assert logs
    sleep(0.5)  # the run has begun
    profile.send_signal(number)
    _, said = profile.communicate(timeout=30)  # ends when nobody has the pipe any more
    assert profile.returncode == code
    assert "Traceback" not in said
    assert ("interrupted; no record was written" in said) == (number == SIGINT)
    assert not list(scratch.iterdir())
    assert not (place / "new").exists()


def test_an_optimizer_of_torch_is_profiled_as_a_whole(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (workplace / "demo.yaml").write_text(DEMO)
    (workplace / "spec.yaml").write_text(SPEC)
    assert main(["profile", "--config", "demo.yaml", "--spec", "spec.yaml", "--output", "record"]) == 0
    record = Record.load("record")
    assert record.own == "SGD"
    assert list(record.stacks["SGD"].blocks) == ["(all)/SGD"]
    assert min(min(min(round_) for round_ in samples) for samples in record.stacks["SGD"].stages["optimizer"]) > 0
    assert main(["profile-compare", "record", "record"]) == 0
    capfd.readouterr()


def test_help_is_light_and_names_the_options() -> None:
    code = (
        "import sys; from lit_symopt.cli import main\n"
        "try: main(['profile', '--help'])\n"
        "except SystemExit as exit_: assert not exit_.code\n"
        "assert not {'lightning', 'transformers', 'tensorboard'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("--against", "--output", "--spec", "--rounds", "--overwrite", "--keep-traces"):
        assert name in done.stdout
