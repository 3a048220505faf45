"""What routers do with the same tokens as training goes on.

Shape legend:  L layers (routers), N tokens, E experts, K experts a token is sent to, d features, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_symopt.metrics import histogram
from lit_symopt.metrics.layers import Over

# What one number says of all layers.
OVER_LAYERS: dict[str, Over] = {
    "changed": "mean",
    "token_entropy": "mean",
    "logit_rms": "rms",
    "logit_max": "max",
    "logsumexp": "mean",
    "z_loss": "mean",
    "shift": "rms",
}


class RouterStatistics(Metric):
    """Statistics of the logits `z_te` and probabilities `p_te` of each layer's router, over all tokens and ranks.

    | key | formula | range | unit |
    |---|---|---|---|
    | `changed` | `1 − mean_t |S_t ∩ S'_t| / K`: the share of new experts since the look before | 0 to 1 | – |
    | `token_entropy` | `mean_t −Σ_e p_te log p_te` | 0 to log E | nats |
    | `logit_rms` | `√(mean_te z²)` | ≥ 0 | logits |
    | `logit_max` | `max_te |z|` | ≥ 0 | logits |
    | `logsumexp` | `mean_t s_t`, `s_t = log Σ_e exp z_te` | real | logits |
    | `z_loss` | `mean_t s_t²`, without a coefficient | ≥ 0 | logits² |
    | `shift` | `‖1ᵀW‖/√E`, the length of W along the shift `1aᵀ` that a softmax cannot see | ≥ 0 | of W |

    `S_t` are the K experts of token t, `S'_t` those at the look before. The z-loss is that of Zoph et al. 2022 (ST-MoE,
    arXiv:2202.08906, eq. 5). Logits are those of the router's linear map with its bias, before any selection bias.

    Args:
        experts: the number of experts of each layer.
        kwargs: of `torchmetrics.Metric`.

    `compute` returns float64 `[L]` for each key (`changed` is not a number where nothing was compared), `assignments`,
    int64 `[L, E]`, how often each expert was chosen, and `histogram`, int64 `[L, B]`, the logits in the bins of
    `lit_symopt.metrics.histogram`. (torchmetrics turns tensors of one element into scalars.)

    Example:
        >>> statistics = RouterStatistics([2])
        >>> logits = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> statistics.update(0, logits, logits.softmax(-1), torch.tensor([[0], [1]]), shift=torch.tensor(0.5),
        ...                   previous=torch.tensor([[0], [0]]))
        >>> statistics.compute()["changed"].item(), statistics.compute()["logit_max"].item()
        (0.5, 3.0)
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor
    largest: Tensor
    shift: Tensor
    bins: Tensor
    assigned: Tensor

    def __init__(self, experts: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        layers = len(experts)
        zeros = torch.zeros(layers, dtype=torch.float64)
        # Sums: token entropy, squared logits, logsumexp, its square.
        # Counts: tokens, logits, assignments compared, assignments that are as before.
        self.add_state("sums", default=zeros.new_zeros(4, layers), dist_reduce_fx="sum")
        self.add_state("counts", default=torch.zeros(4, layers, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("largest", default=zeros.clone(), dist_reduce_fx="max")
        self.add_state("shift", default=zeros.clone(), dist_reduce_fx="max")  # the same on every rank
        self.add_state("assigned", default=torch.zeros(layers, max(experts), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("bins", default=torch.zeros(layers, histogram.BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        layer: int,
        logits: Tensor,
        probabilities: Tensor,
        selected: Tensor,
        *,
        shift: Tensor,
        previous: Tensor | None = None,
    ) -> None:
        """Add what one layer's router says of N tokens.

        Args:
            layer: which.
            logits: `[N, E]`.
            probabilities: `[N, E]`, each row adding up to 1.
            selected: integers `[N, K]`, the experts that each token was sent to.
            shift: `‖1ᵀW‖/√E` of the router's weight.
            previous: what `selected` was for the same tokens at the look before.
        """
        logits, probabilities = logits.detach(), probabilities.detach()
        logsumexp = logits.logsumexp(-1).to(torch.float64)
        entropy = -torch.special.xlogy(probabilities, probabilities).sum(dtype=torch.float64)
        squares = logits.square().sum(dtype=torch.float64)
        self.sums[:, layer] += torch.stack([entropy, squares, logsumexp.sum(), logsumexp.square().sum()])
        self.counts[0, layer] += logits.shape[0]
        self.counts[1, layer] += logits.numel()
        if previous is not None:
            before = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            before.scatter_(1, previous.to(device=logits.device, dtype=torch.int64), True)
            self.counts[2, layer] += selected.numel()
            self.counts[3, layer] += before.gather(1, selected.to(torch.int64)).sum()
        self.largest[layer] = torch.maximum(self.largest[layer], logits.abs().max().to(torch.float64))
        self.shift[layer] = torch.maximum(self.shift[layer], shift.detach().to(self.shift))
        self.bins[layer] += histogram.count(logits)
        self.assigned[layer, : logits.shape[1]] += torch.bincount(selected.flatten(), minlength=logits.shape[1])

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        tokens, logits, compared, kept = self.counts.to(torch.float64)
        entropy, squares, logsumexp, z_loss = self.sums
        return {
            "changed": 1.0 - kept / compared,
            "token_entropy": entropy / tokens,
            "logit_rms": (squares / logits).sqrt(),
            "logit_max": self.largest,
            "logsumexp": logsumexp / tokens,
            "z_loss": z_loss / tokens,
            "shift": self.shift,
            "assignments": self.assigned,
            "histogram": self.bins,
        }
