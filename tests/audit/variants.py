"""Parts that not every model has, in plain torch: gates of heads, shared tables, norms of neurons, frozen biases.

Shape legend:  B sequences, T tokens, V vocabulary, d width, H heads, h head dimension, I neurons, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lit_symopt import Block, BlockTaxonomy, Layout, Role
from lit_symopt.blocks import Action
from tests.audit.decoder import HEAD, NEURONS, D, E, H, Mixture, V


class GatedAttention(nn.Module):
    """Its attended values are multiplied by a sigmoid of a linear map with some rows for each head."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, H * HEAD, bias=False) for _ in range(3))
        self.gate, self.o = nn.Linear(D, H * rows), nn.Linear(H * HEAD, D, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v, gate = (part(x).unflatten(-1, (H, -1)).transpose(1, 2) for part in (self.q, self.k, self.v, self.gate))
        weights = (q @ k.mT / HEAD**0.5 + bias).softmax(-1)
        y: Tensor = self.o((gate.sigmoid() * (weights @ v)).transpose(1, 2).flatten(2))
        return y


class Tower(nn.Module):
    """Two attentions with gates, to whose scores one table of biases by distance `[5, H]` is added."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.table = nn.Parameter(torch.randn(5, H))
        self.layers = nn.ModuleList(GatedAttention(rows) for _ in range(2))

    def training_loss(self, ids: Tensor) -> Tensor:
        """Next-token cross-entropy."""
        places = torch.arange(ids.shape[1])
        distances = (places[:, None] - places).clamp(-2, 2) + 2
        future = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
        bias = self.table[distances].permute(2, 0, 1).masked_fill(future, -torch.inf)
        x = self.tokens(ids)
        for layer in self.layers:
            x = x + layer(x, bias)
        return cross_entropy(self.head(x)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def tower(rows: int, *, gate: str | None = "heads") -> tuple[Tower, BlockTaxonomy]:
    """A tower with its blocks.

    Args:
        rows: of the gate, for each head.
        gate: what the gate's blocks say they lie along.
    """
    torch.manual_seed(0)
    heads, plain = Layout.heads(H), Action.GENERAL_LINEAR
    values = Action.GENERAL_LINEAR if rows == 1 else Action.NONE
    blocks = [
        Block("tokens.weight", role=Role.EMBEDDING),
        Block("head.weight", role=Role.LM_HEAD),
        Block("table", role=Role.VECTOR, along="heads"),
        Block("layers.*.q.weight", role=Role.QUERY, layout=heads, action=plain),
        Block("layers.*.k.weight", role=Role.KEY, layout=heads, action=plain),
        Block("layers.*.v.weight", role=Role.VALUE, layout=heads, action=values),
        Block("layers.*.o.weight", role=Role.ATTENTION_OUT, layout=Layout.heads(H, dim="columns"), action=values),
        Block("layers.*.gate.weight", role=Role.LINEAR, along=gate),
        Block("layers.*.gate.bias", role=Role.VECTOR, along=None if gate else "residual"),
    ]
    return Tower(rows), BlockTaxonomy(blocks)


class FrozenBias(Mixture):
    """A mixture whose selection is biased by a parameter `[1, E]` that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        del self.selection
        self.selection = nn.Parameter(torch.randn(1, E), requires_grad=False)


class Ungated(nn.Module):
    """The best two of four experts without gates."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, NEURONS, D) * D**-0.5)
        self.up_bias = nn.Parameter(torch.zeros(E, NEURONS))
        self.down = nn.Parameter(torch.randn(E, D, NEURONS) * NEURONS**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        best = logits.topk(2, dim=-1)
        weights = torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(-1))
        hidden = (torch.einsum("eid,bd->bei", self.up, x) + self.up_bias).relu().square()
        y: Tensor = (weights.unsqueeze(-1) * torch.einsum("edi,bei->bed", self.down, hidden)).sum(1)
        return y


class NormedNeurons(nn.Module):
    """A norm between `up` and `down`, with gains for the neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.RMSNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.norm(self.up(x).relu()))
        return y


class Speller(nn.Module):
    """Token ids to next ids, by an embedding, an MLP with a skip connection, and a head.

    Args:
        rows: of the embedding.
        padding: an id from which positions are computed; they are not counted up by it.
        prompt: an id of its own that it puts before the others.
    """

    def __init__(self, *, rows: int = V, padding: int | None = None, prompt: int | None = None) -> None:
        super().__init__()
        self.prompt = prompt
        self.tokens, self.places = nn.Embedding(rows, D, padding_idx=padding), nn.Embedding(16, D)
        self.up, self.down, self.head = nn.Linear(D, 30), nn.Linear(30, D), nn.Linear(D, V)

    def training_loss(self, ids: Tensor) -> Tensor:
        """Next-token cross-entropy."""
        padding, labels = self.tokens.padding_idx, ids
        if self.prompt is not None:
            ids = torch.cat([torch.full_like(ids[:, :1], self.prompt), ids], 1)
        counted = torch.ones_like(ids) if padding is None else (ids != padding).long()
        x = self.tokens(ids) + self.places(counted.cumsum(-1))
        x = (x + self.down(self.up(x.cumsum(1)).relu()))[:, -labels.shape[1] :]
        return cross_entropy(self.head(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class OnlyFloat32(nn.Module):
    """An MLP that makes a float32 scalar of the least number of the dtype it computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        least = torch.full((), torch.finfo(x.dtype).min)
        y: Tensor = self.down(torch.maximum(self.up(x).relu(), least))
        return y
