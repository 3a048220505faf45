"""A decoder of plain torch that has every part an audit acts on, and its blocks, written down by hand.

All its arithmetic is in the dtype of its weights, so that a float64 copy keeps symmetries to 1e-10 and better.

Shape legend:  B sequences, T tokens, V vocabulary, d width, H heads, K key and value heads, h head dimension,
               I neurons, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

from lit_symopt import Block, BlockTaxonomy, Layout, Role
from lit_symopt.blocks import Action

V, D, H, K, HEAD, NEURONS, E = 37, 20, 4, 2, 6, 14, 4


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding of the first 4 dimensions of each head, biases and sinks."""

    def __init__(self, *, norms: bool) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(D, H * HEAD), nn.Linear(H * HEAD, D)
        self.k, self.v = nn.Linear(D, K * HEAD), nn.Linear(D, K * HEAD)
        self.sinks = nn.Parameter(torch.zeros(H))
        self.norms = nn.ModuleDict({"q": nn.RMSNorm(HEAD), "k": nn.RMSNorm(K * HEAD)} if norms else {})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x).unflatten(-1, (H, HEAD)), self.k(x), self.v(x).unflatten(-1, (K, HEAD))
        if self.norms:
            q, k = self.norms["q"](q), self.norms["k"](k)
        k = k.unflatten(-1, (K, HEAD))
        q, k, v = (y.transpose(1, 2).repeat_interleave(H // y.shape[2], 1) for y in (self.turned(q), self.turned(k), v))
        scores = (q @ k.mT / HEAD**0.5).masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -torch.inf)
        sinks = self.sinks.view(1, H, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        y: Tensor = self.o((weights @ v).transpose(1, 2).flatten(2))
        return y

    @staticmethod
    def turned(x: Tensor) -> Tensor:
        """Planes (0, 2) and (1, 3) of each head."""
        angle = torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, 1, 1) * torch.tensor([1.0, 0.1], dtype=x.dtype)
        a, b, rest = x[..., :2], x[..., 2:4], x[..., 4:]
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos(), rest], -1)


class MLP(nn.Module):
    """SwiGLU with biases, gate and up fused by turns."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.down = nn.Linear(D, 2 * NEURONS), nn.Linear(NEURONS, D)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fused(x).unflatten(-1, (NEURONS, 2)).unbind(-1)
        y: Tensor = self.down(silu(gate) * up)
        return y


class Mixture(nn.Module):
    """The best two of four experts, stored as stacks, with a bias that only the selection sees."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.gate_up = nn.Parameter(torch.randn(E, 2 * NEURONS, D) * D**-0.5)
        self.down = nn.Parameter(torch.randn(E, D, NEURONS) * NEURONS**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(E, D))
        self.register_buffer("selection", torch.zeros(E))
        self.selection: Tensor

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        chosen = (logits.softmax(-1) + self.selection).topk(2, dim=-1).indices
        weights = torch.zeros_like(logits).scatter(-1, chosen, logits.gather(-1, chosen).softmax(-1))
        gate, up = torch.einsum("ejd,btd->btej", self.gate_up, x).chunk(2, -1)
        out = torch.einsum("edj,btej->bted", self.down, silu(gate) * up) + self.down_bias
        return (weights.unsqueeze(-1) * out).sum(2)


class Decoder(nn.Module):
    """One layer of everything: attention, an MLP, a mixture.

    Args:
        tied: the head is the embedding, without a bias.
        cap: soft cap of the logits.
        norms: of queries (per head) and keys (full width).
    """

    def __init__(self, *, tied: bool = False, cap: float | None = None, norms: bool = False) -> None:
        super().__init__()
        self.cap = cap
        self.tokens = nn.Embedding(V, D)
        self.attention, self.mlp, self.mixture = Attention(norms=norms), MLP(), Mixture()
        self.norm = nn.ModuleList(nn.RMSNorm(D) for _ in range(4))
        self.head = nn.Linear(D, V, bias=not tied)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for norm, part in zip(self.norm, (self.attention, self.mlp, self.mixture), strict=False):
            x = x + part(norm(x))
        logits: Tensor = self.head(self.norm[3](x))
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()

    def training_loss(self, ids: Tensor) -> Tensor:
        """Next-token cross-entropy."""
        return cross_entropy(self(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def decoder(**options: Any) -> Decoder:
    """A decoder with seeded weights."""
    torch.manual_seed(0)
    return Decoder(**options)


def batch() -> Tensor:
    """Token ids `[3, 9]`."""
    return torch.randint(V, (3, 9), generator=torch.Generator().manual_seed(1))


def blocks(model: Decoder) -> list[Block]:
    """What the parameters of a decoder are."""
    rotary = {"action": Action.ROTARY_HALVES, "rotary_dim": 4}
    heads, keys = Layout.heads(H), Layout.heads(K)
    tied = model.head.weight is model.tokens.weight
    found = [
        Block("tokens.weight", role=Role.TIED_EMBEDDING if tied else Role.EMBEDDING),
        Block("attention.q.weight", role=Role.QUERY, layout=heads, **rotary),  # type: ignore[arg-type]
        Block("attention.k.weight", role=Role.KEY, layout=keys, **rotary),  # type: ignore[arg-type]
        Block("attention.v.weight", role=Role.VALUE, layout=keys),
        Block("attention.o.weight", role=Role.ATTENTION_OUT, layout=Layout.heads(H, dim="columns")),
        Block("attention.?.bias", role=Role.VECTOR),
        Block("attention.sinks", role=Role.VECTOR, along="heads"),
        Block("mlp.fused.weight", role=Role.GATE_UP, layout=Layout.gate_up("interleaved")),
        Block("mlp.down.weight", role=Role.DOWN, layout=Layout.transposed()),
        Block("mlp.*.bias", role=Role.VECTOR),
        Block("mixture.router.weight", role=Role.ROUTER),
        Block("mixture.router.bias", role=Role.VECTOR, shift_invariant=False),  # the selection's bias sees no logits
        Block("mixture.gate_up", role=Role.EXPERT_GATE_UP, layout=Layout.experts(Layout.gate_up("stacked"))),
        Block("mixture.down", role=Role.EXPERT_DOWN, layout=Layout.experts(Layout.transposed())),
        Block("mixture.down_bias", role=Role.VECTOR, along="residual"),
        Block("norm.*.weight", role=Role.VECTOR, along="residual"),
    ]
    if not tied:
        plain = model.cap is None
        found.append(Block("head.weight", role=Role.LM_HEAD, shift_invariant=plain))
        found.append(Block("head.bias", role=Role.VECTOR, shift_invariant=plain))
    if model.attention.norms:
        found.append(Block("attention.norms.q.weight", role=Role.VECTOR, along="query"))
        found.append(Block("attention.norms.k.weight", role=Role.VECTOR, along="key"))
    return found


def taxonomy(model: Decoder, **changes: dict[str, Any]) -> BlockTaxonomy:
    """The blocks, some of them changed; the keys are names with underscores for dots."""
    changed = []
    for block in blocks(model):
        key = block.name.replace(".", "_").replace("?", "any").replace("*", "all")
        changed.append(replace(block, **changes.pop(key, {})))
    assert not changes, f"no block is called {list(changes)}"
    return BlockTaxonomy(changed, name="Decoder")
