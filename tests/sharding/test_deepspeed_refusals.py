"""Settings and gradients that are refused: by name, and on all ranks alike, after which training can go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lit_symopt.errors import ConfigError, GradientError
from tests.sharding.processes import Ranks
from tests.sharding.zero_engines import config_of, engine_of, micro_batch

pytestmark = pytest.mark.deepspeed


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2) as started:
        yield started


# -- settings ----------------------------------------------------------------------------------------------------

# What is set on the configuration of a running engine, because some of it cannot be started on a CPU; and the words.
REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "optimizer": (lambda e: setattr(e._config, "optimizer_name", "adam"), "remove the key `optimizer`"),
    "pipeline": (lambda e: setattr(e, "pipeline_parallelism", True), "pipeline parallelism"),
    "experts": (lambda e: setattr(e, "has_moe_layers", True), "expert parallelism"),
    "tensor": (lambda e: setattr(e, "mp_world_size", 2), "tensor parallelism (model parallel size 2)"),
    "autotp": (lambda e: setattr(e._config.tensor_parallel_config, "autotp_size", 2), "autotp_size=2"),
    "sequence": (lambda e: setattr(e, "sequence_parallel_size", 2), "sequence parallelism (size 2)"),
    "hpz": (lambda e: setattr(e._config.zero_config, "zero_hpz_partition_size", 2), "zero_hpz_partition_size=2 (hpZ)"),
    "zenflow": (lambda e: setattr(e, "zenflow", True), "zenflow"),
    "qwz": (lambda e: setattr(e._config.zero_config, "zero_quantized_weights", True), "zero_quantized_weights"),
    "qgz": (lambda e: setattr(e._config.zero_config, "zero_quantized_gradients", True), "zero_quantized_gradients"),
    "masters": (
        lambda e: setattr(e._config.bfloat16_config, "bf16_master_weights_and_grads", True),
        "leaves no fp32 weights",
    ),
    "elastic": (lambda e: setattr(e._config.zero_config, "elastic_checkpoint", True), "elastic_checkpoint"),
    "universal": (lambda e: setattr(e._config, "load_universal_checkpoint", True), "load_universal"),
    "scaler": (lambda e: setattr(e, "torch_autocast_z0_gradscaler", object()), "torch_autocast"),
}


def attach_with(setting: str) -> str:
    engine, optimizer = engine_of("zero2")
    REFUSED[setting][0](engine)
    with pytest.raises(ConfigError) as caught:
        optimizer.attach(engine)
    engine.destroy()
    return str(caught.value)


@pytest.mark.parametrize("setting", REFUSED)
def test_a_setting_that_cannot_be_honored_is_refused_by_name(ranks: Ranks, setting: str) -> None:
    for message in ranks(attach_with, setting):
        assert REFUSED[setting][1] in message
        assert message.count("\n- ") == 1  # and nothing else is


def attach_anothers_engine() -> tuple[str, str, str]:
    from lit_symopt import SymOpt

    class MuonLike(SymOpt):
        pass

    messages = []
    engine, optimizer = engine_of("zero1")
    stranger = SymOpt([torch.nn.Parameter(torch.eye(2))], rule="spectral")
    with pytest.raises(ConfigError) as caught:
        stranger.attach(engine)
    messages.append(str(caught.value))
    optimizer.param_groups[0].update(param_names=["a", "b", "c", "d"], shapes=[[2, 2]] * 4)  # as if one were frozen
    with pytest.raises(ConfigError) as caught:
        optimizer.attach(engine)
    messages.append(str(caught.value))
    engine.destroy()
    engine, optimizer = engine_of("zero1", MuonLike)
    with pytest.raises(ConfigError) as caught:
        optimizer.attach(engine)
    messages.append(str(caught.value))
    engine.destroy()
    return messages[0], messages[1], messages[2]


def test_another_engine_unknown_parameters_and_a_hijacked_class_name_are_refused(ranks: Ranks) -> None:
    for another, unknown, hijacked in ranks(attach_anothers_engine):
        assert "it steps another optimizer, a SymOpt: attach the object that was given to" in another
        assert "group 'matrices': DeepSpeed keeps 3 of its 4 parameters" in unknown
        assert "'MuonLike' contains 'muon'" in hijacked


# -- gradients that are not finite -------------------------------------------------------------------------------


def train(mode: str, steps: list[str], changes: dict[str, Any], poisoned: str = "scale") -> dict[str, Any]:
    """Good and bad steps; a bad one has a NaN in the gradient of one block on the last rank only."""
    config = config_of(mode)
    for key, value in changes.items():
        section = config
        *outer, last = key.split(".")
        for name in outer:
            section = section.setdefault(name, {})
        section[last] = value
    engine, optimizer = engine_of(mode, config=config)
    optimizer.attach(engine)
    rank, errors, kept = dist.get_rank(), [], []
    parameter = dict(engine.module.named_parameters())[poisoned]
    poison, good = {"now": False}, 0
    # Between the backward pass and DeepSpeed's own hooks, where an overflow would come from.
    parameter.register_hook(lambda gradient: gradient * torch.nan if poison["now"] else gradient)
    for kind in steps:
        before = _everything(optimizer)
        poison["now"] = kind == "bad" and rank == dist.get_world_size() - 1
        try:
            for micro in range(engine.gradient_accumulation_steps()):
                engine.backward(engine(micro_batch(rank, 10 * good + micro)))
                engine.step()
        except GradientError as error:
            errors.append(str(error))
            engine.zero_grad()
        good += kind == "good"
        if kind == "bad":
            after = _everything(optimizer)
            kept.append(all(torch.equal(value, after[key]) for key, value in before.items()))
            assert len(optimizer.param_groups) == 3
    found = {"errors": errors, "kept": kept, "skipped": engine.skipped_steps, "end": _everything(optimizer)}
    engine.destroy()
    return found


def _everything(optimizer: Any) -> dict[str, Tensor]:
    """Copies of the weights and the state of all partitions."""
    step = optimizer._distributed
    return {
        f"{holding.key}.{name}": tensor.detach().clone()
        for holding in step.distribution.holdings
        for name, tensor in {"weight": holding.tensor, **optimizer.state[holding.tensor]}.items()
    }


UNCHECKED = {"bf16.check_grad_overflow": False}


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("zero1_bf16", UNCHECKED),
        ("zero1_bf16", {**UNCHECKED, "zero_optimization.stage": 2, "gradient_accumulation_steps": 2}),
        ("zero1_bf16", {**UNCHECKED, "zero_optimization.offload_optimizer": {"device": "cpu"}}),
        ("zero1_bf16", {**UNCHECKED, "wall_clock_breakdown": True}),
        ("zero2_unnormed", {}),
        ("zero2_unnormed", {"gradient_accumulation_steps": 2}),
    ],
)
@pytest.mark.parametrize("poisoned", ["scale", "mix.weight"])  # in the last group and in the first
def test_a_bad_gradient_on_one_rank_is_refused_on_all_and_training_goes_on(
    ranks: Ranks, mode: str, changes: dict[str, Any], poisoned: str
) -> None:
    with_bad = ranks(train, mode, ["good", "bad", "good"], changes, poisoned)
    without = ranks(train, mode, ["good", "good"], changes, poisoned)
    for one, oracle in zip(with_bad, without, strict=True):
        assert len(one["errors"]) == 1
        assert "No weight and no state was changed" in one["errors"][0]
        assert one["kept"] == [True]
        assert oracle["errors"] == []
        for key, value in oracle["end"].items():  # bitwise: nothing of the bad step is left in any buffer
            assert torch.equal(one["end"][key], value), key


@pytest.mark.parametrize(
    "mode", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "bf16", "zero2_accumulated", "zero3_bf16"]
)
def test_a_step_that_deepspeed_skips_changes_nothing_and_training_goes_on(ranks: Ranks, mode: str) -> None:
    with_bad = ranks(train, mode, ["good", "bad", "good"], {}, "mix.weight")
    without = ranks(train, mode, ["good", "good"], {}, "mix.weight")
    for one, oracle in zip(with_bad, without, strict=True):
        assert (one["errors"], one["kept"], one["skipped"], oracle["skipped"]) == ([], [True], 1, 0)
        for key, value in oracle["end"].items():
            assert torch.equal(one["end"][key], value), key


def attach_with_default_clipping(scale: str, clipping: float | None) -> list[str]:
    import warnings

    config = config_of("zero1")
    del config["gradient_clipping"]
    if clipping is not None:
        config["gradient_clipping"] = clipping
    engine, optimizer = engine_of("zero1", config=config)
    optimizer.param_groups[0].update(rule="spectral", scale=scale)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.attach(engine)
    engine.destroy()
    return [str(warning.message) for warning in caught if "clips gradients" in str(warning.message)]


def test_clipping_that_nobody_asked_for_is_said_where_it_changes_updates(ranks: Ranks) -> None:
    for said in ranks(attach_with_default_clipping, "nuclear", None):
        assert len(said) == 1
        assert "a norm of 1 " in said[0]
        assert "scale 'nuclear'" in said[0]
        assert "(matrices)" in said[0]
    for scale, clipping in (("nuclear", 1.0), ("nuclear", 0.0), ("none", None)):
        assert ranks(attach_with_default_clipping, scale, clipping) == [[], []]
