"""Qwen3: its blocks cover it exactly, its arguments are checked, its initial weights are as stated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_symopt import Layout, Role, SymOpt
from lit_symopt.config import SymOptConfig
from lit_symopt.errors import ConfigError
from lit_symopt.models import Qwen3
from lit_symopt.models.qwen3 import taxonomy

TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
}


def roles(model: Qwen3) -> dict[str, tuple[Role, Layout | None]]:
    return {block.name: (block.role, block.layout) for block in model.block_taxonomy().assign(model)}


@pytest.mark.parametrize("tied", [False, True])
def test_every_trainable_parameter_is_one_block(tied: bool) -> None:
    model = Qwen3(**TINY, tie_word_embeddings=tied)
    assert set(roles(model)) == {name for name, _ in model.named_parameters()}


def test_an_untied_model_has_an_embedding_and_a_head_whose_shift_is_invisible() -> None:
    model = Qwen3(**TINY)
    blocks = {block.role: block for block in model.block_taxonomy().assign(model)}
    assert not blocks[Role.EMBEDDING].symmetry.shift_invariant
    assert blocks[Role.LM_HEAD].symmetry.shift_invariant
    assert Role.TIED_EMBEDDING not in blocks


def test_a_tied_model_has_one_block_for_both_which_is_never_centered() -> None:
    model = Qwen3(**TINY, tie_word_embeddings=True)
    blocks = {block.role: block for block in model.block_taxonomy().assign(model)}
    assert not blocks[Role.TIED_EMBEDDING].symmetry.shift_invariant
    assert blocks[Role.TIED_EMBEDDING].aliases == ("model.lm_head.weight",)
    assert not {Role.EMBEDDING, Role.LM_HEAD} & set(blocks)


def test_layouts_give_one_matrix_a_head_and_one_row_a_neuron() -> None:
    model = Qwen3(**TINY)
    parts = {block.name.split(".")[-2]: block.parts[0] for block in model.block_taxonomy().assign(model)}
    assert (parts["q_proj"].batch, parts["q_proj"].m, parts["q_proj"].n) == ((4,), 6, 16)
    assert (parts["k_proj"].batch, parts["k_proj"].m, parts["k_proj"].n) == ((2,), 6, 16)
    assert (parts["v_proj"].batch, parts["v_proj"].m, parts["v_proj"].n) == ((2,), 6, 16)
    assert (parts["o_proj"].batch, parts["o_proj"].m, parts["o_proj"].n) == ((4,), 16, 6)
    assert (parts["down_proj"].m, parts["down_proj"].n) == (24, 16)  # rows are neurons
    assert (parts["down_proj"].fan_out, parts["down_proj"].fan_in) == (16, 24)  # but it maps neurons to features


def test_norm_gains_of_layers_queries_and_keys_are_vectors() -> None:
    vectors = {name for name, (role, _) in roles(Qwen3(**TINY)).items() if role is Role.VECTOR}
    assert {name.split(".")[-2] for name in vectors} == {
        "q_norm",
        "k_norm",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    assert len(vectors) == 4 * 2 + 1


def test_biases_of_the_attention_have_a_block_where_the_configuration_has_them() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**TINY, attention_bias=True)
    assigned = taxonomy(config).assign(Qwen3ForCausalLM(config))
    assert sum(block.name.endswith("_proj.bias") for block in assigned) == 4 * 2


def test_a_plain_transformers_model_is_known_by_its_architecture() -> None:
    model = Qwen3(**TINY)
    inside = SymOpt.for_module(model.model, config=SymOptConfig())
    around = SymOpt.for_module(model, config=SymOptConfig())
    assert [group["role"] for group in inside.param_groups] == [group["role"] for group in around.param_groups]


@pytest.mark.parametrize("stack", ["symmetric", "muon", "polargrad", "ssd", "scion", "adamw"])
def test_every_stack_takes_a_step_that_moves_every_parameter(stack: Any) -> None:
    torch.manual_seed(0)
    model = Qwen3(**TINY, symopt=SymOptConfig(stack=stack))
    optimizer = SymOpt.for_module(model, config=model.symopt)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.loss(torch.arange(32).view(2, 16)).backward()
    optimizer.step()
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []


def test_initial_weights_are_normal_with_the_stated_deviation_and_gains_are_one() -> None:
    torch.manual_seed(0)
    model = Qwen3(**{**TINY, "vocab_size": 4096, "hidden_size": 64}, initializer_range=0.05)
    for name, parameter in model.state_dict().items():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        elif parameter.numel() > 10_000:
            assert float(parameter.std()) == pytest.approx(0.05, rel=0.03)
            assert abs(float(parameter.mean())) < 0.002


def test_the_default_architecture_has_the_parameters_of_qwen3_0p6b_with_an_untied_head() -> None:
    with torch.device("meta"):
        model = Qwen3()
    # 2·V·d + 28·(q, k, v, o: 6·d·d; gate, up, down: 9·d·d; norms) + last norm, with d = 1024, V = 151,936
    layer = 6 * 1024 * 1024 + 9 * 1024 * 1024 + 2 * 1024 + 2 * 128
    assert sum(parameter.numel() for parameter in model.parameters()) == 2 * 151_936 * 1024 + 28 * layer + 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"initializer_range": 0.0}, "initializer_range=0.0 must be positive"),
        ({"attention_dropout": 1.0}, r"attention_dropout=1.0 must be in \[0, 1\)"),
    ],
)
def test_an_architecture_that_cannot_be_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Qwen3(**{**TINY, **change})


def test_arguments_that_contradict_a_pretrained_folder_are_refused(tmp_path: Path) -> None:
    Qwen3(**TINY).save_pretrained(tmp_path / "weights")
    folder = str(tmp_path / "weights")
    assert Qwen3(pretrained=folder, hidden_size=16).model.config.hidden_size == 16
    with pytest.raises(ConfigError, match=r"hidden_size=64 contradicts pretrained=.*, which has hidden_size=16"):
        Qwen3(pretrained=folder, hidden_size=64)
    with pytest.raises(ConfigError, match=r"rope_theta=5\.0 contradicts"):
        Qwen3(pretrained=folder, rope_theta=5.0)


def test_importing_the_package_of_models_imports_neither_lightning_nor_transformers() -> None:
    code = (
        "import sys, lit_symopt.models as models; dir(models);"
        "assert not {'lightning', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_model_is_an_attribute_error_that_lists_the_known_ones() -> None:
    from lit_symopt import models

    with pytest.raises(AttributeError, match="Gemma3, GptOss, LitCausalLM, LitMoECausalLM, OLMoE, Qwen3"):
        models.Llama  # noqa: B018
