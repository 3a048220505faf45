"""Tensors of matrices as a kernel takes them: [K, m, n], one stride a dimension."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor


def batches(lists: Sequence[Sequence[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """Views [K, m, n] of tensors [..., m, n], for all lists alike.

    Where the dimensions of a batch are not one stride apart in all of them, each index of the first is taken by itself.

    Args:
        lists: some may be empty; all tensors have the same shape.

    >>> import torch
    >>> x = torch.zeros(2, 3, 4, 5)
    >>> [views[0][0].shape[0] for views in batches([[x], []])], [len(views) for views in batches([[x[:, :2]], []])]
    ([6], [2, 2])
    """
    shape = next(tensors[0].shape for tensors in lists if tensors)
    try:
        views = [[one.view(shape[:-2].numel(), *shape[-2:]) for one in tensors] for tensors in lists]
    except RuntimeError:  # torch: the view spans dimensions that are not one stride apart
        for index in range(shape[0]):
            yield from batches([[one[index] for one in tensors] for tensors in lists])
    else:
        yield views
