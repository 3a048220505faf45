"""Inference of mixtures of experts and what is like one. Oracle: their definition, written beside each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_symopt import Role
from lit_symopt.errors import TaxonomyError
from tests.infer.small import blocks, roles, tokens


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = function


class Stacked(nn.Module):
    """k of E experts a token, as stacks `[E, d, I]` and `[E, I, d]` selected by index."""

    def __init__(self, experts: int, k: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.router = nn.Linear(8, experts, bias=False)
        self.into, self.outof = nn.Parameter(torch.randn(experts, 8, 12)), nn.Parameter(torch.randn(experts, 12, 8))
        self.bias = nn.Parameter(torch.randn(experts, 12))
        self.k = k

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        weights, chosen = self.router(x).softmax(-1).topk(self.k, -1)
        hidden = torch.einsum("btd,btkdi->btki", x, self.into[chosen]) + self.bias[chosen]
        out = torch.einsum("btki,btkid->btkd", F.gelu(hidden), self.outof[chosen])
        logits: Tensor = self.head(x + (out * weights[..., None]).sum(2))
        return logits


@pytest.mark.parametrize(("experts", "k"), [(4, 1), (4, 2), (1, 1), (3, 3)])
@pytest.mark.parametrize("shape", [(2, 5), (1, 1)])
def test_stacks_of_experts_whatever_their_number(experts: int, k: int, shape: tuple[int, int]) -> None:
    found = blocks(Stacked(experts, k), tokens(*shape))
    assert (found["router.weight"].role, found["router.weight"].symmetry.shift_invariant) == (Role.ROUTER, True)
    assert str(found["into"].layout) == "experts(transposed(stored='in_out'))"
    assert str(found["outof"].layout) == "experts(matrix(stored='in_out'))"
    assert (found["into"].role, found["outof"].role) == (Role.EXPERT_GATE_UP, Role.EXPERT_DOWN)
    assert found["bias"].along == "expert_gate_up"


class Listed(nn.Module):
    """Every expert sees every token; weights of those not chosen are zero."""

    def __init__(self, *, shift: float = 0.0) -> None:
        super().__init__()
        self.embed, self.router = nn.Embedding(11, 8), nn.Linear(8, 4)
        experts = (nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(4))
        self.experts: nn.Module = nn.ModuleList(experts)
        self.z_loss = shift

    def training_loss(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        logits = self.router(x)
        values, chosen = logits.topk(2, -1)
        weights = torch.full_like(logits, float("-inf")).scatter(-1, chosen, values).softmax(-1)
        out = torch.stack([expert(x) for expert in self.experts.children()], -2)
        x = x + (out * weights[..., None]).sum(-2)
        loss = F.cross_entropy((x @ self.embed.weight.T)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return loss + self.z_loss * logits.logsumexp(-1).square().mean() if self.z_loss else loss


class Gathered(Listed):
    """Every expert sees every token, and the outputs of those that were chosen are gathered."""

    def training_loss(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        out = torch.stack([expert(x) for expert in self.experts.children()], -2)
        out = out.gather(-2, chosen[..., None].expand(*chosen.shape, out.shape[-1]))
        x = x + (out * weights[..., None]).sum(-2)
        return F.cross_entropy((x @ self.embed.weight.T)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_gathering_outputs_of_several_experts_is_no_choice_among_the_units_of_one() -> None:
    found = roles(Gathered(), tokens(2, 6))
    assert found["router.weight"] == "router"
    assert {found[f"experts.{e}.0.weight"] for e in range(4)} == {"up"}
    assert {found[f"experts.{e}.2.weight"] for e in range(4)} == {"down"}


def test_weights_scattered_over_all_experts_come_from_a_router_too() -> None:
    found = blocks(Listed(), tokens(2, 5))
    assert found["embed.weight"].role is Role.TIED_EMBEDDING
    assert found["router.weight"].role is Role.ROUTER
    assert found["router.bias"].symmetry.shift_invariant
    assert {str(found[f"experts.{e}.{part}.weight"].role) for e in range(4) for part in (0, 2)} == {"up", "down"}
    assert {found[f"experts.{e}.2.bias"].along for e in range(4)} == {"residual"}


def test_experts_may_be_numbered_in_their_names() -> None:
    """As in Switch Transformers: a `ModuleDict` of `expert_0`, `expert_1`, ..."""

    class Named(Listed):
        def __init__(self) -> None:
            super().__init__()
            experts = {f"expert_{number}": expert for number, expert in enumerate(self.experts.children())}
            self.experts = nn.ModuleDict(experts)

    assert roles(Named(), tokens(2, 5))["router.weight"] == "router"


@pytest.mark.parametrize(
    ("before", "blind"),
    [
        (lambda z: z, True),
        (lambda z: z / 2, True),
        (lambda z: z + torch.arange(4.0), True),
        (lambda z: 5 * torch.tanh(z / 5), False),
        (lambda z: z.clamp(-5, 5), False),
        (lambda z: z.masked_fill(z.abs() > 3, -9.0), False),
    ],
)
def test_a_softmax_router_sees_a_shift_of_its_logits_if_something_before_the_softmax_does(
    before: Callable[[Tensor], Tensor], blind: bool
) -> None:
    module = Stacked(4, 2)
    module.router = nn.Sequential(module.router, Function(before))  # type: ignore[assignment]
    router = blocks(module, tokens(2, 5))["router.0.weight"]
    assert (router.role, router.symmetry.shift_invariant) == (Role.ROUTER, blind)


def test_a_z_loss_in_the_loss_is_seen_and_the_router_is_then_not_centered() -> None:
    found = blocks(Listed(shift=0.1), tokens(2, 5))
    assert found["router.weight"].z_loss
    assert found["router.bias"].z_loss
    assert not found["router.weight"].symmetry.shift_invariant


def test_a_logsumexp_that_is_only_logged_is_no_z_loss() -> None:
    class Logs(Listed):
        def training_loss(self, ids: Tensor) -> Tensor:
            self.seen = self.router(self.embed(ids)).logsumexp(-1).square().mean()
            return super().training_loss(ids)

    assert not blocks(Logs(), tokens(2, 5))["router.weight"].z_loss


def test_an_expert_that_no_token_chose_is_placed_by_the_others() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.experts[1](x)
            return out

    found = blocks(Sparse(), torch.randn(2, 8))
    for expert in range(3):
        assert [str(found[f"experts.{expert}.{part}.weight"].role) for part in (0, 2)] == ["up", "down"]
        assert found[f"experts.{expert}.0.bias"].along == "up"


# -- what is like a mixture and is none --------------------------------------------------------------------------


def _asked(module: nn.Module, batch: Tensor, words: str) -> None:
    with pytest.raises(TaxonomyError, match=words):
        blocks(module, batch)


def test_the_largest_in_time_of_each_unit_is_no_choice_among_units() -> None:
    """An exponential gate with a running maximum, as in xLSTM: four numbers for four heads, and no experts."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.value = nn.Linear(8, 4), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            gate = self.gate(x)
            weight = (gate - gate.max(1, keepdim=True).values).exp()
            out: Tensor = x + (self.value(x).unflatten(-1, (4, 2)) * weight[..., None]).flatten(-2)
            return out

    assert roles(Gated(), torch.randn(2, 5, 8))["gate.weight"] == "linear"


class Chosen(nn.Module):
    """`x` times something of the two largest of three outputs."""

    def __init__(self, weigh: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.choose, self.weigh = nn.Linear(8, 3, bias=False), weigh

    def forward(self, x: Tensor) -> Tensor:
        return x + x * self.weigh(self.choose(x).topk(2, -1).values)


def test_a_router_without_experts_is_asked_for_by_name() -> None:
    _asked(Chosen(lambda z: z.softmax(-1)[..., :1]), torch.randn(2, 8), r"'choose.weight' \(3, 8\): weighs activations")


def test_layers_are_no_experts_of_a_router_inside_one_of_them() -> None:
    layers = nn.Sequential(*(Chosen(lambda z: z.softmax(-1)[..., :1]) for _ in range(3)))
    _asked(layers, torch.randn(2, 8), r"'0.choose.weight' (.|\n)*'1.choose.weight' (.|\n)*'2.choose.weight'")


def test_choices_that_get_lost_are_asked_for_by_name() -> None:
    _asked(Chosen(lambda z: z.cumprod(-1)[..., :1]), torch.randn(2, 8), r"'choose.weight' \(3, 8\): has outputs that")


def test_one_matrix_for_routed_and_shared_experts_is_asked_for_by_name() -> None:
    """As in Inkling: its last row weighs an expert that every token sees, and that no top-k chooses."""

    class Shared(Stacked):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self.router = nn.Linear(8, 5, bias=False)
            self.shared = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            logits = self.router(x)
            chosen = logits[..., :4].sigmoid().topk(self.k, -1).indices
            logs = F.logsigmoid(torch.cat([logits[..., :4].gather(-1, chosen), logits[..., 4:]], -1))
            weights = (logs - logs.logsumexp(-1, keepdim=True)).exp()
            hidden = torch.einsum("btd,btkdi->btki", x, self.into[chosen]) + self.bias[chosen]
            out = torch.einsum("btki,btkid->btkd", F.gelu(hidden), self.outof[chosen])
            out = (out * weights[..., :-1, None]).sum(2) + self.shared(x) * weights[..., -1:]
            y: Tensor = self.head(x + out)
            return y

    _asked(Shared(), tokens(2, 5), r"'router.weight' \(5, 8\): weighs activations .* 5 experts .* not seen")


def test_a_stack_of_mlps_that_nothing_chooses_among_is_asked_for_by_name() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.outof = nn.Parameter(torch.randn(3, 12, 8)), nn.Parameter(torch.randn(3, 8, 12))

        def forward(self, x: Tensor) -> Tensor:
            hidden = (x.expand(3, -1, -1) @ self.into.mT).relu()
            out: Tensor = x + (hidden @ self.outof.mT).sum(0)
            return out

    _asked(Parallel(), torch.randn(5, 8), r"2 trainable parameter(.|\n)*'into' (.|\n)*'outof'")


def test_experts_that_are_rows_of_a_table_are_asked_for_by_name() -> None:
    """As in mixtures of a million experts (PEER): a top-k says which rows to look up; they are no tokens."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.choose, self.rows = nn.Linear(8, 6, bias=False), nn.Embedding(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            weights, chosen = self.choose(x).softmax(-1).topk(2, -1)
            out: Tensor = x + (self.rows(chosen) * weights[..., None]).sum(-2)
            return out

    _asked(Rows(), torch.randn(5, 8), r"'rows.weight' \(6, 8\): is used by a look-up of rows that activations choose")
