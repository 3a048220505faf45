"""Histograms that ranks can add up: counts between edges that never change.

Edges are `0.1·sinh(u)` for u from -10 to 10: equal steps of 0.0125 around zero, a constant ratio far from it.

Shape legend:  B bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 160
BINS = _STEPS + 2  # the first and the last are open: below -1,101 and from 1,101 on


def edges() -> Tensor:
    """The B - 1 finite edges, float64; bin b holds `edges[b-1] <= x < edges[b]`.

    Example:
        >>> edges().shape, round(edges()[-1].item())
        (torch.Size([161]), 1101)
    """
    return 0.1 * torch.sinh(torch.linspace(-10.0, 10.0, _STEPS + 1, dtype=torch.float64))


def count(values: Tensor) -> Tensor:
    """How many of the values lie in each bin: int64 `[B]`. What is not a number is not counted.

    Example:
        >>> counts = count(torch.tensor([0.0, 0.001, 5000.0, float("nan")]))
        >>> counts.sum().item(), counts[-1].item()
        (3, 1)
    """
    values = values.detach().flatten()
    values = values[~values.isnan()]
    return torch.bincount(torch.bucketize(values, edges().to(values), right=True), minlength=BINS)


def buckets(counts: Tensor) -> tuple[list[float], list[int]]:
    """Upper edges and counts of the bins from the first to the last that is not empty, with an empty one before them.

    This is what TensorBoard's `add_histogram_raw` takes. Empty lists if nothing was counted.

    Example:
        >>> limits, numbers = buckets(count(torch.tensor([0.0, 0.0, 0.02])))
        >>> [round(limit, 4) for limit in limits], numbers
        ([0.0, 0.0125, 0.0253], [0, 2, 1])
    """
    found = counts.nonzero().flatten()
    if found.numel() == 0:
        return [], []
    first, last = max(int(found[0]) - 1, 0), int(found[-1])
    limits = [*edges().tolist(), float(torch.finfo(torch.float64).max)]
    return limits[first : last + 1], [int(number) for number in counts[first : last + 1]]
