"""Every recipe under configs/ is parsed, and its model and optimizer are built on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from lit_symopt import SymOpt
from lit_symopt.models import LitCausalLM

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def parse(recipe: Path) -> Namespace:
    """The recipe as `fit` reads it, with the Trainer not built: the machine may lack its devices."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    parser = LightningArgumentParser(parser_mode="omegaconf+", exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--seed_everything", type=bool | int)
    parser.add_lightning_class_args(L.Trainer, "trainer")
    parser.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
    return parser.parse_args(["--config", str(recipe)])


def build(config: Namespace) -> LitCausalLM:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LitCausalLM, "model")
    with torch.device("meta"):
        built: Any = parser.instantiate(parser.parse_object({"model": config.model.as_dict()}))
    model: LitCausalLM = built.model
    return model


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


def test_the_quickstart_is_the_experiment_of_two_million_parameters() -> None:
    config = parse(RECIPES[0].with_name("quickstart.yaml"))
    model = build(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_033_024
    assert (config.data.init_args.batch_size, config.data.init_args.sequence_length) == (8, 256)
    assert (config.trainer.max_steps, config.trainer.accelerator, config.trainer.devices) == (400, "cpu", 1)


def test_the_large_recipe_has_the_published_size() -> None:
    model = build(parse(RECIPES[0].with_name("qwen3_0p6b.yaml")))
    d, vocabulary, layers = 1024, 151_936, 20
    layer = 6 * d * d + 9 * d * d + 2 * d + 2 * 128  # q, k, v, o; gate, up, down; norms; norms of q and k
    assert sum(parameter.numel() for parameter in model.parameters()) == 2 * vocabulary * d + layers * layer + d
