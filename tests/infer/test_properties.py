"""What inference must not depend on, and what it must leave alone. The oracle is the hand-written answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lit_symopt.blocks import BlockTaxonomy
from lit_symopt.errors import SymOptError
from lit_symopt.objective import Objective
from tests.infer.answers.table import answer
from tests.infer.batches import ids
from tests.infer.modules import INSTANCES
from tests.infer.plain import LitEncoder
from tests.infer.test_architectures import by_name, differences, stated

SOME = ("llama", "gpt2", "mixtral_eager", "torch_encoder", "listed_experts_sigmoid", "olmoe_router_losses")


def assert_right(name: str, module: nn.Module, batch: Any = None) -> None:
    """Inference on this module, an instance changed in a way that moves no parameter, equals the instance's answer."""
    inferred = BlockTaxonomy.infer(module, INSTANCES[name].batch() if batch is None else batch)
    assert differences(inferred, answer(name, module), module) == []


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("training", [True, False])
def test_a_module_is_left_bitwise_as_it_was(name: str, training: bool) -> None:
    instance = INSTANCES[name]
    module = instance.module().train(training)
    next(module.parameters()).requires_grad_(False)
    first = list(module.parameters())[1]
    first.grad = torch.ones_like(first)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    random = torch.get_rng_state()
    modes = [child.training for child in module.modules()]
    trainable = [parameter.requires_grad for parameter in module.parameters()]
    hooks = [(len(child._forward_hooks), len(child._forward_pre_hooks)) for child in module.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()

    BlockTaxonomy.infer(module, instance.batch())

    after = module.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [child.training for child in module.modules()] == modes
    assert [parameter.requires_grad for parameter in module.parameters()] == trainable
    assert [(len(child._forward_hooks), len(child._forward_pre_hooks)) for child in module.modules()] == hooks
    assert [p.grad is None for p in module.parameters()] == [p is not first for p in module.parameters()]
    assert torch.equal(first.grad, torch.ones_like(first))
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", SOME)
def test_eval_mode_and_no_grad_make_no_difference(name: str) -> None:
    with torch.no_grad():
        assert_right(name, INSTANCES[name].module().eval())


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_precision_of_the_weights_makes_no_difference(name: str, dtype: torch.dtype) -> None:
    assert_right(name, INSTANCES[name].module().to(dtype))


def test_dropout_makes_no_difference() -> None:
    assert_right("torch_encoder", LitEncoder(dropout=0.3).train())
    gpt2 = INSTANCES["gpt2"].module().train()
    for child in gpt2.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.2
    assert_right("gpt2", gpt2)


def test_the_order_of_norms_makes_no_difference() -> None:
    assert_right("torch_encoder", LitEncoder(dropout=0.0, norm_first=True))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral_eager", "vit"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_makes_no_difference(name: str, reentrant: bool) -> None:
    module: Any = INSTANCES[name].module().train()
    module.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_right(name, module)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "phi3", "falcon_multi_query"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_kernel_makes_no_difference(name: str, attention: str) -> None:
    module: Any = INSTANCES[name].module()
    module.set_attn_implementation(attention)
    assert_right(name, module)


@pytest.mark.parametrize("name", ["llama", "mixtral_eager", "listed_experts_sigmoid", "listed_experts_softmax"])
def test_two_tokens_are_enough(name: str) -> None:
    """Most experts see none of them; their structure is that of the others."""
    batch = INSTANCES[name].batch()
    few = batch["input_ids"][:1, :2] if isinstance(batch, dict) else batch[:1, :2]
    assert_right(name, INSTANCES[name].module(), {"input_ids": few} if isinstance(batch, dict) else few)


@pytest.mark.parametrize(("sequences", "tokens"), [(4, 5), (5, 4), (2, 2), (6, 6), (1, 24)])
@pytest.mark.parametrize("name", ["llama", "mixtral_eager", "gpt2"])
def test_a_batch_whose_sizes_equal_those_of_the_model_makes_no_difference(
    name: str, sequences: int, tokens: int
) -> None:
    """Heads, key heads, experts and head dimension are 4, 2, 5 and 6 in these models."""
    tokens = min(tokens, 16) if name == "gpt2" else tokens
    batch = torch.randint(53, (sequences, tokens), generator=torch.Generator().manual_seed(5))
    assert_right(name, INSTANCES[name].module(), {"input_ids": batch})


@pytest.mark.parametrize("name", SOME)
def test_inference_is_deterministic(name: str) -> None:
    instance = INSTANCES[name]
    module = instance.module()
    first, second = (BlockTaxonomy.infer(module, instance.batch()).blocks for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("frozen", ["half", "all but the last"])
def test_frozen_parameters_need_no_block_and_change_no_other(name: str, frozen: str) -> None:
    instance = INSTANCES[name]
    module = instance.module()
    parameters = list(module.parameters())
    stay = parameters[1::2] if frozen == "half" else parameters[-1:]
    for parameter in parameters:
        parameter.requires_grad_(any(parameter is kept for kept in stay))

    inferred = by_name(BlockTaxonomy.infer(module, instance.batch()), module)

    whole = instance.module()
    right = by_name(answer(name, whole), whole)
    assert sorted(inferred) == sorted(name for name, p in module.named_parameters() if p.requires_grad)
    # The block a bias belongs to, or the gate of an MLP, may be frozen: facts are spelled out with the answer's.
    said = {name: stated(block, {**right, **inferred}) for name, block in inferred.items()}
    assert said == {name: stated(right[name], right) for name in inferred}


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def training_loss(self, batch: Any) -> torch.Tensor:
        return Objective(self.inner, batch).loss()


class LitWrapper(L.LightningModule):
    """What a user writes around a model of transformers; the model computes the loss."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.inner(**{"labels": batch.get("input_ids"), **batch}).loss
        self.log("train/loss", loss)
        return loss


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("listed_experts_softmax", Wrapper),
        *((name, kind) for name in ("llama", "gpt2", "mixtral", "vit") for kind in (Wrapper, LitWrapper)),
    ],
)
def test_a_wrapper_only_adds_its_prefix(name: str, kind: Callable[[nn.Module], Any]) -> None:
    instance = INSTANCES[name]
    module = kind(instance.module())
    inferred = BlockTaxonomy.infer(module, instance.batch())
    assert differences(inferred, answer(name, module.inner).under("inner."), module) == []


CASES: dict[str, Callable[[], nn.Module]] = {
    "a causal model": INSTANCES["llama"].build,
    "a module of ours": INSTANCES["capped_decoder"].build,
}


@pytest.mark.parametrize("case", CASES)
def test_a_module_without_storage_is_refused_with_the_reason(case: str) -> None:
    with torch.device("meta"):
        module = CASES[case]()
    batch = {"input_ids": ids()} if case == "a causal model" else ids()
    with pytest.raises(SymOptError, match="meta"):
        BlockTaxonomy.infer(module, batch)
