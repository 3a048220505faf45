"""How large a language model's logits are, and how sure it is.

Shape legend:  S positions, V vocabulary, B bins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_symopt.metrics import histogram

# Elements of logits that are looked at together: 4 MiB in float32. Working on them takes about ten times as much.
CHUNK = 2**20


class LogitStatistics(Metric):
    """Statistics of the logits `z_tv` of a head over sampled positions, of all ranks and all micro-batches added.

    With the centered logits `c_tv = z_tv − mean_v z_tv`, which the shift `1aᵀ` of the head does not reach, and
    `p_t = softmax(z_t)`:

    | key | formula | range | unit |
    |---|---|---|---|
    | `rms` | `√(mean_tv z²)` | ≥ 0 | logits |
    | `max` | `max_tv |z|` | ≥ 0 | logits |
    | `centered_rms` | `√(mean_tv c²)` | 0 to `rms` | logits |
    | `centered_max` | `max_tv |c|` | ≥ 0 | logits |
    | `logsumexp` | `mean_t log Σ_v exp z_tv` | real | logits |
    | `entropy` | `mean_t −Σ_v p_tv log p_tv` | 0 to log V | nats |
    | `largest_probability` | `mean_t max_v p_tv` | 1/V to 1 | – |
    | `shift` | `‖1ᵀW‖/√V`, the length of the head's weight along the shift | ≥ 0 | of W |

    `update` never holds more than `CHUNK` logits in float32 (one position at least) and a few tensors of that size,
    however many positions and tokens there are: with V = 262,144 it works on 4 positions at a time, within 100 MB.

    Args:
        kwargs: of `torchmetrics.Metric`.

    `compute` returns a float64 number for each key, `positions` (S in all), and `histogram`, int64 `[B]`, the centered
    logits in the bins of `lit_symopt.metrics.histogram`.

    Example:
        >>> statistics = LogitStatistics()
        >>> statistics.update(torch.tensor([[2.0, 0.0], [0.0, -2.0]]), shift=torch.tensor(0.0))
        >>> {name: round(statistics.compute()[name].item(), 3) for name in ("rms", "centered_rms", "entropy")}
        {'rms': 1.414, 'centered_rms': 1.0, 'entropy': 0.365}
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor
    largest: Tensor
    bins: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zeros = torch.zeros(5, dtype=torch.float64)
        # Sums: squares, centered squares, logsumexp, entropy, largest probability. Largest: logit, centered, shift.
        self.add_state("sums", default=zeros, dist_reduce_fx="sum")
        self.add_state("counts", default=torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("largest", default=torch.zeros(3, dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("bins", default=torch.zeros(histogram.BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, logits: Tensor, *, shift: Tensor, positions: Tensor | None = None, softcap: float | None = None
    ) -> None:
        """Add positions.

        Args:
            logits: `[..., V]` in any floating dtype; only views and small pieces of it are made.
            shift: `‖1ᵀW‖/√V` of the head's weight; see `shift_of`.
            positions: which of the flattened positions to look at; default: all.
            softcap: c, if the loss sees `c · tanh(z/c)` in place of z; all numbers are then of the capped logits.
        """
        rows = logits.detach().reshape(-1, logits.shape[-1])
        if positions is None:
            positions = torch.arange(len(rows), device=rows.device)
        for some in positions.split(max(1, CHUNK // rows.shape[-1])):
            self._add(rows[some].to(_working(rows.dtype)), softcap)
        self.largest[2] = torch.maximum(self.largest[2], shift.detach().to(self.largest))

    def _add(self, z: Tensor, softcap: float | None) -> None:
        """Adds a chunk that may be written to."""
        if softcap is not None:
            z = z.div_(softcap).tanh_().mul_(softcap)
        squares, largest = z.square().sum(dtype=torch.float64), z.abs().max().to(torch.float64)
        logsumexp = z.logsumexp(-1, keepdim=True)
        p = (z - logsumexp).exp_()
        # Σ_v p (log Σ exp z − z), each position's own z as the origin: no large numbers cancel.
        entropy = (p * (logsumexp - z)).sum(dtype=torch.float64)
        certain = p.amax(-1).sum(dtype=torch.float64)
        del p
        c = z.sub_(z.mean(-1, keepdim=True))
        centered, furthest = c.square().sum(dtype=torch.float64), c.abs().max().to(torch.float64)
        self.sums += torch.stack([squares, centered, logsumexp.sum(dtype=torch.float64), entropy, certain])
        self.counts += torch.tensor([len(z), z.numel()], device=z.device)
        self.largest[:2] = torch.maximum(self.largest[:2], torch.stack([largest, furthest]))
        self.bins += histogram.count(c)

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        squares, centered, logsumexp, entropy, certain = self.sums
        positions, entries = self.counts.to(torch.float64)
        return {
            "rms": (squares / entries).sqrt(),
            "max": self.largest[0],
            "centered_rms": (centered / entries).sqrt(),
            "centered_max": self.largest[1],
            "logsumexp": logsumexp / positions,
            "entropy": entropy / positions,
            "largest_probability": certain / positions,
            "shift": self.largest[2],
            "positions": positions,
            "histogram": self.bins,
        }


def shift_of(weight: Tensor) -> Tensor:
    """`‖1ᵀW‖/√V` of a matrix `[V, d]`: a float64 number, made without a copy of W in another dtype.

    Example:
        >>> shift_of(torch.tensor([[3.0, 0.0], [0.0, 4.0]])).item() * 2**0.5
        5.0
    """
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in weight.detach().split(max(1, CHUNK // weight.shape[1])):
        total += rows.to(_working(rows.dtype)).sum(0, dtype=torch.float64)
    length: Tensor = total.norm() / weight.shape[0] ** 0.5
    return length


def sample_positions(number: int, most: int, *, seed: int) -> Tensor:
    """At most `most` of `number` positions, sorted: a function of the seed that draws from no global generator.

    Example:
        >>> sample_positions(3, 8, seed=0).tolist(), len(sample_positions(1000, 8, seed=0))
        ([0, 1, 2], 8)
    """
    if number <= most:
        return torch.arange(number)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(number, generator=generator)[:most].sort().values


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
