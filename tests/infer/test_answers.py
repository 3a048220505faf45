"""The hand-written answers against the gradient of the loss, which knows neither inference nor audit.

A continuous symmetry `W_i → exp(t·a_i) W_i` of a loss L leaves `Σ_i ⟨∂L/∂W_i, a_i W_i⟩ = 0` (Noether), so each answer
can be checked to rounding at one point, and an answer with the wrong heads, order or branch is off by order one.

Shape legend:  H heads, h head dimension, d features, E experts, I neurons.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_symopt.blocks import Action, Block, BlockTaxonomy, Layout, Role
from lit_symopt.objective import Objective
from tests.infer.answers.table import ANSWERS, answer
from tests.infer.modules import INSTANCES

# Torch's grouped matrix product knows no float64; the same models are here with other kernels.
NAMES = [name for name in INSTANCES if name not in ("mixtral", "deepseek_v3")]
RELU = ("t5", "t5_reglu", "opt", "torch_encoder")
EXACT, BROKEN = 2e-5, 1e-3


@dataclass(frozen=True, kw_only=True)
class Point:
    """The blocks of a module, its weights and the gradient of its loss there; `relu` lets positive scales pass."""

    relu: bool
    blocks: dict[str, Block]
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def role(self, *roles: Role) -> list[Block]:
        return [block for block in self.blocks.values() if block.role in roles]

    def nearest(self, block: Block, *roles: Role) -> list[Block]:
        """The blocks of these roles that share the longest prefix with a block's name: those of its module."""
        others = self.role(*roles)
        shared = [_shared(block.name, other.name) for other in others]
        return [other for other, length in zip(others, shared, strict=True) if length == max(shared)]

    def units(self, block: Block, layout: Layout | None = None) -> tuple[Tensor, ...]:
        """Weight and gradient of a block side by side, `[2, ..., units, features]`, the bias as one more feature."""
        layout = block.layout or Layout.matrix() if layout is None else layout
        pair = torch.stack([self.weights[block.name], self.gradients[block.name]])
        matrices = layout.to_matrices(pair, batch_dims=1)
        bias = block.name.removesuffix("weight") + "bias"
        if bias not in self.weights or block.role in (Role.DOWN, Role.ATTENTION_OUT):
            return matrices
        extra = torch.stack([self.weights[bias], self.gradients[bias]])
        return tuple(
            torch.cat([matrix, piece.view(*matrix.shape[:-1], 1)], -1)
            for matrix, piece in zip(matrices, extra.split([m[0, ..., 0].numel() for m in matrices], 1), strict=True)
        )

    def heads(self, block: Block) -> dict[str, Tensor]:
        """Queries, keys, values as `[2, H, h, d]`, from a block that holds one of them or all."""
        if block.role is not Role.QKV:
            return {str(block.role): self.units(block)[0]}
        layout: Any = block.layout
        if layout.stored == "in_out":  # seen as the linear map whose rows are outputs
            turned = replace(self, weights=_turned(self.weights, block), gradients=_turned(self.gradients, block))
            return turned.heads(replace(block, layout=replace(layout, stored="out_in")))
        names = ("query", "key", "value")
        order = _order(layout)
        bias = block.name.removesuffix("weight") + "bias"
        rows = [tensors[block.name][order] for tensors in (self.weights, self.gradients)]
        if bias in self.weights:
            tails = [tensors[bias][order] for tensors in (self.weights, self.gradients)]
            rows = [torch.cat([row, tail[:, None]], 1) for row, tail in zip(rows, tails, strict=True)]
        sizes = [layout.q * layout.head_dim, layout.kv * layout.head_dim, layout.kv * layout.head_dim]
        pieces = torch.stack(rows).split(sizes, 1)
        return {name: piece.unflatten(1, (-1, layout.head_dim)) for name, piece in zip(names, pieces, strict=True)}


def _shared(first: str, second: str) -> int:
    """The number of modules that enclose both parameters."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first.split("."), second.split("."), strict=False))))


def _turned(tensors: dict[str, Tensor], block: Block) -> dict[str, Tensor]:
    return {**tensors, block.name: tensors[block.name].mT}


def _order(layout: Any) -> Tensor:
    """The stored rows in the order all queries, all keys, all values."""
    count = (layout.q + 2 * layout.kv) * layout.head_dim
    rows = torch.arange(count, dtype=torch.float64)[:, None].expand(-1, 2)
    return torch.cat([part[:, 0] for part in layout.whole().to_matrices(rows)]).long()


def point(name: str) -> Point:
    instance = INSTANCES[name]
    module = instance.module().double()
    Objective(module, instance.batch()).loss().backward()
    blocks = {block.name: block for block in answer(name, module).assign(module)}
    parameters = dict(module.named_parameters())
    return Point(
        relu=name in RELU,
        blocks=blocks,
        weights={key: parameters[key].detach() for key in blocks},
        gradients={key: _gradient(parameters[key]) for key in blocks},
    )


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def moment(pair: Tensor) -> Tensor:
    """`G Wᵀ` of every matrix: its inner product with a is `⟨G, a W⟩`."""
    weight, gradient = pair
    product: Tensor = gradient @ weight.mT
    return product


def grouped(moments: Tensor, groups: int) -> Tensor:
    """Moments of query heads, summed over those that share a key head."""
    summed: Tensor = moments.unflatten(0, (groups, -1)).sum(1)
    return summed


def distance(first: Tensor, second: Tensor) -> float:
    """Relative to the larger of the two."""
    return float((first - second).norm() / torch.maximum(first.norm(), second.norm()).clamp_min(1e-30))


@pytest.fixture(params=NAMES, scope="module")
def here(request: pytest.FixtureRequest) -> Point:
    return point(request.param)


def test_values_and_the_output_of_attention_have_opposite_moments(here: Point) -> None:
    for out in here.role(Role.ATTENTION_OUT):
        fused = [block for block in here.nearest(out, Role.VALUE, Role.QKV) if "split" not in str(block.layout)]
        for block in fused:
            value = moment(here.heads(block)["value"])
            layout: Any = out.layout
            rows = here.units(out)[0] if layout.dim == "rows" else here.units(out)[0].mT
            assert distance(value, grouped(moment(rows), len(value)).mT) < EXACT, (block.name, out.name)


def test_queries_and_keys_have_the_moments_of_their_action(here: Point) -> None:
    gains = any(block.along in ("query", "key") and "norm" in block.name for block in here.role(Role.VECTOR))
    for out in here.role(Role.ATTENTION_OUT) if not gains else ():
        parts: dict[str, Tensor] = {}
        fused = here.nearest(out, Role.QUERY, Role.QKV)[0]
        if fused.acts is Action.NONE:
            continue
        for block in here.nearest(out, Role.QUERY, Role.KEY, Role.QKV):
            parts |= here.heads(block)
        key = moment(parts["key"])
        query = grouped(moment(parts["query"]), len(key))
        if fused.acts is Action.GENERAL_LINEAR:
            assert distance(query, key.mT) < EXACT, fused.name
            continue
        assert distance(query, key.mT) > BROKEN, f"{fused.name}: without rotary embedding, by its gradient"
        turned = fused.rotary_dim or query.shape[-1]
        assert distance(*_planes(query, key, turned, fused.acts)) < EXACT, fused.name
        assert distance(query[:, turned:, turned:], key[:, turned:, turned:].mT) < EXACT, fused.name
        other = Action.ROTARY_NEIGHBORS if fused.acts is Action.ROTARY_HALVES else Action.ROTARY_HALVES
        if turned > 2:
            assert distance(*_planes(query, key, turned, other)) > BROKEN, f"{fused.name}: {other} as well"


def _planes(query: Tensor, key: Tensor, turned: int, action: Action) -> tuple[Tensor, Tensor]:
    """What a rotation and a scale of each plane see: `M_ab - M_ba` opposite, the trace alike in queries and keys."""
    step = turned // 2 if action is Action.ROTARY_HALVES else 1
    first = torch.arange(turned // 2) if action is Action.ROTARY_HALVES else torch.arange(0, turned, 2)
    second = first + step

    def skew(m: Tensor) -> Tensor:
        return m[:, first, second] - m[:, second, first]

    def trace(m: Tensor) -> Tensor:
        return m[:, first, first] + m[:, second, second]

    return torch.cat([skew(query), trace(query)]), torch.cat([-skew(key), trace(key)])


def test_up_and_down_have_the_moments_of_their_action(here: Point) -> None:
    downs = here.role(Role.DOWN, Role.EXPERT_DOWN)
    for down in downs:
        upward = (Role.UP, Role.GATE_UP) if down.role is Role.DOWN else (Role.EXPERT_GATE_UP,)
        (block,) = here.nearest(down, *upward)
        units = here.units(block)[0]
        gate, up = units.unbind(-3) if block.role is not Role.UP else (None, units)
        norms = [(pair[0] * pair[1]).sum(-1) for pair in (up, here.units(down)[0])]
        if not here.gradients[down.name].any():
            continue  # an expert without tokens
        if down.acts is Action.MONOMIAL:
            assert distance(*norms) < EXACT, block.name
        elif not here.relu:
            assert distance(*norms) > BROKEN, f"{block.name}: also scales"
        if gate is not None and not here.relu:
            assert distance((gate[0] * gate[1]).sum(-1), norms[1]) > BROKEN, f"{block.name}: gate and up are alike"
        gated = block.role is Role.UP and down.acts is Action.MONOMIAL and not here.relu
        for other in here.nearest(down, Role.GATE) if gated else ():
            gate = here.units(other)[0]
            assert distance((gate[0] * gate[1]).sum(-1), norms[1]) > BROKEN, f"{other.name}: it is an up"


def test_a_shift_is_invisible_exactly_where_the_answer_says_so(here: Point) -> None:
    for block in here.role(Role.LM_HEAD, Role.TIED_EMBEDDING, Role.ROUTER):
        gradient = here.gradients[block.name]
        seen = float(gradient.sum(0).norm() / gradient.norm())
        assert (seen < EXACT) if block.symmetry.shift_invariant else (seen > BROKEN), block.name
    for block in here.role(Role.VECTOR):
        if block.along in ("lm_head", "tied_embedding", "router"):
            gradient = here.gradients[block.name]
            seen = float(gradient.sum().abs() / gradient.norm())
            assert (seen < EXACT) if block.symmetry.shift_invariant else (seen > BROKEN), block.name


def test_every_parameter_of_an_answer_is_used(here: Point) -> None:
    """A gradient of zero would satisfy every identity above."""
    unused = [name for name, gradient in here.gradients.items() if not gradient.any()]
    assert [name for name in unused if ".experts.3." not in name] == []  # one of the listed experts sees no token


@pytest.mark.parametrize(
    ("name", "pattern", "change"),
    [
        ("gpt_neox", "*.query_key_value.weight", {"layout": Layout.qkv(3, 3, 8, order="stacked")}),
        ("llama", "*.v_proj.weight", {"layout": Layout.heads(1)}),
        ("capped_decoder", "qkv.weight", {"layout": Layout.qkv(6, 6, 4, order="stacked", stored="in_out")}),
    ],
)
def test_the_moments_of_a_wrong_answer_disagree(name: str, pattern: str, change: dict[str, Any]) -> None:
    right = ANSWERS[name]
    wrong = [replace(block, **change) if block.name == pattern else block for block in right.blocks]
    here = point(name)
    module = INSTANCES[name].module()
    blocks = {block.name: block for block in BlockTaxonomy(wrong).assign(module)}
    with pytest.raises((AssertionError, RuntimeError)):
        test_values_and_the_output_of_attention_have_opposite_moments(replace(here, blocks=blocks))
