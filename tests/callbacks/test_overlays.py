"""The overlays of configs/callbacks: they append to a recipe's callbacks, by the command in their headers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import RECIPE, command, prepare, scalars

ROOT = Path(__file__).parents[2]
OVERLAYS = {
    "load_imbalance": "LoadImbalance",
    "router_stability": "RouterStability",
    "logit_norms": "LogitNorms",
}
OTHERS = {"kernel_time", "monitors"}
MODEL = """\
model:
  class_path: lit_symopt.models.OLMoE
  init_args:
    vocab_size: 64
    hidden_size: 16
    intermediate_size: 8
    num_hidden_layers: 2
    num_attention_heads: 2
    num_key_value_heads: 2
    num_experts: 4
    num_experts_per_tok: 2
    max_position_embeddings: 16
"""


def overlay(name: str) -> tuple[str, str]:
    return "--config", str(ROOT / "configs" / "callbacks" / f"{name}.yaml")


def test_every_overlay_is_listed_here_and_its_header_names_recipes_that_exist() -> None:
    folder = ROOT / "configs" / "callbacks"
    assert {path.stem for path in folder.glob("*.yaml")} == set(OVERLAYS) | OTHERS
    for path in folder.glob("*.yaml"):
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert [word for word in ("Purpose", "Command", "Hardware", "Result") if f"# {word}" in "\n".join(header)] == [
            "Purpose",
            "Command",
            "Hardware",
            "Result",
        ]
        for recipe in re.findall(r"--config (\S+)", "\n".join(header)):
            assert (ROOT / recipe).is_file(), recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a mixture of experts, run for four steps with all three overlays."""
    folder = prepare(tmp_path_factory.mktemp("overlays"))
    (folder / "moe.yaml").write_text(RECIPE[: RECIPE.index("model:")] + MODEL)
    # A recipe may have no callbacks of its own.
    bare = yaml.safe_load((folder / "moe.yaml").read_text())
    del bare["trainer"]["callbacks"]
    (folder / "bare.yaml").write_text(yaml.safe_dump(bare))
    return folder


def test_three_overlays_append_to_the_callbacks_of_the_recipe_in_order(run: Path) -> None:
    options = [option for name in OVERLAYS for option in overlay(name)]
    result = command("fit", "--config", "moe.yaml", *options, "--trainer.max_steps", "4", cwd=run)
    assert result.returncode == 0, result.stderr
    [version] = (run / "runs" / "tiny").iterdir()
    saved = yaml.safe_load((version / "config.yaml").read_text())["trainer"]["callbacks"]
    names = [entry["class_path"].rpartition(".")[2] for entry in saved]
    assert names[:5] == ["ModelCheckpoint", "LearningRateMonitor", "ProgressBar", "RandomState", "RunReport"]
    assert names[5:] == list(OVERLAYS.values())
    assert {path.stem for path in version.glob("*.npz")} == set(OVERLAYS)
    for name in OVERLAYS.values():
        assert f"{name}: 1 look(s) at" in result.stdout


def test_lightnings_monitors_and_a_profile_are_laid_over_a_recipe_and_run(run: Path) -> None:
    result = command(
        *("fit", "--config", "moe.yaml", *overlay("monitors"), "--trainer.callbacks.window_size", "2"),
        *(*overlay("kernel_time"), "--trainer.callbacks.wait", "2", "--trainer.max_steps", "8"),
        *("--trainer.logger.init_args.name", "profiled"),
        cwd=run,
    )
    assert result.returncode == 0, result.stderr
    [version] = (run / "runs" / "profiled").iterdir()
    tags = {tag for tag, _ in scalars(version)}
    assert {"train/device/items_per_sec", "profile/step_ms"} <= tags
    for begin in ("DeviceStatsMonitor.on_train_batch_end/", "lr-", "profile/ms/router"):
        assert any(tag.startswith(begin) for tag in tags), begin
    assert len(list((version / "traces").glob("rank0.*.pt.trace.json"))) == 1
    assert "KernelTime: symmetric, rank 0 of 1" in result.stdout


def test_an_overlay_is_the_whole_list_where_the_recipe_has_none_and_the_command_line_changes_it(run: Path) -> None:
    shown = command(
        *("fit", "--config", "bare.yaml", *overlay("load_imbalance")),
        *("--trainer.callbacks.every_n_steps", "7", "--print_config"),
        cwd=run,
    )
    assert shown.returncode == 0, shown.stderr
    [entry] = yaml.safe_load(shown.stdout)["trainer"]["callbacks"]
    assert entry["class_path"] == "lit_symopt.callbacks.LoadImbalance"
    assert entry["init_args"] == {"every_n_steps": 7, "top_k": None, "folder": None}


def test_a_callback_that_the_recipe_has_already_is_refused_by_name(run: Path) -> None:
    options = (*overlay("logit_norms"), *overlay("logit_norms"))
    result = command("fit", "--config", "moe.yaml", *options, cwd=run)
    assert result.returncode == 2
    assert "error: trainer.callbacks lists lit_symopt.callbacks.LogitNorms 2 times" in result.stderr
    assert "Traceback" not in result.stderr
