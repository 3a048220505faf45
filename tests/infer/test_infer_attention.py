"""Inference of attentions whose blocks follow from their definition. Oracle: that definition, written beside each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_symopt import Role
from lit_symopt.blocks import Action
from lit_symopt.errors import TaxonomyError
from tests.infer.small import blocks


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
            out = (out.unflatten(-1, (2, 4)) * torch.sigmoid(self.gate(x)).unflatten(-1, (2, -1))).flatten(-2)
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


@pytest.mark.parametrize(("rows", "action"), [(8, Action.NONE), (2, Action.GENERAL_LINEAR)])
def test_a_gate_lies_along_the_heads_and_values_mix_only_if_it_is_one_number_a_head(rows: int, action: Action) -> None:
    found = blocks(Attention(on_out=nn.Linear(8, rows)), torch.randn(3, 5, 8))
    assert found["v.weight"].acts is found["o.weight"].acts is action
    assert (found["gate.weight"].role, found["gate.weight"].along) == (Role.LINEAR, "heads")
    assert found["gate.bias"].along == "linear"


def test_a_bias_with_one_number_for_several_rows_of_a_map_does_not_lie_along_its_rows() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map, self.bias = nn.Linear(8, 8, bias=False), nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = (self.map(x).unflatten(-1, (2, 4)) + self.bias[:, None]).flatten(-2)
            return out

    found = blocks(Attention(on_out=Gate()), torch.randn(3, 5, 8))
    assert (found["gate.map.weight"].along, found["gate.bias"].along) == ("heads", None)


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


def test_an_attention_whose_queries_cannot_be_followed_is_asked_for_by_name() -> None:
    """No rule follows a running sum of features; the projections before it must not pass for plain linear maps."""
    with pytest.raises(TaxonomyError, match=r"'o.weight' \(8, 8\): reads an attention whose queries or keys could not"):
        blocks(Attention(on_keys=lambda x: x.cumsum(-1)), torch.randn(3, 5, 8))


def test_sines_and_cosines_may_be_looked_up_in_a_frozen_table() -> None:
    class Table(nn.Module):
        """RoFormer: angles of pairs (2i, 2i + 1), looked up by position."""

        def __init__(self) -> None:
            super().__init__()
            self.angles = nn.Embedding(5, 2)
            self.angles.weight.requires_grad_(False)
            self.attention = Attention(on_keys=self.turn)

        def turn(self, x: Tensor) -> Tensor:
            angles = self.angles(torch.arange(x.shape[-2]))
            sin, cos = (part.repeat_interleave(2, -1) for part in (angles.sin(), angles.cos()))
            other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
            y: Tensor = x * cos + other * sin
            return y

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x)
            return out

    found = blocks(Table(), torch.randn(3, 5, 8))
    assert found["attention.q.weight"].acts is found["attention.k.weight"].acts is Action.ROTARY_NEIGHBORS
