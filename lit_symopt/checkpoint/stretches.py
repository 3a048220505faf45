"""Stretches of a block: taken out of a whole tensor, put back, and whether they cover it.

A stretch `[start, stop)` counts elements of the block flattened with dimension `dim` moved to the front, as
`lit_symopt.sharding.holdings` defines it.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def take(whole: Tensor, *, dim: int, start: int, stop: int) -> Tensor:
    """The elements `[start, stop)` as a vector; a view where the storage allows it."""
    return _moved(whole, dim).reshape(-1)[start:stop]


def put(whole: Tensor, piece: Tensor, *, dim: int, start: int) -> None:
    """Writes a vector to the elements from `start` on; converts to the dtype of `whole`."""
    moved = _moved(whole, dim)
    flat = moved.reshape(-1)
    flat[start : start + piece.numel()] = piece.reshape(-1)
    if flat.data_ptr() != moved.data_ptr() or not moved.is_contiguous():  # flattening made a copy
        moved.copy_(flat.view(moved.shape))


def uncovered(stretches: Iterable[tuple[int, int]], numel: int) -> tuple[int, int] | None:
    """The first gap that stretches leave in `[0, numel)`, or `None`. Copies of a stretch are allowed.

    Example:
        >>> uncovered([(4, 6), (0, 4)], 6), uncovered([(0, 2), (3, 6)], 6)
        (None, (2, 3))
    """
    reached = 0
    for start, stop in sorted((start, stop) for start, stop in stretches if start < stop):
        if start > reached:
            return reached, start
        reached = max(reached, stop)
    return None if reached >= numel else (reached, numel)


def _moved(tensor: Tensor, dim: int) -> Tensor:
    return tensor.movedim(dim, 0) if dim else tensor
