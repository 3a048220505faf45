"""What the strategies make of a DeepSpeed config, and of YAML."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_symopt.errors import ConfigError
from tests.sharding.processes import Ranks


@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    """A process of its own, in which DeepSpeed can be imported for the CPU."""
    with Ranks(1, group=False) as started:
        yield started


def test_without_deepspeed_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_symopt.strategies import CPUDeepSpeedStrategy, DeepSpeedStrategy

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    for strategy in (DeepSpeedStrategy, CPUDeepSpeedStrategy):
        with pytest.raises(ConfigError, match=r'pip install "lit-symopt\[deepspeed\]"'):
            strategy(stage=2)


def configs(folder: str) -> dict[str, Any]:
    """Configs of strategies made in several ways, and the errors of those that are refused."""
    from lit_symopt.strategies import CPUDeepSpeedStrategy, DeepSpeedStrategy

    given = {"zero_optimization": {"stage": 2}}
    path = Path(folder) / "zero.json"
    path.write_text(json.dumps(given))
    found: dict[str, Any] = {
        "default": DeepSpeedStrategy().config,
        "given": DeepSpeedStrategy(config=dict(given)).config,
        "file": CPUDeepSpeedStrategy(config=str(path)).config,
        "cpu": CPUDeepSpeedStrategy(stage=3, offload_optimizer=True).config,
        "own": CPUDeepSpeedStrategy(reduce_bucket_size=7).config,
    }
    refused: dict[str, dict[str, Any]] = {
        "optimizer": {"config": {**given, "optimizer": {"type": "Adam"}}},
        "untested": {"zero_allow_untested_optimizer": False},
        "forced": {"config": {**given, "zero_force_ds_cpu_optimizer": True}},
    }
    for name, options in refused.items():
        try:
            DeepSpeedStrategy(**options)
        except ConfigError as error:
            found[name] = str(error)
    return found


@pytest.mark.deepspeed
def test_what_deepspeed_asks_for_is_set_and_the_contrary_is_refused(alone: Ranks, tmp_path: Path) -> None:
    (found,) = alone(configs, str(tmp_path))
    for name in ("default", "given", "file", "cpu"):
        assert found[name]["zero_allow_untested_optimizer"] is True
        assert found[name]["zero_force_ds_cpu_optimizer"] is False
    assert found["given"]["zero_optimization"] == found["file"]["zero_optimization"] == {"stage": 2}
    assert found["default"]["zero_optimization"]["reduce_bucket_size"] == 200_000_000
    assert found["cpu"]["zero_optimization"]["reduce_bucket_size"] == 5_000_000
    assert found["own"]["zero_optimization"]["reduce_bucket_size"] == 7
    assert "an optimizer of its own, 'Adam'" in found["optimizer"]
    assert "zero_allow_untested_optimizer: false" in found["untested"]
    assert "zero_force_ds_cpu_optimizer: true" in found["forced"]


def parsed(text: str) -> dict[str, Any]:
    """What a strategy in YAML becomes."""
    from jsonargparse import ArgumentParser
    from lightning.pytorch.strategies import Strategy

    parser = ArgumentParser()
    parser.add_subclass_arguments(Strategy, "strategy")
    strategy = parser.instantiate_classes(parser.parse_string(text)).strategy
    return {"class": type(strategy).__name__, "zero": strategy.config["zero_optimization"]}


@pytest.mark.deepspeed
@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "CPUDeepSpeedStrategy"])
def test_a_recipe_names_the_strategy_and_its_arguments(alone: Ranks, name: str) -> None:
    text = f"strategy: {{class_path: lit_symopt.strategies.{name}, init_args: {{stage: 3, sub_group_size: 1000}}}}"
    (found,) = alone(parsed, text)
    assert found["class"] == name
    assert (found["zero"]["stage"], found["zero"]["sub_group_size"]) == (3, 1000)
