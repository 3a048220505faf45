"""Modules of plain torch whose blocks the tests know by hand.

A mixture with listed experts, a soft-capped decoder, a decoder whose names are all wrong, and a LightningModule around
`nn.TransformerEncoder`.

Shape legend:  B sequences, T tokens, V vocabulary, d width, H heads, h head dimension, I neurons, E experts, k chosen.
"""

from __future__ import annotations

from typing import Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention, silu

Scoring = Literal["softmax_topk", "topk_softmax", "sigmoid"]


class GatedMLP(nn.Module):
    def __init__(self, width: int, neurons: int) -> None:
        super().__init__()
        # The activated one comes second, and its name does not say what it is.
        self.a = nn.Linear(width, neurons, bias=False)
        self.b = nn.Linear(width, neurons, bias=False)
        self.c = nn.Linear(neurons, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.a(x) * silu(self.b(x)))
        return y


class PlainMLP(nn.Module):
    def __init__(self, width: int, neurons: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, neurons)
        self.proj = nn.Linear(neurons, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(gelu(self.fc(x)))
        return y


class GroupedAttention(nn.Module):
    """Causal attention without a rotary embedding; H query heads share fewer key and value heads."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_k = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.to_v = nn.Linear(width, kv_heads * head_dim)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.to_k(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        v = self.to_v(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        y: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return y


class Mixture(nn.Module):
    """k of E experts a token, the experts a list of modules."""

    def __init__(self, width: int, neurons: int, experts: int, k: int, scoring: Scoring, gated: bool) -> None:
        super().__init__()
        self.k, self.scoring = k, scoring
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            GatedMLP(width, neurons) if gated else PlainMLP(width, neurons) for _ in range(experts)
        )

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(x)
        if self.scoring == "topk_softmax":
            values, chosen = logits.topk(self.k, dim=-1)
            return values.softmax(-1), chosen
        scores = logits.softmax(-1) if self.scoring == "softmax_topk" else logits.sigmoid()
        return tuple(scores.topk(self.k, dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.route(tokens)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == index)
            if rows.numel():
                out = out.index_add(0, rows, expert(tokens[rows]) * weights[rows, slots, None])
        return out.view_as(x)


class MixtureDecoder(nn.Module):
    """Learned positions, RMSNorm, grouped attention, a mixture, an untied head with a bias."""

    def __init__(self, *, scoring: Scoring, gated: bool, layers: int = 2) -> None:
        super().__init__()
        vocabulary, width, positions = 53, 20, 16
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.attention = nn.ModuleList(GroupedAttention(width, 4, 2, 6) for _ in range(layers))
        self.mixtures = nn.ModuleList(Mixture(width, 14, 5, 2, scoring, gated) for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * layers + 1))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer, (attention, mixture) in enumerate(zip(self.attention, self.mixtures, strict=True)):
            x = x + attention(self.norms[2 * layer](x))
            x = x + mixture(self.norms[2 * layer + 1](x))
        logits: Tensor = self.head(self.norms[-1](x))
        return logits

    def training_loss(self, ids: Tensor) -> Tensor:
        return cross_entropy(self(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class InOut(nn.Module):
    """A linear map whose stored rows are inputs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * inputs**-0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class CappedDecoder(nn.Module):
    """GPT-2 with an untied head whose logits pass through `cap·tanh(·/cap)`; `cap=None` is a plain head.

    `width` is d, and with `neurons = vocabulary = width` every matrix but the fused one is square. A `tied` one has no
    head: it multiplies with the embedding.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 53,
        width: int = 24,
        neurons: int = 40,
        cap: float | None = 3.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.cap = 3, cap
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(16, width)
        self.ln_1, self.ln_2, self.ln_f = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = InOut(width, 3 * width), InOut(width, width)
        self.fc, self.proj = InOut(width, neurons), InOut(neurons, width)
        self.head = None if tied else nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.ln_1(x)).chunk(3, -1))
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        future = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)
        attended = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        x = x + self.proj(gelu(self.fc(self.ln_2(x))))
        x = self.ln_f(x)
        logits: Tensor = x @ self.wte.weight.T if self.head is None else self.head(x)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def training_loss(self, ids: Tensor) -> Tensor:
        return cross_entropy(self(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Misnamed(nn.Module):
    """One layer of a decoder in which every name is that of something else.

    Of the 6 dimensions of a head the first 4 are turned, in neighboring pairs.
    """

    def __init__(self, *, complex_numbers: bool = False) -> None:
        super().__init__()
        self.complex_numbers = complex_numbers
        vocabulary, width, heads, head_dim, neurons = 53, 20, 4, 6, 36
        self.lm_head = nn.Embedding(vocabulary, width)
        self.norm = nn.Linear(width, heads * head_dim, bias=False)
        self.router = nn.Linear(width, heads * head_dim, bias=False)
        self.down_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.gate_proj = nn.Linear(heads * head_dim, width, bias=False)
        self.o_proj = nn.Linear(width, neurons, bias=False)
        self.k_proj = nn.Linear(width, neurons, bias=False)
        self.q_proj = nn.Linear(neurons, width, bias=False)
        self.experts = nn.ModuleList(nn.RMSNorm(width) for _ in range(3))
        self.embed_tokens = nn.Linear(width, vocabulary, bias=False)

    def turn(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)[:, None] / torch.tensor([1.0, 30.0]).to(x)
        head, tail = x[..., :4], x[..., 4:]
        if self.complex_numbers:
            numbers = torch.view_as_complex(head.unflatten(-1, (2, 2)).contiguous())
            turned = torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
        else:
            even, odd = head[..., ::2], head[..., 1::2]
            pair = even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()
            turned = torch.stack(pair, -1).flatten(-2)
        return torch.cat((turned, tail), -1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.lm_head(ids)
        y = self.experts[0](x)
        v, q, k = (
            projection(y).unflatten(-1, (4, 6)).transpose(1, 2)
            for projection in (self.down_proj, self.norm, self.router)
        )
        out = scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True)
        x = x + self.gate_proj(out.transpose(1, 2).flatten(2))
        y = self.experts[1](x)
        x = x + self.q_proj(self.o_proj(y) * silu(self.k_proj(y)))
        logits: Tensor = self.embed_tokens(self.experts[2](x))
        return logits

    def training_loss(self, ids: Tensor) -> Tensor:
        return cross_entropy(self(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class LitEncoder(L.LightningModule):
    """A sequence classifier of torch's own layers, with a `training_step` of its own."""

    def __init__(self, *, dropout: float = 0.1, norm_first: bool = False) -> None:
        super().__init__()
        vocabulary, width, classes = 53, 24, 7
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(1, 16, width))
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=40, dropout=dropout, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.classify = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.encoder(self.embed(ids) + self.position[:, : ids.shape[1]])
        logits: Tensor = self.classify(x.mean(1))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        ids, classes = batch
        loss = cross_entropy(self(ids), classes)
        self.log("train/loss", loss)
        return loss


class LitTranslator(L.LightningModule):
    """torch's own encoder-decoder: the fused projection of cross-attention reads two streams."""

    def __init__(self) -> None:
        super().__init__()
        vocabulary, width = 53, 24
        self.source, self.target = nn.Embedding(61, width), nn.Embedding(vocabulary, width)
        self.transformer = nn.Transformer(
            width,
            nhead=4,
            num_encoder_layers=1,
            num_decoder_layers=2,
            dim_feedforward=40,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
        )
        self.head = nn.Linear(width, vocabulary, bias=False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        source, target = batch
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=self.head.weight.dtype)
        x = self.transformer(self.source(source), self.target(target), tgt_mask=mask, tgt_is_causal=True)
        return cross_entropy(self.head(x)[:, :-1].flatten(0, 1), target[:, 1:].flatten())
