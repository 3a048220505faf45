"""What cannot be inferred is an error that names the thing and the way out; nothing is guessed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_symopt.blocks import Action, Block, BlockTaxonomy, Layout, Role
from lit_symopt.errors import ConfigError, TaxonomyError
from lit_symopt.infer import infer
from tests.infer.answers.table import ANSWERS
from tests.infer.modules import INSTANCES
from tests.infer.plain import MixtureDecoder
from tests.infer.test_architectures import differences


class Strange(nn.Module):
    """A linear map, one that is never used, a stack that is never used, and heads as dimensions of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 3)
        self.stack = nn.Parameter(torch.randn(2, 3, 4))
        self.merged = nn.Parameter(torch.randn(4, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.einsum("bd,dhk->bhk", self.used(x), self.merged)
        return out


def refusal(module: nn.Module, batch: Any) -> str:
    with pytest.raises(TaxonomyError) as caught:
        infer(module, batch)
    return str(caught.value)


def suggested(message: str) -> list[Block]:
    """The blocks that an error tells to write, made by running its lines."""
    listed = re.search(r"known=\[\n(.*?)\n  \]\)", message, re.DOTALL)
    assert listed is not None
    names = {"Block": Block, "Role": Role, "Layout": Layout, "Action": Action}
    found: list[Block] = eval(f"[{listed.group(1)}]", names)
    return found


def test_every_open_parameter_is_named_with_its_shape_and_what_was_seen_of_it() -> None:
    message = refusal(Strange(), torch.randn(2, 4))
    assert "3 trainable parameter(s)" in message
    assert "'idle.weight' (3, 4): took no part in the pass, nor did one like it" in message
    assert "'stack' (2, 3, 4): took no part" in message
    assert "'merged' (4, 2, 3): is used by" in message
    assert "block_taxonomy()" in message


def test_the_lines_an_error_suggests_are_python_and_settle_it() -> None:
    module, batch = Strange(), torch.randn(2, 4)
    known = suggested(refusal(module, batch))
    assert [block.name for block in known] == ["stack", "merged", "idle.weight"]
    taxonomy = infer(module, batch, known=known)
    assert len(taxonomy.assign(module)) == len(list(module.parameters()))


def test_a_frozen_parameter_is_not_asked_for() -> None:
    module = Strange()
    for parameter in (module.idle.weight, module.stack):
        parameter.requires_grad_(False)
    assert "1 trainable parameter(s)" in refusal(module, torch.randn(2, 4))


def test_a_known_block_that_matches_nothing_is_refused_by_name() -> None:
    with pytest.raises(TaxonomyError, match=r"'nothing\.\*' of `known` match no parameter"):
        infer(nn.Linear(3, 2), torch.randn(1, 3), known=[Block("nothing.*", role=Role.LINEAR)])


def test_a_parameter_that_two_known_blocks_claim_is_refused() -> None:
    twice = [Block("weight", role=Role.LINEAR), Block("w*", role=Role.UP)]
    with pytest.raises(TaxonomyError, match=r"claimed more than once: 'weight' \(2, 3\)"):
        infer(nn.Linear(3, 2), torch.randn(1, 3), known=twice)


def test_fused_rows_in_an_order_that_no_layout_says_are_asked_for_with_one_matrix_a_head() -> None:
    class Reversed(nn.Module):
        """Values first, then keys, then queries."""

        def __init__(self) -> None:
            super().__init__()
            self.fused, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            v, k, q = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.fused(x).chunk(3, -1))
            attended = nn.functional.scaled_dot_product_attention(q, k, v)
            out: Tensor = x + self.out(attended.transpose(1, 2).flatten(2))
            return out

    module, batch = Reversed(), torch.randn(2, 5, 8)
    message = refusal(module, batch)
    assert "the query of 2 head(s) and the key of 2 head(s) and the value of 2 head(s) in an order" in message
    (block,) = suggested(message)
    assert str(block.layout) == str(Layout.split((4,) * 6))
    assert block.acts is Action.NONE
    assert infer(module, batch, known=[block]).assign(module)[0].role is Role.QKV


def test_a_weight_that_is_made_of_several_parameters_is_asked_for() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    assert "is used by _weight_norm_interface" in refusal(module, torch.randn(2, 4))


@pytest.mark.parametrize(
    ("batch", "missing"),
    [
        ({"labels": torch.zeros(2, 3, dtype=torch.long)}, "labels"),
        ((torch.randn(2, 4), torch.randn(2, 4)), "too many positional arguments"),
        ({"y": torch.randn(2, 4)}, "missing a required argument: 'x'"),
    ],
)
def test_a_batch_that_forward_does_not_take_is_refused_with_what_is_missing(batch: Any, missing: str) -> None:
    with pytest.raises(ConfigError, match=missing):
        infer(Strange(), batch)


def test_a_pass_that_fails_is_refused_with_the_reason_and_the_module_left_as_it_was() -> None:
    module = Strange()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ConfigError, match="cannot be called with the example batch"):
        infer(module, torch.randn(2, 5))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_module_on_the_meta_device_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"'weight' is on the meta device.*small instance"):
        infer(nn.Linear(3, 2, device="meta"), torch.randn(1, 3))


ONE_TOKEN = ["llama", "mixtral", "mixtral_eager", "deepseek_v3", "gpt2", "gpt_neox", "phi3", "falcon_grouped", "bloom"]


@pytest.mark.parametrize("name", ONE_TOKEN)
def test_one_token_is_enough_for_a_causal_model(name: str) -> None:
    module = INSTANCES[name].module()
    inferred = BlockTaxonomy.infer(module, {"input_ids": torch.tensor([[5]])})
    assert differences(inferred, ANSWERS[name], module) == []


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (3, 3)])
def test_a_router_with_one_expert_or_that_chooses_all_is_a_router(experts: int, k: int) -> None:
    module = MixtureDecoder(scoring="softmax_topk", gated=True)
    for mixture in module.mixtures:
        mixture.k = k  # type: ignore[assignment]
        mixture.router = nn.Linear(20, experts)
        mixture.experts = mixture.experts[:experts]  # type: ignore[index]
    found = {block.name: block for block in infer(module, torch.tensor([[1, 2, 3]])).blocks}
    for layer in range(2):
        router = found[f"mixtures.{layer}.router.weight"]
        assert (router.role, router.symmetry.shift_invariant) == (Role.ROUTER, True)
        assert found[f"mixtures.{layer}.experts.{experts - 1}.c.weight"].role is Role.DOWN


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (4, 4)])
def test_a_router_of_transformers_with_one_expert_or_that_chooses_all(experts: int, k: int) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=53,
        hidden_size=20,
        intermediate_size=36,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        num_local_experts=experts,
        num_experts_per_tok=k,
    )
    taxonomy = infer(MixtralForCausalLM(config), {"input_ids": torch.tensor([[1, 2, 3]])})
    (router,) = [block for block in taxonomy.blocks if block.role is Role.ROUTER]
    assert router.symmetry.shift_invariant
