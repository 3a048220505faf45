"""Every family in all its variants: blocks that cover it, symmetries, losses, weights in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_symopt import BlockTaxonomy, Role, SymOpt, SymOptConfig
from lit_symopt.blocks import Action, Block
from lit_symopt.config import RoleConfig
from lit_symopt.errors import ConfigError
from lit_symopt.models import Gemma3, GptOss, LitCausalLM, LitMoECausalLM, OLMoE
from lit_symopt.models.checkpoint import refuse_another_architecture
from lit_symopt.models.pretrained import export_checkpoint
from tests.models.tiny import FAMILIES, MIXTURES, SHARED, VARIANTS, VOCABULARY, tiny, tokens

STACKS = ["symmetric", "muon", "polargrad", "ssd", "scion", "adamw"]


def blocks(model: LitCausalLM) -> dict[str, Block]:
    """The blocks by name, without the module's own prefix, for the first layer and what is outside of layers."""
    assigned = {block.name.removeprefix("model."): block for block in model.block_taxonomy().assign(model)}
    return {
        name.removeprefix("model.layers.0.").removeprefix("model."): block
        for name, block in assigned.items()
        if "layers.1" not in name
    }


def parts(block: Block) -> list[tuple[tuple[int, ...], int, int, int, int]]:
    return [(part.batch, part.m, part.n, part.fan_out, part.fan_in) for part in block.parts]


# -- blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trainable_parameter_is_one_block_and_every_pattern_matches(variant: str) -> None:
    model = tiny(variant)
    assigned = model.block_taxonomy().assign(model)
    assert [block.name for block in assigned] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_every_vector_lies_along_is_said(variant: str) -> None:
    for name, block in blocks(tiny(variant)).items():
        assert (block.along is not None) == (block.role is Role.VECTOR), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_transformers_model_alone_has_the_same_blocks(variant: str) -> None:
    model = tiny(variant)
    alone = BlockTaxonomy.of(model.model).assign(model.model)
    around = model.block_taxonomy().assign(model)
    assert [f"model.{block.name}" for block in alone] == [block.name for block in around]
    described = [[(b.role, b.layout, b.symmetry, b.acts, b.along) for b in some] for some in (alone, around)]
    assert described[0] == described[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_an_untied_head_with_a_plain_softmax_and_a_router_are_centered(variant: str) -> None:
    invisible = {name for name, block in blocks(tiny(variant)).items() if block.symmetry.shift_invariant}
    plain_heads = ("qwen3", "gemma3 untied", "olmoe", "gpt_oss", "gpt_oss without attention biases")
    expected = {"lm_head.weight"} if variant in plain_heads else set()
    expected |= {"mlp.gate.weight"} if variant.startswith("olmoe") else set()
    expected |= {"mlp.router.weight", "mlp.router.bias"} if variant.startswith("gpt_oss") else set()
    assert invisible == expected


def test_a_soft_capped_or_tied_head_cannot_be_asked_to_be_centered() -> None:
    for variant, role in (("gemma3 untied, soft-capped", "lm_head"), ("gemma3", "tied_embedding")):
        asked = SymOptConfig(roles={role: RoleConfig(centered=True)})
        with pytest.raises(ConfigError, match=rf"roles\.{role}\.centered=true: the loss sees the shift"):
            SymOpt.for_module(tiny(variant), config=asked)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_matrices_of_their_own_and_keys_are_shared_by_groups(family: str) -> None:
    found = blocks(tiny(family))
    h, d = (4 if family == "olmoe" else 6), 16
    assert parts(found["self_attn.q_proj.weight"]) == [((4,), h, d, h, d)]
    assert parts(found["self_attn.k_proj.weight"]) == [((2,), h, d, h, d)]
    assert parts(found["self_attn.v_proj.weight"]) == [((2,), h, d, h, d)]
    assert parts(found["self_attn.o_proj.weight"]) == [((4,), d, h, d, h)]
    assert {str(found[f"self_attn.{name}_proj.weight"].acts) for name in "qk"} == {"rotary_halves"}
    assert {str(found[f"self_attn.{name}_proj.weight"].acts) for name in "vo"} == {"general_linear"}


def test_norms_of_queries_and_keys_lie_along_them_and_those_of_the_stream_along_it() -> None:
    for family, queries, keys in (("qwen3", 6, 6), ("gemma3", 6, 6), ("olmoe", 16, 8)):
        found = blocks(tiny(family))
        gains = {name: block for name, block in found.items() if "norm" in name}
        assert (found["self_attn.q_norm.weight"].along, found["self_attn.q_norm.weight"].shape) == ("query", (queries,))
        assert (found["self_attn.k_norm.weight"].along, found["self_attn.k_norm.weight"].shape) == ("key", (keys,))
        rest = {name for name in gains if "self_attn" not in name}
        assert {gains[name].along for name in rest} == {"residual"}
        assert len(rest) == (5 if family == "gemma3" else 3)


def test_olmoe_stacks_gate_and_up_and_its_experts_are_linear_in_up() -> None:
    found = blocks(tiny("olmoe"))
    gate_up, down = found["mlp.experts.gate_up_proj"], found["mlp.experts.down_proj"]
    assert str(gate_up.layout) == "experts(gate_up('stacked'))"
    assert parts(gate_up) == [((5, 2), 24, 16, 24, 16)]
    assert parts(down) == [((5,), 24, 16, 16, 24)]  # rows are neurons, but it maps neurons to features
    assert {gate_up.acts, down.acts} == {Action.MONOMIAL}


def test_gpt_oss_interleaves_gate_and_up_and_its_experts_are_not_linear_in_up() -> None:
    found = blocks(tiny("gpt_oss"))
    gate_up, down = found["mlp.experts.gate_up_proj"], found["mlp.experts.down_proj"]
    assert str(gate_up.layout) == "experts(gate_up('interleaved', stored='in_out'))"
    assert parts(gate_up) == [((5, 2), 24, 16, 24, 16)]
    assert str(down.layout) == "experts(matrix(stored='in_out'))"
    assert parts(down) == [((5,), 24, 16, 16, 24)]
    assert {gate_up.acts, down.acts} == {Action.PERMUTATION}
    along = {name: block.along for name, block in found.items() if block.role is Role.VECTOR and "norm" not in name}
    assert along == {
        "self_attn.sinks": "heads",
        "self_attn.q_proj.bias": "query",
        "self_attn.k_proj.bias": "key",
        "self_attn.v_proj.bias": "value",
        "self_attn.o_proj.bias": "residual",
        "mlp.router.bias": "router",
        "mlp.experts.gate_up_proj_bias": "expert_gate_up",
        "mlp.experts.down_proj_bias": "residual",
    }


def test_the_first_matrix_of_gpt_oss_experts_is_the_gate() -> None:
    # With gate 1 and up 0 a neuron's gate_up is (1, 0): transformers takes even columns for the gate.
    model = tiny("gpt_oss")
    experts, block = model.model.model.layers[0].mlp.experts, blocks(model)["mlp.experts.gate_up_proj"]
    assert block.layout is not None
    gate, up = block.layout.to_matrices(experts.gate_up_proj)[0].unbind(1)
    assert torch.equal(gate, experts.gate_up_proj[..., ::2].mT)
    assert torch.equal(up, experts.gate_up_proj[..., 1::2].mT)


def test_clipped_queries_keys_and_values_have_no_rotations() -> None:
    from transformers import OlmoeConfig

    from lit_symopt.models.olmoe import taxonomy

    clipped = {block.role: block.acts for block in taxonomy(OlmoeConfig(clip_qkv=1.0)).blocks}
    assert {clipped[role] for role in (Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUT)} == {Action.NONE}


# -- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_that_of_transformers_in_float32_and_close_in_float64(variant: str) -> None:
    model, input_ids = tiny(variant), tokens(3, 11)
    theirs = model.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    ours = model.loss(input_ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0)
    double = model.double().loss(input_ids)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double, ours.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", MIXTURES)
def test_grouped_experts_give_the_same_loss_and_gradients_and_refuse_float64_by_name(family: str) -> None:
    input_ids = tokens(3, 11)
    one, other = tiny(family), tiny(family, experts="grouped_mm")
    for model in (one, other):
        model.loss(input_ids).backward()
    torch.testing.assert_close(other.loss(input_ids), one.loss(input_ids), rtol=1e-6, atol=0)
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-4, atol=1e-7, msg=name)
    with pytest.raises(ConfigError, match=r"experts='grouped_mm'.*this model is float64; give experts='eager'"):
        other.double().loss(input_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_precision_gives_nearly_the_same_loss_and_float32_gradients(family: str) -> None:
    model, input_ids = tiny(family), tokens(3, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.training_loss({"input_ids": input_ids})
    loss.backward()
    assert loss.item() == pytest.approx(model.loss(input_ids).item(), rel=1e-3)
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_row_of_the_embedding_starts_at_random_and_trains_also_that_of_token_0(variant: str) -> None:
    model = tiny(variant)
    assert (model.model.model.embed_tokens.weight.detach().abs().sum(dim=1) > 0).all()
    model.loss(torch.arange(VOCABULARY).view(2, 16)).backward()
    gradient = model.model.model.embed_tokens.weight.grad
    seen = torch.arange(VOCABULARY).view(2, 16)[:, :-1].flatten()  # the last token of a sequence predicts nothing
    assert 0 in seen
    assert (gradient[seen].abs().sum(dim=1) > 0).all()


def test_a_folder_that_declares_a_padding_token_trains_its_row_too(tmp_path: Path) -> None:
    model = tiny("gemma3 untied")
    model.model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "weights")
    for again in (Gemma3(pretrained=str(tmp_path / "weights")), LitCausalLM.from_pretrained(tmp_path / "weights")):
        assert again.model.config.pad_token_id == 0
        again.loss(tokens(4, 16)).backward()
        assert float(again.model.model.embed_tokens.weight.grad[0].abs().sum()) > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stack", STACKS)
def test_every_stack_takes_a_step_that_moves_every_parameter(family: str, stack: Any) -> None:
    model = tiny(family, symopt=SymOptConfig(stack=stack))
    optimizer = SymOpt.for_module(model, config=model.symopt)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.loss(torch.arange(VOCABULARY).repeat(4).view(8, 16)).backward()
    optimizer.step()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert still == []


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_activations_changes_no_gradient(family: str) -> None:
    options = {"load_balancing_loss": 0.1, "router_z_loss": 0.1} if family in MIXTURES else {}
    gradients = []
    for gradient_checkpointing in (False, True):
        model = tiny(family, gradient_checkpointing=gradient_checkpointing, **options).train()
        model.training_loss({"input_ids": tokens(3, 11)}).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


# -- arguments ---------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_published_architectures() -> None:
    with torch.device("meta"):
        sizes = {kind.__name__: sum(p.numel() for p in kind().parameters()) for kind in (Gemma3, OLMoE, GptOss)}
    # Parameters of gemma-3-1b-pt, OLMoE-1B-7B-0924 and gpt-oss-20b as their model cards' configurations make them.
    gemma = 262144 * 1152 + 26 * (1152 * (1024 + 256 + 256 + 1024) + 3 * 1152 * 6912 + 4 * 1152 + 512) + 1152
    olmoe = 2 * 50304 * 2048 + 16 * (4 * 2048**2 + 64 * 3 * 2048 * 1024 + 64 * 2048 + 4 * 2048) + 2048
    attention = 2880 * 4096 * 2 + 2 * 2880 * 512 + 4096 + 2 * 512 + 2880 + 64
    experts = 32 * (2880 * 5760 + 5760 + 2880 * 2880 + 2880) + 32 * 2881
    gpt_oss = 2 * 201088 * 2880 + 24 * (attention + experts + 2 * 2880) + 2880
    assert sizes == {"Gemma3": gemma, "OLMoE": olmoe, "GptOss": gpt_oss}
    assert (gemma, olmoe, gpt_oss) == (999_885_952, 6_919_161_856, 20_914_757_184)


IMPOSSIBLE: list[tuple[str, dict[str, Any], str]] = [
    *((family, {"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide") for family in FAMILIES),
    *((family, {"hidden_size": 0}, "hidden_size=0 must be at least 1") for family in FAMILIES),
    *((family, {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be positive and finite") for family in FAMILIES),
    *((family, {"attention_dropout": 1.0}, r"attention_dropout=1.0 must be in \[0, 1\)") for family in FAMILIES),
    *((f, {"num_experts_per_tok": 6}, "num_experts_per_tok=6 is more than num_experts=5") for f in MIXTURES),
    *((f, {"load_balancing_loss": -0.1}, "load_balancing_loss=-0.1 must be a finite coefficient") for f in MIXTURES),
    *((f, {"router_z_loss": float("inf")}, "router_z_loss=inf must be a finite coefficient") for f in MIXTURES),
    ("gemma3", {"head_dim": 5}, "head_dim=5 must be even"),
    ("gemma3", {"hidden_size": 18}, "hidden_size=18 is no multiple of num_attention_heads=4"),
    ("gemma3", {"final_logit_softcapping": 0.0}, "final_logit_softcapping=0.0 must be positive"),
    ("gemma3", {"sliding_window": 0}, "sliding_window=0 must be at least 1"),
    ("olmoe", {"hidden_size": 18}, "hidden_size=18 is no multiple of num_attention_heads=4"),
    ("olmoe", {"hidden_size": 12}, r"head_dim=3 \(hidden_size / num_attention_heads\) must be even"),
    ("gpt_oss", {"rope_scaling_factor": 0.5}, "rope_scaling_factor=0.5 must be at least 1"),
    ("gpt_oss", {"attention": "sdpa"}, "GptOss with attention='sdpa' cannot be built here"),
]


@pytest.mark.parametrize(("family", "change", "message"), IMPOSSIBLE)
def test_an_architecture_that_cannot_be_built_is_refused(family: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(family, **change)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_and_architecture_survive_a_pretrained_folder(tmp_path: Path, variant: str) -> None:
    model, folder = tiny(variant), str(tmp_path / "weights")
    model.save_pretrained(folder)
    again = type(model)(pretrained=folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    refuse_another_architecture({"lit_symopt": {"architecture": model.architecture()}}, again)
    assert torch.equal(model.loss(tokens(2, 9)), again.loss(tokens(2, 9)))


CONTRADICTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("gemma3", {"hidden_size": 32}, "hidden_size=32 contradicts .*has hidden_size=16"),
    ("gemma3", {"sliding_window_pattern": 3}, "sliding_window_pattern=3 contradicts .*sliding_window_pattern=2"),
    ("gemma3", {"rope_local_theta": 5.0}, r"rope_local_theta=5\.0 contradicts .*rope_local_theta=10000\.0"),
    ("gemma3", {"final_logit_softcapping": 5.0}, r"final_logit_softcapping=5\.0 contradicts"),
    ("olmoe", {"num_experts": 7}, "num_experts=7 contradicts .*num_experts=5"),
    ("gpt_oss", {"num_experts": 7}, "num_experts=7 contradicts .*num_experts=5"),
    ("gpt_oss", {"rope_scaling_factor": 2.0}, r"rope_scaling_factor=2\.0 contradicts .*rope_scaling_factor=32\.0"),
]


@pytest.mark.parametrize(("family", "change", "message"), CONTRADICTIONS)
def test_arguments_that_contradict_a_pretrained_folder_are_refused(
    tmp_path: Path, family: str, change: dict[str, Any], message: str
) -> None:
    kind, own = VARIANTS[family]
    tiny(family).save_pretrained(tmp_path / "weights")
    folder = str(tmp_path / "weights")
    same = kind(**SHARED, **own, pretrained=folder)  # type: ignore[call-arg]
    assert same.model.config.hidden_size == 16
    with pytest.raises(ConfigError, match=message):
        kind(pretrained=folder, **change)  # type: ignore[call-arg]
    other = OLMoE if family != "olmoe" else Gemma3
    with pytest.raises(ConfigError, match=r"holds a '\w+' model, not a"):
        other(pretrained=folder)


@pytest.mark.parametrize("family", MIXTURES)
def test_attention_and_experts_of_a_loaded_folder_are_as_asked(tmp_path: Path, family: str) -> None:
    tiny(family).save_pretrained(tmp_path / "weights")
    folder = str(tmp_path / "weights")
    for experts in ("eager", "grouped_mm"):
        config = VARIANTS[family][0](pretrained=folder, attention="eager", experts=experts).model.config  # type: ignore[call-arg]
        assert (config._attn_implementation, config._experts_implementation) == ("eager", experts)
    assert isinstance(LitMoECausalLM.from_pretrained(folder), LitMoECausalLM)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_checkpoint_is_the_same_model_in_transformers(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    model, input_ids = tiny(family), tokens(2, 9)
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict(), "global_step": 1, "loops": {}}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    export_checkpoint(tmp_path / "a.ckpt", tmp_path / "weights")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "weights", local_files_only=True)
    torch.testing.assert_close(exported(input_ids).logits, model(input_ids), rtol=1e-5, atol=1e-6)
