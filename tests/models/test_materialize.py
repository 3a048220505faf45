"""Models that are built later, in parts, or inside `zero.Init`. Oracle: the one built at once with the same seed."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_symopt.errors import ConfigError
from lit_symopt.models import LitCausalLM
from lit_symopt.models.materialize import fill_from_rank_zero
from tests.models.tiny import SHARED, VARIANTS, tiny
from tests.sharding.processes import Ranks

SEED = 11
# Tied and untied, a dense one and mixtures, with and without buffers that no checkpoint has.
ON_RANKS = ["qwen3 tied", "gemma3", "olmoe", "gpt_oss"]


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    with Ranks(3) as ranks:
        yield ranks


def seeded(variant: str, **changes: Any) -> LitCausalLM:
    kind, own = VARIANTS[variant]
    torch.manual_seed(SEED)
    return kind(**{**SHARED, **own, **changes})


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter under all of its names, and every buffer."""
    found = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: whole(tensor.detach()) for name, tensor in found.items()}


def whole(tensor: Any) -> Tensor:
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    result: Tensor = tensor
    return result


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].cpu(), tensor), name


def same_ties(model: nn.Module, expected: nn.Module) -> bool:
    return [name for name, _ in model.named_parameters()] == [name for name, _ in expected.named_parameters()]


# -- one process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_deferred_model_is_built_later_with_the_weights_and_the_random_state_of_one_built_at_once(
    variant: str,
) -> None:
    expected = seeded(variant)
    state = torch.get_rng_state()
    model = seeded(variant, deferred=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(tensor.is_meta for tensor in [*model.model.parameters(), *model.model.buffers()])
    modules = list(model.modules())
    torch.manual_seed(99)  # whatever happens in between
    later = torch.get_rng_state()
    model.configure_model()
    assert torch.equal(torch.get_rng_state(), later)
    assert_equal(tensors(model.model), tensors(expected.model))
    assert same_ties(model, expected)
    assert list(model.modules()) == modules  # hooks on them still hold
    assert model.architecture() == expected.architecture()


def test_building_twice_changes_nothing() -> None:
    model = seeded("qwen3", deferred=True)
    model.configure_model()
    weight = model.get_parameter("model.lm_head.weight")
    weight.data.zero_()
    model.configure_model()
    assert model.get_parameter("model.lm_head.weight") is weight
    assert not weight.any()


def test_what_was_said_of_a_parameter_before_it_was_built_holds() -> None:
    model = seeded("qwen3", deferred=True)
    model.get_parameter("model.lm_head.weight").requires_grad_(False)
    model.configure_model()
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "model.lm_head.weight"
    ]


def test_a_deferred_model_can_be_copied_and_pickled() -> None:
    expected = tensors(seeded("olmoe").model)
    for model in (deepcopy(seeded("olmoe", deferred=True)), pickle.loads(pickle.dumps(seeded("olmoe", deferred=True)))):
        model.configure_model()
        assert_equal(tensors(model.model), expected)


@pytest.mark.parametrize("variant", ["qwen3", "olmoe"])
def test_the_weights_of_a_folder_arrive_too(variant: str, tmp_path: Path) -> None:
    tiny(variant).save_pretrained(tmp_path / "folder")
    kind: Any = VARIANTS[variant][0]
    expected = kind(pretrained=str(tmp_path / "folder"))
    state = torch.get_rng_state()
    model = kind(pretrained=str(tmp_path / "folder"), deferred=True)
    assert torch.equal(torch.get_rng_state(), state)
    model.configure_model()
    assert_equal(tensors(model.model), tensors(expected.model))
    assert model.architecture() == expected.architecture()


def test_the_dtype_is_that_of_the_construction_and_not_of_the_building() -> None:
    model = seeded("qwen3", deferred=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model.configure_model()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(tensors(model.model), tensors(seeded("qwen3").model))


# -- FSDP2 -------------------------------------------------------------------------------------------------------


def sharded_on_the_meta_device(variant: str, **changes: Any) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    from lit_symopt.models.fully_sharded import shard_decoder

    model = seeded(variant, deferred=True, **changes)
    state = torch.get_rng_state()
    shard_decoder(model.model, init_device_mesh("cpu", (dist.get_world_size(),)))
    torch.manual_seed(1000 + dist.get_rank())  # ranks need not draw the same before
    model.configure_model()
    local = sum(parameter.to_local().numel() for parameter in model.model.parameters())  # type: ignore[attr-defined]
    found = tensors(model.model)
    model.loss(torch.zeros(2, 5, dtype=torch.long)).backward()
    return {
        "tensors": found,
        "state": state,
        "ties": [name for name, _ in model.named_parameters()],
        "share": local / sum(parameter.numel() for parameter in model.model.parameters()),
        "again": tensors(model.model),
    }


@pytest.mark.parametrize("variant", ON_RANKS)
def test_under_fsdp2_a_model_from_the_meta_device_has_the_weights_of_one_process(variant: str, two: Ranks) -> None:
    expected = seeded(variant)
    state = torch.get_rng_state()
    for found in two(sharded_on_the_meta_device, variant):
        assert_equal(found["tensors"], tensors(expected.model))
        assert_equal(found["again"], found["tensors"])  # nothing is lost in a forward pass
        assert torch.equal(found["state"], state)
        assert found["ties"] == [name for name, _ in expected.named_parameters()]
        assert found["share"] < 0.62


def test_the_weights_of_a_folder_arrive_in_shards_on_three_ranks(three: Ranks, tmp_path: Path) -> None:
    tiny("olmoe").save_pretrained(tmp_path / "folder")
    expected = tensors(tiny("olmoe").model)
    for found in three(sharded_on_the_meta_device, "olmoe", pretrained=str(tmp_path / "folder")):
        assert_equal(found["tensors"], expected)


# -- DeepSpeed ZeRO 3 --------------------------------------------------------------------------------------------


def under_zero_3(variant: str, how: str, *, bf16: bool = False) -> dict[str, Any]:
    import deepspeed

    from lit_symopt.strategies.cpu import communicate_by_gloo

    communicate_by_gloo()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
    }
    if how == "deferred":
        model = seeded(variant, deferred=True)
        with deepspeed.zero.Init(config_dict_or_path=config):
            model.configure_model()
    elif how == "inside zero.Init":
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = seeded(variant)
    else:
        model = seeded(variant)
    state = torch.get_rng_state()
    partitioned = all(hasattr(parameter, "ds_id") for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    parameters: list[Any] = list(model.parameters())
    share = sum(p.ds_tensor.numel() for p in parameters) / sum(p.ds_numel for p in parameters)
    found = gathered(model.model)
    engine.backward(engine.module.loss(torch.zeros(2, 5, dtype=torch.long)))
    engine.step()
    moved = gathered(model.model)
    return {
        "tensors": found,
        "state": state,
        "share": share,
        "partitioned": partitioned,
        "ties": [name for name, _ in model.named_parameters()],
        "moved": {name for name in found if not torch.equal(found[name], moved[name])},
    }


def gathered(model: nn.Module) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: tensor.clone() for name, tensor in tensors(model).items()}


@pytest.mark.deepspeed
@pytest.mark.parametrize("how", ["deferred", "inside zero.Init"])
@pytest.mark.parametrize("variant", ON_RANKS)
def test_inside_zero_init_a_model_has_the_weights_of_one_process(variant: str, how: str, two: Ranks) -> None:
    """DeepSpeed #8438, and the initialization of transformers that `zero.Init` loses."""
    expected = seeded(variant)
    state = torch.get_rng_state()
    for found in two(under_zero_3, variant, how):
        assert found["partitioned"]
        assert found["share"] < 0.62
        assert_equal(found["tensors"], tensors(expected.model))
        assert torch.equal(found["state"], state)
        assert found["ties"] == [name for name, _ in expected.named_parameters()]
        assert {"lm_head.weight", "model.embed_tokens.weight"} <= found["moved"]  # the engine trains them


@pytest.mark.deepspeed
@pytest.mark.parametrize("variant", ["gemma3", "olmoe"])
def test_in_bf16_weights_and_buffers_are_those_of_a_model_built_at_once(variant: str, two: Ranks) -> None:
    expected = {name: parameter.bfloat16() for name, parameter in seeded(variant).model.named_parameters()}
    at_once = two(under_zero_3, variant, "at once", bf16=True)[0]["tensors"]
    assert_equal({name: at_once[name] for name in expected}, expected)
    for how in ("deferred", "inside zero.Init"):
        for found in two(under_zero_3, variant, how, bf16=True):
            assert_equal(found["tensors"], at_once)


def anybodys_module_inside_zero_init() -> dict[str, Tensor]:
    import deepspeed

    from lit_symopt.strategies.cpu import communicate_by_gloo

    communicate_by_gloo()
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        module = Plain(seed=dist.get_rank())
        fill_from_rank_zero(module, lambda: Plain(seed=SEED))
    return gathered(module)


@pytest.mark.deepspeed
def test_anybodys_module_is_filled_inside_zero_init(two: Ranks) -> None:
    expected = tensors(Plain(seed=SEED))
    for found in two(anybodys_module_inside_zero_init):
        assert_equal(found, expected)


# -- anybody's module --------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """With a tied weight and a buffer that is in no state dict."""

    def __init__(self, *, seed: int, width: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(width, 5, bias=False)
        self.second = nn.Linear(5, width)
        self.again = nn.Linear(width, 5, bias=False)
        self.again.weight = self.first.weight
        self.register_buffer("angles", torch.rand(4), persistent=False)


def fill_copies() -> dict[str, Tensor]:
    module = Plain(seed=dist.get_rank())
    state = torch.get_rng_state()
    fill_from_rank_zero(module, lambda: Plain(seed=SEED))
    assert torch.equal(torch.get_rng_state(), state)
    return tensors(module)


def test_copies_are_filled_and_no_random_state_moves(two: Ranks) -> None:
    expected = tensors(Plain(seed=SEED))
    for found in two(fill_copies):
        assert_equal(found, expected)


def fill_wrongly(what: str) -> str:
    module = Plain(seed=0)

    def build() -> nn.Module:
        assert dist.get_rank() == 0
        if what == "raises":
            raise OSError("no space left")
        return Plain(seed=0, width=7) if what == "shape" else nn.Linear(2, 2)

    try:
        fill_from_rank_zero(module, build)
    except (ConfigError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_what_goes_wrong_on_rank_zero_is_an_error_on_every_rank(two: Ranks) -> None:
    first, second = two(fill_wrongly, "raises")
    assert first == "OSError: no space left"
    assert second == "ConfigError: Plain cannot be filled: rank 0 could not build it (OSError: no space left)"
    for said in two(fill_wrongly, "shape"):
        assert "'first.weight' has shape (5, 3), and (5, 7) in the whole module on rank 0" in said
    for said in two(fill_wrongly, "names"):
        assert "lacks ['angles', 'first.weight', 'second.bias', 'second.weight']" in said
        assert "has ['bias', 'weight'] that are not here" in said


def test_a_module_without_storage_is_refused() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"'weight' is on the meta device.*to_empty"):
        fill_from_rank_zero(module, lambda: nn.Linear(2, 2))
