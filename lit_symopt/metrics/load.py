"""How evenly the experts of each layer are used.

Shape legend:  L layers (routers), E experts (the most of any layer), N tokens, K experts a token is sent to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_symopt.metrics.layers import Over

# An expert is dead if it gets less than this part of an even share. Of assignments: if it gets none.
DEAD_BELOW = 0.01

# What one number says of all layers.
OVER_LAYERS: dict[str, Over] = {
    "cv": "mean",
    "entropy": "mean",
    "largest_share": "max",
    "dead_experts": "sum",
    "balance_loss": "mean",
}


def imbalance(shares: Tensor, experts: Tensor, *, dead_below: float = 0.0) -> dict[str, Tensor]:
    """How far the shares of each layer's experts are from even.

    With the shares `x_e` of the E experts of a layer, `Σ x_e = 1`:

    | key | formula | range | unit |
    |---|---|---|---|
    | `cv` | `√(E Σ (x_e − 1/E)²)`, the standard deviation over the mean | 0 (even) to √(E−1) | – |
    | `entropy` | `−Σ x_e log x_e / log E`; 1 for a single expert | 0 to 1 (even) | – |
    | `largest_share` | `max x_e` | 1/E (even) to 1 | – |
    | `dead_experts` | how many have `x_e = 0` or `x_e < dead_below / E` | 0 (even) to E−1 | experts |

    Args:
        shares: `[L, E]`, zero where a layer has fewer experts.
        experts: `[L]`, the number of experts of each layer.
        dead_below: see the table.

    Returns:
        Float64 tensors `[L]`; not a number where a layer saw no token.

    Example:
        >>> found = imbalance(torch.tensor([[0.5, 0.5, 0.0, 0.0]]), torch.tensor([4]))
        >>> {name: round(value.item(), 3) for name, value in found.items()}
        {'cv': 1.0, 'entropy': 0.5, 'largest_share': 0.5, 'dead_experts': 2.0}
    """
    shares = shares.to(torch.float64)
    number = experts.to(shares)
    real = torch.arange(shares.shape[1], device=shares.device) < number[:, None]
    deviation = torch.where(real, shares - 1.0 / number[:, None], 0.0)
    surprise = -torch.special.xlogy(shares, shares).sum(1)
    dead = real & ((shares <= 0.0) | (shares < dead_below / number[:, None]))
    found = {
        "cv": (number * deviation.square().sum(1)).sqrt(),
        "entropy": torch.where(number > 1, surprise / number.log().clamp_min(1e-300), torch.ones_like(number)),
        "largest_share": shares.amax(1),
        "dead_experts": dead.sum(1).to(shares),
    }
    unseen = shares.isnan().any(1)
    return {name: torch.where(unseen, torch.nan, value) for name, value in found.items()}


class ExpertLoad(Metric):
    """Assignments and probability mass of every expert of every layer, and how uneven they are.

    Over all tokens that were added, on all ranks: with `c_e` the number of times expert e was chosen,

        f_e = c_e / Σ c          share of the assignments (of the N·K places, so at most 1/K)
        p_e = 1/N Σ_t p_te       share of the probability mass, each token's probabilities adding up to 1
        balance_loss = E Σ f_e p_e

    The balance loss is that of Fedus et al. 2021 (Switch Transformers, arXiv:2101.03961, eq. 4) without its
    coefficient: 1 when even, E when one expert gets everything. transformers' is K times it, and takes f and p over the
    tokens of all layers at once. The same loss of f alone is `E Σ f_e² = 1 + cv²`, of p alone likewise.

    States are added over ranks; counts are integers, so nothing is rounded however often it is updated.

    Args:
        experts: the number of experts of each layer.
        kwargs: of `torchmetrics.Metric`.

    `compute` returns `[L, E]`: `assignments` (int64 `c`), `mass` (float64 `p`, not a number where a layer has fewer
    experts); and float64 `[L]`: `tokens`, `balance_loss`, and `assignments/…`, `mass/…` for each key of `imbalance`.
    (torchmetrics turns tensors of one element into scalars.)

    Example:
        >>> load = ExpertLoad([2, 2])
        >>> for layer in (0, 1):
        ...     load.update(layer, torch.tensor([[0], [0]]), torch.tensor([[0.9, 0.1], [0.7, 0.3]]))
        >>> load.compute()["assignments"].tolist(), round(load.compute()["balance_loss"][0].item(), 6)
        ([[2, 0], [2, 0]], 1.6)
    """

    full_state_update = False
    assigned: Tensor
    mass: Tensor
    tokens: Tensor

    def __init__(self, experts: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.experts = tuple(experts)
        shape = (len(self.experts), max(self.experts))
        self.add_state("assigned", default=torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("mass", default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", default=torch.zeros(shape[0], dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, layer: int, selected: Tensor, probabilities: Tensor) -> None:
        """Add what one layer did with N tokens.

        Args:
            layer: which.
            selected: integers `[N, K]`, the experts that each token was sent to.
            probabilities: `[N, E]`, each row adding up to 1.
        """
        experts = self.experts[layer]
        self.assigned[layer, :experts] += torch.bincount(selected.detach().flatten(), minlength=experts)
        self.mass[layer, :experts] += probabilities.detach().sum(0, dtype=torch.float64)
        self.tokens[layer] += len(probabilities)

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        number = torch.tensor(self.experts, device=self.mass.device)
        f = self.assigned / self.assigned.sum(1, keepdim=True).to(torch.float64)
        p = self.mass / self.tokens[:, None]
        missing = torch.arange(max(self.experts), device=p.device) >= number[:, None]
        return {
            "assignments": self.assigned,
            "mass": p.masked_fill(missing, torch.nan),
            "tokens": self.tokens.to(torch.float64),
            "balance_loss": number * (f * p).sum(1),
            **{f"assignments/{name}": value for name, value in imbalance(f, number).items()},
            **{f"mass/{name}": value for name, value in imbalance(p, number, dead_below=DEAD_BELOW).items()},
        }
