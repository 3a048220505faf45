"""Random group elements, large ones: nothing here is near the identity.

Everything is float64 and drawn from a generator on the CPU, so that a seed gives the same elements on every device.

Shape legend:  n size of what is acted on, B batch dimensions (one element for each matrix of a block).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

DENSE_UP_TO = 512
"""Largest rotation drawn from the Haar measure; larger ones are products of permutations and blocks of this size."""


def permutation(n: int, generator: Generator) -> Tensor:
    """Indices `[n]` of a cycle through all n: no point stays where it was (unless there is only one).

    >>> p = permutation(5, Generator().manual_seed(0))
    >>> bool((p == torch.arange(5)).any()), sorted(p.tolist())
    (False, [0, 1, 2, 3, 4])
    """
    order = torch.randperm(n, generator=generator)
    cycle = torch.empty_like(order)
    cycle[order] = order.roll(-1)
    return cycle


def wreath(groups: int, size: int, generator: Generator) -> Tensor:
    """Indices `[groups · size]`: groups change places as wholes, and the members of each group among themselves.

    >>> wreath(2, 1, Generator()).tolist()
    [1, 0]
    """
    outer = permutation(groups, generator)
    inner = torch.stack([permutation(size, generator) for _ in range(groups)])
    return (outer[:, None] * size + inner).flatten()


def signs(n: int, generator: Generator) -> Tensor:
    """±1 `[n]`, half of them negative (rounded up)."""
    values = torch.ones(n, dtype=torch.float64)
    values[torch.randperm(n, generator=generator)[: (n + 1) // 2]] = -1
    return values


def scales(n: int, generator: Generator) -> Tensor:
    """Factors `[n]` with magnitudes in [1.25, 2] or their inverses, half of them negative (rounded up)."""
    size = 1.25 + 0.75 * torch.rand(n, dtype=torch.float64, generator=generator)
    inverse = torch.rand(n, generator=generator) < 0.5
    return torch.where(inverse, 1 / size, size) * signs(n, generator)


def haar(n: int, generator: Generator, *, batch: Sequence[int] = ()) -> Tensor:
    """Orthogonal matrices `[*batch, n, n]`, uniformly distributed; for n = 1 they are -1."""
    if n == 1:
        return -torch.ones(*batch, 1, 1, dtype=torch.float64)
    q, r = torch.linalg.qr(torch.randn(*batch, n, n, dtype=torch.float64, generator=generator))
    unique: Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return unique


def invertible(n: int, generator: Generator, *, batch: Sequence[int] = ()) -> Tensor:
    """Matrices `[*batch, n, n]` with singular values from 1/2 to 2: well conditioned, and far from orthogonal."""
    spectrum = 2.0 ** torch.linspace(-1, 1, n, dtype=torch.float64) if n > 1 else torch.full((1,), 2.0).double()
    return (haar(n, generator, batch=batch) * spectrum) @ haar(n, generator, batch=batch)


def plane_rotations(n: int, planes: Sequence[tuple[int, int]], generator: Generator, *, batch: Sequence[int]) -> Tensor:
    """Matrices `[*batch, n, n]` that turn each plane by an angle of its own, from 60 to 300 degrees.

    Dimensions that lie in no plane get one orthogonal matrix together.
    """
    matrix = torch.zeros(*batch, n, n, dtype=torch.float64)
    first, second = (torch.tensor([plane[side] for plane in planes], dtype=torch.long) for side in (0, 1))
    angles = math.pi * (1 / 3 + 4 / 3 * torch.rand(*batch, len(planes), dtype=torch.float64, generator=generator))
    matrix[..., first, first] = matrix[..., second, second] = angles.cos()
    matrix[..., first, second], matrix[..., second, first] = -angles.sin(), angles.sin()
    rest = sorted(set(range(n)) - set(first.tolist()) - set(second.tolist()))
    if rest:
        index = torch.tensor(rest)
        matrix[..., index[:, None], index[None, :]] = haar(len(rest), generator, batch=batch)
    return matrix


def rotation(n: int, generator: Generator) -> Callable[[Tensor], Tensor]:
    """An orthogonal map of the last dimension: x `[..., n]` → x Qᵀ.

    Up to `DENSE_UP_TO` it is Haar distributed; beyond, blocks of that size between permutations of all coordinates,
    so that its cost is n · `DENSE_UP_TO` and every output still mixes hundreds of inputs.
    """
    if n <= DENSE_UP_TO:
        q = haar(n, generator)
        return lambda x: x @ q.mT.to(x.device)
    first, last = permutation(n, generator), permutation(n, generator)
    blocks = [haar(len(piece), generator) for piece in torch.arange(n).split(DENSE_UP_TO)]

    def apply(x: Tensor) -> Tensor:
        pieces = x[..., first.to(x.device)].split(DENSE_UP_TO, dim=-1)
        turned = [piece @ q.mT.to(x.device) for piece, q in zip(pieces, blocks, strict=True)]
        return torch.cat(turned, -1)[..., last.to(x.device)]

    return apply
