"""Every recipe under configs/ is parsed, and its model and optimizer are built on the meta device."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser
from torch.utils.data import DataLoader

from lit_symopt import SymOpt
from lit_symopt.models import LitCausalLM
from tests.cli.conftest import command
from tests.models.tiny import trainer

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
TINY = sorted(CONFIGS.glob("*_tiny.yaml"))
FAMILIES = ("qwen3", "gemma3", "olmoe", "gpt_oss")

# The runs of the paper, as the files that make them: `configs/RUNS.md` lists them by command.
RUNS = [
    tuple(re.findall(r"configs/(\S+?\.yaml)", line))
    for line in (CONFIGS / "RUNS.md").read_text().splitlines()
    if line.startswith("|") and "--config" in line
]


def parse(*recipes: Path) -> Namespace:
    """A recipe, and overlays over it, as `fit` reads it; the Trainer is not built: the machine may lack its devices."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    parser = LightningArgumentParser(parser_mode="omegaconf+", exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--seed_everything", type=bool | int)
    parser.add_lightning_class_args(L.Trainer, "trainer")
    parser.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
    return parser.parse_args([word for recipe in recipes for word in ("--config", str(recipe))])


def build(config: Namespace, *, device: str = "meta") -> LitCausalLM:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LitCausalLM, "model")
    with torch.device(device):
        built: Any = parser.instantiate(parser.parse_object({"model": config.model.as_dict()}))
    model: LitCausalLM = built.model
    return model


def groups(model: LitCausalLM) -> dict[str, dict[str, Any]]:
    """The parameter groups by role; where a role has two, what both of them say."""
    found: dict[str, dict[str, Any]] = {}
    for group in SymOpt.for_module(model, config=model.symopt).param_groups:
        known = found.setdefault(group["role"], group)
        found[group["role"]] = {key: value for key, value in known.items() if str(group.get(key)) == str(value)}
    return found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_parsed_and_its_model_and_optimizer_are_built(recipe: Path) -> None:
    config = parse(recipe)
    model = build(config)
    optimizer = SymOpt.for_module(model, config=model.symopt)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert model.symopt.schedule.total_steps == config.trainer.max_steps
    assert config.data.init_args.vocab_size == model.model.config.vocab_size


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_states_purpose_command_hardware_and_result_and_can_be_continued(recipe: Path) -> None:
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    for word in ("Purpose", "Command", "Hardware", "Result"):
        assert any(line.startswith(f"# {word}") for line in header), word
    config = parse(recipe)
    callbacks = {callback.class_path.rsplit(".")[-1] for callback in config.trainer.callbacks}
    assert {"ModelCheckpoint", "LearningRateMonitor", "ProgressBar", "RandomState", "RunReport"} <= callbacks
    assert config.trainer.logger.init_args.version is None  # every run has a folder of its own
    assert config.trainer.logger.init_args.name == recipe.stem


def test_the_quickstart_is_the_experiment_of_two_million_parameters() -> None:
    config = parse(CONFIGS / "quickstart.yaml")
    model = build(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_033_024
    assert (config.data.init_args.batch_size, config.data.init_args.sequence_length) == (8, 256)
    assert (config.trainer.max_steps, config.trainer.accelerator, config.trainer.devices) == (400, "cpu", 1)


# -- the runs of the paper ---------------------------------------------------------------------------------------


def test_the_large_recipe_has_the_published_size() -> None:
    model = build(parse(CONFIGS / "qwen3_0p6b.yaml"))
    d, vocabulary, layers = 1024, 151_936, 20
    layer = 6 * d * d + 9 * d * d + 2 * d + 2 * 128  # q, k, v, o; gate, up, down; norms; norms of q and k
    assert sum(parameter.numel() for parameter in model.parameters()) == 2 * vocabulary * d + layers * layer + d


# Sequences a GPU, batches of 8 GPUs between validations' tokens, steps, as the published commands give them.
SIZES = {
    "qwen3_0p6b": (28, 10_551_296, 30_000),
    "gemma3_1b": (18, 10_469_376, 50_000),
    "olmoe_1b_7b": (20, 10_485_760, 30_000),
    "gpt_oss_small": (8, 10_485_760, 60_000),
}


@pytest.mark.parametrize("base", SIZES)
def test_a_base_has_the_published_batch_length_and_validation(base: str) -> None:
    config, (sequences, validation_tokens, steps) = parse(CONFIGS / f"{base}.yaml"), SIZES[base]
    assert (config.data.init_args.batch_size, config.data.init_args.sequence_length) == (sequences, 1024)
    assert config.trainer.limit_val_batches * sequences * 1024 * 8 == validation_tokens
    assert (config.trainer.max_steps, config.trainer.val_check_interval) == (steps, 500)
    schedule = config.model.init_args.symopt.schedule
    assert (schedule.kind, schedule.decay_steps, schedule.final_ratio) == ("wsd", steps * 2 // 5, 0.0)


def test_every_run_of_the_paper_is_listed_and_every_overlay_is_a_run() -> None:
    assert len(RUNS) == 6 + 6 + 4 + 4 + 2 * 5
    assert len(set(RUNS)) == len(RUNS) - 3  # three runs of the routers' grid are also runs of their own
    used = {name for run in RUNS for name in run}
    overlays = {f"{family}/{path.name}" for family in FAMILIES for path in (CONFIGS / family).glob("*.yaml")}
    assert overlays | {f"{base}.yaml" for base in SIZES} == used


# From the published commands: rates of embedding, head, router, of Muon and of all else, by base and overlay.
RATES = {
    "qwen3/row_hybrid": (0.5, 5e-3, None, 2e-2, 5e-2),
    "qwen3/hybrid_hybrid": (1.0, 1e-2, None, 2e-2, 5e-2),
    "qwen3/adamw_hybrid": (0.1, 1e-3, None, 2e-2, 5e-2),
    "qwen3/row_muon": (0.5, 5e-3, None, 2e-2, 5e-2),
    "qwen3/hybrid_muon": (1.0, 1e-2, None, 2e-2, 5e-2),
    "qwen3/adamw_muon": (0.1, 1e-3, None, 2e-2, 5e-2),
    "gemma3/row_hybrid": (5e-3, 5e-3, None, 2e-2, 5e-2),
    "gemma3/hybrid_hybrid": (1e-2, 1e-2, None, 2e-2, 5e-2),
    "gemma3/adamw_hybrid": (5e-4, 5e-4, None, 2e-2, 5e-2),
    "gemma3/row_muon": (2.5e-3, 2.5e-3, None, 2e-2, 5e-2),
    "gemma3/hybrid_muon": (2.5e-3, 2.5e-3, None, 2e-2, 5e-2),
    "gemma3/adamw_muon": (5e-4, 5e-4, None, 2e-2, 5e-2),
    "olmoe/row_row": (0.5, 5e-3, 7.5e-4, 5e-3, 1e-2),
    "olmoe/row_left": (0.5, 5e-3, 7.5e-4, 5e-3, 1e-2),
    "olmoe/row_adamw": (0.5, 5e-3, 7.5e-4, 5e-3, 1e-2),
    "olmoe/adamw_adamw": (5e-4, 5e-4, 7.5e-4, 5e-3, 1e-2),
    "gpt_oss/row_row": (0.1, 1e-3, 7.5e-4, 1e-3, 5e-3),
    "gpt_oss/row_left": (0.1, 1e-3, 7.5e-4, 1e-3, 5e-3),
    "gpt_oss/row_left_uncentered": (0.1, 1e-3, 7.5e-4, 1e-3, 5e-3),
    "gpt_oss/row_hybrid": (0.1, 1e-3, 7.5e-4, 1e-3, 5e-3),
    "gpt_oss/row_adamw": (0.1, 1e-3, 7.5e-4, 1e-3, 5e-3),
    "gpt_oss/adamw_adamw": (5e-4, 5e-4, 7.5e-4, 1e-3, 5e-3),
}
# Rule, scale and momentum of what the file names call row, hybrid, left, Muon and AdamW.
RULES = {
    "row": ("row_norm", "none", "ema", 0.0),
    "hybrid": ("row_then_spectral", "row_nuclear", "ema", 0.0),
    "left": ("left_spectral", "nuclear", "ema", 0.0),
    "left_uncentered": ("left_spectral", "nuclear", "ema", 0.0),
    "muon": ("spectral", "spectral", "nesterov", 0.0),
    "adamw": ("adamw", "none", "ema", 0.0),
}
MUON_ROLES = ("query", "key", "value", "attention_out", "gate", "up", "down", "expert_gate_up", "expert_down")


def said(group: dict[str, Any]) -> tuple[str, str, str, float]:
    return group["rule"], group["scale"], group["momentum_kind"], group["row_damping"]


@pytest.mark.parametrize("run", dict.fromkeys(RUNS), ids=lambda run: "+".join(Path(name).stem for name in run))
def test_a_run_of_the_paper_is_built_with_its_rules_and_rates(run: tuple[str, ...]) -> None:
    config = parse(*(CONFIGS / name for name in run))
    model = build(config)
    overlay = run[1].removesuffix(".yaml")
    first, second = Path(overlay).name.split("_", 1)
    mixture = overlay.startswith(("olmoe", "gpt_oss"))
    auxiliary = len(run) == 3
    assert config.trainer.logger.init_args.name == f"{Path(run[0]).stem}_{Path(overlay).name}"  # folders of their own
    assert config.model.init_args.symopt.schedule.warmup_steps == 0
    assert config.model.init_args.symopt.schedule.total_steps == config.trainer.max_steps  # kept from the base
    if mixture:
        coefficients = (config.model.init_args.load_balancing_loss, config.model.init_args.router_z_loss)
        assert coefficients == ((0.01, 0.001) if auxiliary else (0.0, 0.0))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = groups(model)
    centered = second in ("row", "left", "hybrid")
    assert bool([w for w in caught if "z-loss penalizes the shift" in str(w.message)]) == (auxiliary and centered)

    embedding, head, router, muon, other = RATES[overlay]
    assert (found["embedding"]["lr"], found["lm_head"]["lr"], found["vector"]["lr"]) == (embedding, head, other)
    assert said(found["embedding"]) == said(found["lm_head"]) == RULES[first]
    assert (found["embedding"]["centered"], found["lm_head"]["centered"]) == (False, first != "adamw")
    if mixture:
        assert (said(found["router"]), found["router"]["lr"]) == (RULES[second], router)
        assert found["router"]["centered"] == centered
    for role in MUON_ROLES:
        if role in found:
            hybrid = second == "hybrid" and role in ("gate", "up", "down")
            rule, scale, *rest = RULES["hybrid" if hybrid else "muon"]
            scale = "none" if overlay.startswith("olmoe") and role == "expert_down" else scale
            assert (said(found[role]), found[role]["lr"]) == ((rule, scale, *rest), muon)
    for role in MUON_ROLES[:4]:
        assert str(found[role]["layout"]).startswith("heads("), role
    assert {group["momentum"] for group in found.values() if group["rule"] != "adamw"} == {0.95}
    assert {group["betas"] for group in found.values()} == {(0.9, 0.95)}
    decayed = {role for role, group in found.items() if group["weight_decay"] == 0.001}
    assert decayed == set(found) - {"embedding", "lm_head", "router"}


OVERLAYS = [path for family in FAMILIES for path in sorted((CONFIGS / family).glob("*.yaml"))]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_an_overlay_states_purpose_command_source_and_result(overlay: Path) -> None:
    header = [line for line in overlay.read_text().splitlines() if line.startswith("#")]
    for word in ("Purpose", "Command", "Source", "Differs", "Result"):
        assert any(line.startswith(f"# {word}") for line in header), word
    assert f"--config configs/{overlay.parent.name}/{overlay.name}" in " ".join(header)


# -- the tiny ones -----------------------------------------------------------------------------------------------


def test_there_is_one_tiny_recipe_a_family_and_nothing_else_is_called_so() -> None:
    assert sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*tiny*")) == sorted(
        f"{family}_tiny.yaml" for family in FAMILIES
    )


@pytest.mark.parametrize("stack", ["symmetric", "muon", "adamw"])
@pytest.mark.parametrize("recipe", TINY, ids=lambda recipe: recipe.stem)
def test_a_tiny_recipe_learns_a_batch_with_each_stack(recipe: Path, stack: str, tmp_path: Path) -> None:
    config = parse(recipe)
    config.model.init_args.symopt.stack = stack
    torch.manual_seed(config.seed_everything)
    model = build(config, device="cpu")
    batch = torch.randint(4096, (2, config.data.init_args.sequence_length))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss = model.loss(batch).item()
    loader: DataLoader[Any] = DataLoader([{"input_ids": row} for row in batch], batch_size=2)  # type: ignore[arg-type]
    trainer(tmp_path, max_steps=4, max_epochs=-1).fit(model, loader, loader)
    assert model.loss(batch).item() < loss
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TINY, ids=lambda recipe: recipe.stem)
def test_a_tiny_recipe_runs_from_the_command_line(recipe: Path, tmp_path: Path) -> None:
    short = ["--trainer.max_steps", "40", "--trainer.val_check_interval", "40", "--trainer.limit_val_batches", "4"]
    done = command("fit", "--config", str(recipe), *short, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = re.search(r"validation loss\s+([\d.]+) at step 0, ([\d.]+) at step 40", done.stdout)
    assert said is not None
    assert float(said[2]) < float(said[1]) - 1.0
