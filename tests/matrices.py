"""Matrices with known spectra, and the oracle of every polar factor: a float64 singular value decomposition."""

from __future__ import annotations

from typing import cast

import torch
from hypothesis import settings
from torch import Tensor

# m rows, n columns, k = min(m, n)

PROPERTY = settings(max_examples=20, deadline=None, derandomize=True)
"""Property tests draw the same examples on every machine."""


def generator(seed: int) -> torch.Generator:
    """A source of random numbers that no other test shares."""
    return torch.Generator().manual_seed(seed)


def haar(rows: int, columns: int, *, seed: int) -> Tensor:
    """Float64 [rows, columns] with orthonormal columns, uniformly distributed."""
    q, r = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator(seed)))
    return cast(Tensor, q * r.diagonal().sign())


def permutation(size: int, *, seed: int) -> Tensor:
    """A random permutation matrix [size, size], float64."""
    return torch.eye(size, dtype=torch.float64)[torch.randperm(size, generator=generator(seed))]


def with_spectrum(m: int, n: int, sigma: Tensor, *, seed: int = 0) -> Tensor:
    """Float64 [m, n] with singular values `sigma` [k] and random singular vectors."""
    k = sigma.numel()
    return (haar(m, k, seed=2 * seed) * sigma.double()) @ haar(n, k, seed=2 * seed + 1).mT


def log_uniform(k: int, *, spread: float, rank: int | None = None) -> Tensor:
    """`rank` singular values from 1 down to 1/spread, equally spaced in the logarithm, then zeros up to `k`."""
    rank = k if rank is None else rank
    sigma = torch.zeros(k, dtype=torch.float64)
    sigma[:rank] = spread ** -torch.linspace(0, 1, rank, dtype=torch.float64)
    return sigma


def polar_reference(x: Tensor) -> Tensor:
    """V Wᵀ over the singular values above 3e-6 of the largest, in float64."""
    v, sigma, wh = torch.linalg.svd(x.double(), full_matrices=False)
    keep = (sigma >= 3e-6 * sigma[..., :1]) & (sigma > 0)
    return cast(Tensor, (v * keep.unsqueeze(-2)) @ wh)


def condition(x: Tensor) -> float:
    """Ratio of the largest to the smallest kept singular value."""
    sigma = torch.linalg.svdvals(x.double())
    kept = sigma[sigma >= 3e-6 * sigma[0]]
    return float(kept[0] / kept[-1])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖_F / ‖expected‖_F in float64, or ‖actual‖_F where the expected is zero."""
    scale = expected.double().norm()
    return float((actual.double() - expected.double()).norm() / (scale if scale > 0 else 1))
