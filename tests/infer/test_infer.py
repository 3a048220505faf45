"""Inference on small modules whose blocks follow from their definition. Oracle: that definition, written beside each.

The architectures of `tests/infer/modules.py` are tested in `test_architectures.py`; here are the cases they lack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_symopt import Block, BlockTaxonomy, Role
from lit_symopt.blocks import Action
from lit_symopt.infer import infer
from lit_symopt.layout import Layout


def roles(module: nn.Module, batch: Any) -> dict[str, str]:
    return {block.name: str(block.role) for block in infer(module, batch).blocks}


def blocks(module: nn.Module, batch: Any) -> dict[str, Block]:
    return {block.name: block for block in infer(module, batch).blocks}


def tokens(*shape: int) -> Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """`x + f(x)`."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.function(self, x)
        return out


# -- MLPs --------------------------------------------------------------------------------------------------------


def test_glu_activates_the_second_half_and_then_only_what_acts_on_both_halves_alike_is_said() -> None:
    """`torch.nn.functional.glu(a, b) = a * sigmoid(b)`: the gate is stored last."""
    module = Residual(lambda m, x: m.down(F.glu(m.fused(x))), fused=nn.Linear(8, 24), down=nn.Linear(12, 8))
    found = blocks(module, torch.randn(3, 8))
    assert (found["fused.weight"].role, str(found["fused.weight"].layout)) == (Role.GATE_UP, "gate_up('stacked')")
    assert found["fused.weight"].acts is found["down.weight"].acts is Action.PERMUTATION
    assert found["fused.bias"].along == "gate_up"


def test_interleaved_gate_and_up_rows_are_told_from_stacked_ones() -> None:
    def swiglu(m: Any, x: Tensor) -> Tensor:
        pair = m.fused(x).unflatten(-1, (12, 2))
        out: Tensor = m.down(F.silu(pair[..., 0]) * pair[..., 1])
        return out

    found = blocks(Residual(swiglu, fused=nn.Linear(8, 24), down=nn.Linear(12, 8)), torch.randn(3, 8))
    assert str(found["fused.weight"].layout) == "gate_up('interleaved')"
    assert found["fused.weight"].acts is Action.MONOMIAL


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (lambda x: x * torch.sigmoid(1.7 * x), {"a.weight": "up", "b.weight": "down"}),
        (lambda x: x.clamp(min=0), {"a.weight": "up", "b.weight": "down"}),
        (lambda x: x.relu().square(), {"a.weight": "up", "b.weight": "down"}),
        (lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), {"a.weight": "up", "b.weight": "down"}),
        (lambda x: x * (x > 0), {"a.weight": "up", "b.weight": "down"}),
        (lambda x: torch.where(x > 0, x, 0.1 * x), {"a.weight": "up", "b.weight": "down"}),
        (lambda x: x.masked_fill(x < 0, 0.0), {"a.weight": "up", "b.weight": "down"}),
        (lambda x: torch.maximum(x, 0.1 * x), {"a.weight": "up", "b.weight": "down"}),
        (lambda x: 3 * x, {"a.weight": "linear", "b.weight": "linear"}),
        (lambda x: F.rms_norm(x, (12,)), {"a.weight": "linear", "b.weight": "linear"}),
    ],
)
def test_an_mlp_needs_an_activation_however_it_is_written(
    activation: Callable[[Tensor], Tensor], expected: dict[str, str]
) -> None:
    module = Residual(
        lambda m, x: m.b(activation(m.a(x))), a=nn.Linear(8, 12, bias=False), b=nn.Linear(12, 8, bias=False)
    )
    assert roles(module, torch.randn(3, 8)) == expected


def test_neurons_that_something_else_reads_too_are_not_free_to_change_places() -> None:
    def leaks(m: Any, x: Tensor) -> Tensor:
        hidden = m.a(x).relu()
        out: Tensor = m.b(hidden) + hidden
        return out

    module = Residual(leaks, a=nn.Linear(8, 8, bias=False), b=nn.Linear(8, 8, bias=False))
    assert roles(module, torch.randn(3, 8)) == {"a.weight": "linear", "b.weight": "linear"}


# -- attention ---------------------------------------------------------------------------------------------------


def test_separate_projections_of_different_widths_share_one_bias() -> None:
    """`nn.MultiheadAttention(kdim, vdim)` has three weights and `in_proj_bias`, and here an extra key and value."""
    attention = nn.MultiheadAttention(12, 3, kdim=7, vdim=8, batch_first=True, add_bias_kv=True)
    found = blocks(attention, (torch.randn(2, 5, 12), torch.randn(2, 4, 7), torch.randn(2, 4, 8)))
    assert [str(found[f"{name}_proj_weight"].role) for name in "qkv"] == ["query", "key", "value"]
    assert {str(found[f"{name}_proj_weight"].layout) for name in "qkv"} == {"heads(3, dim='rows')"}
    assert found["in_proj_bias"].along == "qkv"
    assert (found["bias_k"].along, found["bias_v"].along) == ("key", "value")


def test_encoder_and_decoder_of_torch() -> None:
    module = nn.Transformer(12, 2, 1, 1, 20, batch_first=True).eval()
    found = blocks(module, (torch.randn(2, 5, 12), torch.randn(2, 4, 12)))
    crossed = found["decoder.layers.0.multihead_attn.in_proj_weight"]
    assert str(crossed.layout) == "qkv(2, 2, 6, order='stacked')"
    assert crossed.acts is Action.GENERAL_LINEAR
    assert found["decoder.layers.0.norm3.weight"].along == "residual"


class Attention(nn.Module):
    """Two heads of four dimensions without rotary embedding, with something done to q, k or the values."""

    def __init__(self, *, on_keys: Callable[[Tensor], Tensor] | None = None, on_out: nn.Module | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.on_keys = on_keys or (lambda x: x)
        self.gate = on_out

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(self.on_keys(q), self.on_keys(k), v).transpose(1, 2).flatten(2)
        if self.gate is not None:
            out = out * torch.sigmoid(self.gate(x))
        y: Tensor = x + self.o(out)
        return y


@pytest.mark.parametrize(
    ("on_keys", "action"),
    [
        (None, Action.GENERAL_LINEAR),
        (lambda x: F.normalize(x, dim=-1), Action.NONE),
        (lambda x: F.rms_norm(x, (4,)), Action.NONE),
        (lambda x: x.clamp(-3, 3), Action.NONE),
        (lambda x: x * torch.linspace(1, 2, 4), Action.NONE),
        (lambda x: x * 0.5, Action.GENERAL_LINEAR),
    ],
)
def test_queries_and_keys_mix_freely_only_where_nothing_but_numbers_touches_them(
    on_keys: Callable[[Tensor], Tensor] | None, action: Action
) -> None:
    found = blocks(Attention(on_keys=on_keys), torch.randn(3, 5, 8))
    assert found["q.weight"].acts is found["k.weight"].acts is action


def test_values_do_not_mix_where_their_mean_is_gated() -> None:
    found = blocks(Attention(on_out=nn.Linear(8, 8)), torch.randn(3, 5, 8))
    assert found["v.weight"].acts is found["o.weight"].acts is Action.NONE
    assert found["gate.weight"].role is Role.LINEAR


def test_values_do_not_mix_where_something_else_reads_them() -> None:
    class Watched(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.watch = nn.Linear(8, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x) * torch.sigmoid(self.watch(self.v(x)))
            return y

    found = blocks(Watched(), torch.randn(3, 5, 8))
    assert found["v.weight"].acts is found["o.weight"].acts is Action.NONE
    assert found["q.weight"].acts is Action.GENERAL_LINEAR


def test_low_rank_updates_of_a_projection_write_the_same_heads() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.base(x) + 2 * self.b(self.a(x))
            return out

    module = Attention()
    module.q = Adapted()  # type: ignore[assignment]
    found = blocks(module, torch.randn(3, 5, 8))
    assert {str(found[f"q.{name}.weight"].layout) for name in ("base", "b")} == {"heads(2, dim='rows')"}
    assert found["q.a.weight"].role is Role.LINEAR
    assert found["q.base.bias"].along == "query"


def test_learned_numbers_on_the_scores_lie_along_the_heads() -> None:
    class Sinks(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.sinks = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
            scores = torch.cat([q @ k.mT, self.sinks.view(1, 2, 1, 1).expand(len(x), 2, x.shape[1], 1)], -1)
            out: Tensor = self.o((scores.softmax(-1)[..., :-1] @ v).transpose(1, 2).flatten(2))
            return x + out

    found = blocks(Sinks(), torch.randn(3, 5, 8))
    assert found["sinks"].along == "heads"
    assert str(found["o.weight"].layout) == "heads(2, dim='columns')"


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = function


# -- mixtures ----------------------------------------------------------------------------------------------------


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
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(4))
        self.z_loss = shift

    def training_loss(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        logits = self.router(x)
        values, chosen = logits.topk(2, -1)
        weights = torch.full_like(logits, float("-inf")).scatter(-1, chosen, values).softmax(-1)
        out = torch.stack([expert(x) for expert in self.experts], -2)
        x = x + (out * weights[..., None]).sum(-2)
        loss = F.cross_entropy((x @ self.embed.weight.T)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return loss + self.z_loss * logits.logsumexp(-1).square().mean() if self.z_loss else loss


def test_weights_scattered_over_all_experts_come_from_a_router_too() -> None:
    found = blocks(Listed(), tokens(2, 5))
    assert found["embed.weight"].role is Role.TIED_EMBEDDING
    assert found["router.weight"].role is Role.ROUTER
    assert found["router.bias"].symmetry.shift_invariant
    assert {str(found[f"experts.{e}.{part}.weight"].role) for e in range(4) for part in (0, 2)} == {"up", "down"}
    assert {found[f"experts.{e}.2.bias"].along for e in range(4)} == {"residual"}


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
    module.router = nn.Sequential(module.router, _Function(before))  # type: ignore[assignment]
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


# -- heads and losses --------------------------------------------------------------------------------------------


class Lit(L.LightningModule):
    def __init__(self, net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self.net(x), y)


def _by_hand(logits: Tensor, classes: Tensor) -> Tensor:
    return (logits.logsumexp(-1) - logits.gather(-1, classes[:, None]).squeeze(-1)).mean()


@pytest.mark.parametrize(
    ("loss", "head", "shift"),
    [
        (F.cross_entropy, "lm_head", True),
        (_by_hand, "lm_head", True),
        (lambda z, y: z.logsumexp(-1).mean(), "linear", False),  # an energy: every shift is seen
        (lambda z, y: F.nll_loss(F.log_softmax(2 * z, -1), y), "lm_head", True),
        (lambda z, y: F.cross_entropy(3 * torch.tanh(z / 3), y), "lm_head", False),
        (lambda z, y: F.cross_entropy(z.clamp(-3, 3), y), "lm_head", False),
        (lambda z, y: F.cross_entropy(z, y) + 0.1 * z.logsumexp(-1).pow(2).mean(), "lm_head", False),
        (lambda z, y: F.mse_loss(z[:, 0], y.float()), "linear", False),
    ],
)
def test_the_loss_tells_the_head_and_whether_it_sees_a_shift_of_all_logits(
    loss: Callable[[Tensor, Tensor], Tensor], head: str, shift: bool
) -> None:
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5))
    found = blocks(Lit(net, loss), (torch.randn(6, 8), torch.arange(6) % 5))
    if head == "linear":  # the last map is then the second one of the MLP
        assert found["net.2.weight"].role is Role.DOWN
        return
    assert str(found["net.2.weight"].role) == head
    assert found["net.2.weight"].symmetry.shift_invariant == found["net.2.bias"].symmetry.shift_invariant == shift
    assert found["net.0.weight"].role is Role.LINEAR


def test_a_top_k_accuracy_in_a_training_step_makes_no_router() -> None:
    def with_accuracy(logits: Tensor, classes: Tensor) -> Tensor:
        hits = (logits.topk(2, -1).indices == classes[:, None]).any(-1).float().mean()
        return F.cross_entropy(logits, classes) + 0 * hits

    found = roles(Lit(nn.Linear(8, 5), with_accuracy), (torch.randn(6, 8), torch.arange(6) % 5))
    assert found == {"net.weight": "lm_head", "net.bias": "vector"}


# -- everything else ---------------------------------------------------------------------------------------------


def test_convolutions_and_their_norms() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    found = blocks(Lit(net, F.cross_entropy), (torch.randn(2, 3, 9, 9), torch.arange(2)))
    assert (found["net.0.weight"].role, str(found["net.0.weight"].layout)) == (Role.CONV, "flatten()")
    assert {found[f"net.{name}"].along for name in ("0.bias", "1.weight", "1.bias")} == {"conv"}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_linear_maps(kind: type[nn.LSTM] | type[nn.GRU]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.cells, self.head = nn.Embedding(11, 6), kind(6, 7), nn.Linear(7, 11)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.cells(self.embed(ids))[0])
            return out

    found = roles(Recurrent(), tokens(2, 5))
    assert {role for name, role in found.items() if name.startswith("cells.weight")} == {"linear"}
    assert (found["embed.weight"], found["head.weight"]) == ("embedding", "lm_head")


def test_no_name_is_read() -> None:
    """The same module with its names exchanged has the same roles in the same order."""

    class Named(nn.Module):
        def __init__(self, names: tuple[str, ...]) -> None:
            super().__init__()
            self.names = names
            parts = [nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)]
            for name, part in zip(names, parts, strict=True):
                self.add_module(name, part)

        def forward(self, x: Tensor) -> Tensor:
            gate, up, down = (getattr(self, name) for name in self.names)
            out: Tensor = x + down(F.silu(gate(x)) * up(x))
            return out

    plain = roles(Named(("gate", "up", "down")), torch.randn(2, 8))
    mixed = roles(Named(("lm_head", "router", "q_proj")), torch.randn(2, 8))
    assert list(plain.values()) == list(mixed.values()) == ["gate", "up", "down"]


def test_a_compiled_module_is_followed_as_it_is() -> None:
    module = Residual(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(8, 12), b=nn.Linear(12, 8))
    compiled = torch.compile(module, backend="eager")
    plain, found = roles(module, torch.randn(3, 8)), roles(compiled, torch.randn(3, 8))  # type: ignore[arg-type]
    assert {name.removeprefix("_orig_mod."): role for name, role in found.items()} == plain


def test_known_blocks_go_before_what_was_seen() -> None:
    module = Residual(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(8, 8, bias=False), b=nn.Linear(8, 8, bias=False))
    given = Block("*.weight", role=Role.LINEAR, layout=Layout.matrix())
    assert {block.role for block in infer(module, torch.randn(2, 8), known=[given]).blocks} == {Role.LINEAR}


def test_the_taxonomy_says_that_it_was_inferred_and_for_what() -> None:
    assert infer(nn.Linear(3, 2), torch.randn(1, 3)).name == "inferred for Linear"
    assert repr(BlockTaxonomy.infer(nn.Linear(3, 2), torch.randn(1, 3))).startswith("BlockTaxonomy(2 blocks")
