"""Routers of real architectures: logits and selections are those the modules themselves return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lit_symopt import Block, BlockTaxonomy, Role
from lit_symopt.errors import ConfigError
from lit_symopt.metrics import RouterWatch, Routing, find_routers

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
}


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    made: Any = {
        "olmoe": lambda: OlmoeForCausalLM(
            OlmoeConfig(**SIZES, intermediate_size=8, num_experts=4, initializer_range=0.5)
        ),
        "mixtral": lambda: MixtralForCausalLM(
            MixtralConfig(**SIZES, intermediate_size=8, num_local_experts=4, initializer_range=0.5)
        ),
        "qwen3_moe": lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **SIZES,
                intermediate_size=8,
                moe_intermediate_size=8,
                num_experts=4,
                initializer_range=0.5,
            )
        ),
        "gpt_oss": lambda: GptOssForCausalLM(
            GptOssConfig(
                **SIZES,
                intermediate_size=8,
                num_local_experts=4,
                head_dim=8,
                initializer_range=0.5,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            )
        ),
        "deepseek_v3": lambda: DeepseekV3ForCausalLM(
            DeepseekV3Config(
                **{**SIZES, "num_key_value_heads": 2},
                intermediate_size=8,
                moe_intermediate_size=8,
                n_routed_experts=8,
                n_group=4,
                topk_group=2,
                first_k_dense_replace=0,
                q_lora_rank=8,
                kv_lora_rank=8,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=8,
                initializer_range=0.5,
            )
        ),
    }[family]
    model: PreTrainedModel = made()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # enough to change what is selected
            buffer.copy_(torch.linspace(-1, 1, len(buffer)))
    return model


def taxonomy(family: str) -> BlockTaxonomy:
    """The router's blocks and nothing else: what finding routers needs."""
    if family == "gpt_oss":
        return BlockTaxonomy(
            [Block("*router.weight", role=Role.ROUTER), Block("*router.bias", role=Role.VECTOR, along="router")]
        )
    sigmoid = family == "deepseek_v3"
    return BlockTaxonomy([Block("*mlp.gate.weight", role=Role.ROUTER, shift_invariant=False if sigmoid else None)])


def truth(model: nn.Module, run: Any) -> list[tuple[Tensor, Tensor]]:
    """Logits and indices of each router's own output."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        found.append((output[0].detach().clone(), output[2].detach().clone()))

    routers = [child for child in model.modules() if "Router" in type(child).__name__]
    handles = [child.register_forward_hook(keep) for child in routers]
    run()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("tokens", [1, 12])
def test_logits_and_selections_are_those_of_the_module(family: str, tokens: int) -> None:
    model, ids = build(family), torch.randint(32, (1, tokens))
    routers, seen = find_routers(model, taxonomy(family)), list[Routing]()
    assert [router.label for router in routers] == ["layer_0", "layer_1"]
    assert {router.scores for router in routers} == {"sigmoid" if family == "deepseek_v3" else "softmax"}

    def run() -> None:
        with RouterWatch(routers, seen.append):
            model(input_ids=ids, use_cache=False)

    expected = truth(model, run)
    assert [routing.layer for routing in seen] == [0, 1]
    for routing, (logits, selected) in zip(seen, expected, strict=True):
        torch.testing.assert_close(routing.logits, logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(routing.selected.sort(-1).values, selected.sort(-1).values)
    if family == "deepseek_v3" and tokens > 1:  # groups and correction bias decide, not the logits alone
        assert any(not torch.equal(s.sort().values, x.topk(2).indices.sort().values) for x, s in expected)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_probabilities_add_up_to_one_and_have_the_order_of_the_logits(family: str) -> None:
    router = find_routers(build(family), taxonomy(family))[0]
    logits = 3.0 * torch.randn(20, router.experts)
    probabilities = router.probabilities(logits)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(20))
    assert torch.equal(probabilities.argsort(-1), logits.argsort(-1))


def test_a_router_with_z_loss_scores_by_softmax_and_a_frozen_one_is_found() -> None:
    model = build("olmoe").requires_grad_(False)
    [first, _] = find_routers(model, BlockTaxonomy([Block("*mlp.gate.weight", role=Role.ROUTER, z_loss=True)]))
    assert first.scores == "softmax"
    assert first.name == "model.layers.0.mlp.gate.weight"


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_repeats_is_not_counted_twice_and_gradients_stay(reentrant: bool) -> None:
    ids = torch.randint(32, (2, 6))

    def gradients(watched: bool) -> tuple[list[Tensor], int]:
        model, count = build("olmoe").train(), list[Routing]()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        with RouterWatch(find_routers(model, taxonomy("olmoe")) if watched else [], count.append):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None], len(count)

    with_watch, passes = gradients(True)
    without, _ = gradients(False)
    assert passes == 2
    assert len(with_watch) == len(without) > 0
    assert all(torch.equal(*pair) for pair in zip(with_watch, without, strict=True))


def hooks(module: nn.Module) -> int:
    return sum(len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules())


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    model = build("olmoe")
    routers, before = find_routers(model, taxonomy("olmoe")), hooks(model)
    with RouterWatch(routers, lambda _: None):
        assert hooks(model) > before
    assert hooks(model) == before
    with pytest.raises(RuntimeError, match="in the middle"), RouterWatch(routers, _raise):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    assert hooks(model) == before
    assert not torch.overrides._get_current_function_mode_stack()


def _raise(_: Routing) -> None:
    raise RuntimeError("in the middle")


# -- a linear layer as router ------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """A mixture written by hand: a linear router whose parent selects, in one of several ways."""

    def __init__(self, *, way: str = "topk", experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.router = nn.Linear(6, experts)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(experts))
        self.way, self.k = way, top_k

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        if self.way == "groups":  # as with groups of experts: a topk over all scores, and a last one that decides
            limit = scores.topk(2).values[..., 1:]
            _, chosen = scores.masked_fill(scores >= limit, 0.0).topk(self.k)
        elif self.way == "topk":  # the worst experts, so that nothing but the call itself tells which
            _, chosen = (-scores).topk(self.k)
        elif self.way == "fail":
            scores.topk(self.k)
            raise RuntimeError("out of luck")
        else:
            chosen = scores.argsort(-1, descending=True)[..., : self.k]
        outputs = torch.stack([expert(x) for expert in self.experts], -2)
        return outputs.gather(-2, chosen[..., None].expand(*chosen.shape, 6)).sum(-2)


LINEAR = BlockTaxonomy([Block("*router.weight", role=Role.ROUTER)])


def watched(module: nn.Module, x: Tensor, *, top_k: int | None = None) -> list[Routing]:
    seen: list[Routing] = []
    with RouterWatch(find_routers(module, LINEAR, top_k=top_k), seen.append):
        module(x)
    return seen


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (4, 4), (1, 1)])
def test_a_linear_router_is_followed_to_the_topk_of_the_module_around_it(experts: int, top_k: int) -> None:
    module, x = Mixture(experts=experts, top_k=top_k), torch.randn(2, 5, 6)
    [routing] = watched(module, x)
    expected = (-module.router(x)).topk(top_k).indices.flatten(0, 1)
    assert torch.equal(routing.selected.sort(-1).values, expected.sort(-1).values)
    torch.testing.assert_close(routing.logits, module.router(x).flatten(0, 1))
    torch.testing.assert_close(routing.shift, module.router.weight.double().sum(0).norm() / experts**0.5)


def test_the_last_topk_over_the_experts_decides() -> None:
    module, x = Mixture(way="groups"), torch.randn(9, 6)
    [routing] = watched(module, x)
    third_and_fourth = module.router(x).argsort(-1, descending=True)[:, 2:]
    assert torch.equal(routing.selected.sort(-1).values, third_and_fourth.sort(-1).values)


def test_layers_in_a_list_inside_one_module_are_told_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.routers = nn.ModuleDict({name: nn.ModuleDict({"router": nn.Linear(6, 4)}) for name in "ab"})

        def forward(self, x: Tensor) -> Tensor:
            first = self.routers["a"]["router"](x).topk(1).indices  # type: ignore[index]
            second = (-self.routers["b"]["router"](x)).topk(3).indices  # type: ignore[index]
            total: Tensor = first + second.sum(-1, keepdim=True)
            return total

    module, x = Two(), torch.randn(7, 6)
    one, two = watched(module, x)
    assert (one.layer, two.layer, one.selected.shape[1], two.selected.shape[1]) == (0, 1, 1, 3)
    assert torch.equal(two.selected, (-two.logits).topk(3).indices)


def test_without_topk_the_declared_number_decides_and_without_that_an_error_names_the_router() -> None:
    module, x = Mixture(way="argsort"), torch.randn(5, 6)
    [routing] = watched(module, x, top_k=3)
    assert torch.equal(routing.selected, routing.logits.topk(3).indices)
    with pytest.raises(ConfigError, match=r"which experts 'router.weight' selects: .* Give top_k"):
        watched(module, x)
    module.top_k = 2  # type: ignore[assignment]
    assert watched(module, x)[0].selected.shape == (5, 2)


def test_a_forward_that_fails_leaves_no_mode_behind() -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        watched(Mixture(way="fail"), torch.randn(5, 6))
    assert not torch.overrides._get_current_function_mode_stack()


def test_indices_that_reach_stacked_experts_count_before_any_topk() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Parameter(torch.randn(4, 6, 6))

        def forward(self, x: Tensor, *, index: Tensor) -> Tensor:
            output: Tensor = torch.einsum("nd,nkde->ne", x, self.down[index])
            return output

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = nn.Linear(6, 4), Experts()

        def forward(self, x: Tensor) -> Tensor:
            best = self.router(x).topk(3).indices
            output: Tensor = self.experts(x, index=best[:, 1:])  # drops the best: only the experts see what is used
            return output

    module, x, seen = Stacked(), torch.randn(5, 6), list[Routing]()
    blocks = [*LINEAR.blocks, Block("experts.down", role=Role.EXPERT_DOWN)]
    with RouterWatch(find_routers(module, BlockTaxonomy(blocks)), seen.append):
        module(x)
    assert torch.equal(seen[0].selected, module.router(x).topk(3).indices[:, 1:])


def test_a_module_without_routers_has_none() -> None:
    assert find_routers(nn.Linear(3, 3), BlockTaxonomy([Block("*", role=Role.LINEAR)])) == []


def test_autocast_and_bfloat16_weights_do_not_lower_the_precision_of_the_logits() -> None:
    module, x = Mixture().bfloat16(), torch.randn(5, 6, dtype=torch.bfloat16)
    seen: list[Routing] = []
    with RouterWatch(find_routers(module, LINEAR), seen.append), torch.autocast("cpu", dtype=torch.bfloat16):
        module(x)
    exact = x.double() @ module.router.weight.double().T + module.router.bias.double()
    torch.testing.assert_close(seen[0].logits.double(), exact, rtol=1e-5, atol=1e-5)


def test_integers_that_are_no_choice_of_experts_are_passed_over() -> None:
    class Talkative(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x)
            best = logits.topk(2).indices
            twice, beyond = torch.zeros_like(best), best + 4
            counts = torch.bincount(best.flatten(), minlength=4)
            return {"twice": twice, "beyond": beyond, "below": best - 4, "counts": counts, "best": best}

    module, x, seen = nn.Module(), torch.randn(5, 6), list[Routing]()
    module.router = Talkative(6, 4)
    with RouterWatch(find_routers(module, LINEAR), seen.append):
        best = module.router(x)["best"]
    assert torch.equal(seen[0].selected, best)
