"""The rows of a matrix, wherever they lie.

What a rule needs from the other rows of its matrix are sums over all of them (a mean, a Gram matrix, an inner product)
and, for float64 alone, a maximum. `Rows` takes them over rows that are all here; `RowShards` over rows that lie in
several places, and gives in each place the rows that belong there of what the whole matrix would give.

Shape legend:  ... or K matrices of a batch, m x n one matrix, k of its rows here.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Literal

import torch
from torch import Tensor

AllReduce = Callable[[Tensor, Literal["sum", "max"]], Tensor]


class Rows:
    """All rows are here: what every rule assumes unless told otherwise.

    >>> x = torch.tensor([[3.0, 0.0], [1.0, 2.0]])
    >>> WHOLE.sum(x), WHOLE.max(x), WHOLE.count(x)
    (tensor([[4., 2.]]), tensor([[3., 2.]]), 2)
    """

    whole = True
    """Whether all rows are here, so that nothing is exchanged and float64 is no cheaper than a second look."""

    def count(self, x: Tensor) -> int:
        """m, the number of rows of the whole matrix."""
        return x.shape[-2]

    def empty(self, x: Tensor) -> bool:
        """Whether the batch of whole matrices has no entry at all."""
        return prod((*x.shape[:-2], self.count(x), x.shape[-1])) == 0

    def keep(self, x: Tensor) -> Tensor:
        """`x` [..., k, n] with the rows set to zero that are padding."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """[..., k, n] → [..., 1, n]: the sum over all rows of the matrix."""
        return x.sum(dim=-2, keepdim=True)

    def mean(self, x: Tensor) -> Tensor:
        """[..., k, n] → [..., 1, n]: the mean over all rows, in the dtype of `x`; row shards take float64."""
        return x.mean(dim=-2, keepdim=True)

    def max(self, x: Tensor) -> Tensor:
        """[..., k, n] → [..., 1, n]: the maximum over all rows of numbers that are not negative."""
        return x.amax(dim=-2, keepdim=True)

    def gram(self, x: Tensor) -> Tensor:
        """[..., k, n] → [..., n, n]: XᵀX over all rows."""
        return x.mT @ x

    def total(self, x: Tensor) -> Tensor:
        """The sum of partial results of any shape over the places where rows lie."""
        return x


WHOLE = Rows()
"""All rows are here."""


class RowShards(Rows):
    """Some of the rows are here: batches [K, k, n] of K matrices m x n whose other rows lie on other ranks.

    Every rank calls the same functions in the same order, those without a row too. Sums are exchanged in float64, so
    that their rounding is far below that of float32 entries, and of a Gram matrix only the upper triangle.

    Args:
        count: m. Over all ranks, each of the m rows is here once.
        valid: bool [K, k, 1], false where a row is padding, because the matrices of a batch have different numbers of
            rows here; `None` if there is none. What stands in padding does not matter; results are zero there.
        all_reduce: adds up (or takes the maximum of) contiguous tensors over the ranks, the same bits on every rank.

    Two ranks, of which the other one holds a row of ones:

    >>> rows = RowShards(count=2, valid=None, all_reduce=lambda x, how: x + 1)
    >>> rows.mean(torch.tensor([[[3.0, 5.0]]]))
    tensor([[[2., 3.]]], dtype=torch.float64)
    """

    whole = False

    def __init__(self, *, count: int, valid: Tensor | None, all_reduce: AllReduce) -> None:
        self._count, self._valid, self._all_reduce = count, valid, all_reduce

    def count(self, x: Tensor) -> int:
        """m, as given."""
        return self._count

    def keep(self, x: Tensor) -> Tensor:
        """`x` [K, k, n] with padding set to zero."""
        return x if self._valid is None else torch.where(self._valid, x, 0)

    def sum(self, x: Tensor) -> Tensor:
        """[K, k, n] → float64 [K, 1, n]; exchanges 8·n bytes a matrix."""
        return self.total(self.keep(x).sum(dim=-2, keepdim=True, dtype=torch.float64))

    def mean(self, x: Tensor) -> Tensor:
        """[K, k, n] → float64 [K, 1, n]; exchanges 8·n bytes a matrix."""
        return self.sum(x) / self._count

    def max(self, x: Tensor) -> Tensor:
        """[K, k, n] → [K, 1, n]; exchanges n numbers of the dtype of `x` a matrix."""
        # Nothing is below zero, so a row of zeros stands for no row at all.
        rows = torch.cat([self.keep(x), x.new_zeros(*x.shape[:-2], 1, x.shape[-1])], dim=-2)
        return self._all_reduce(rows.amax(dim=-2, keepdim=True), "max")

    def gram(self, x: Tensor) -> Tensor:
        """Float64 [K, k, n] → [K, n, n]; exchanges 8·n(n+1)/2 bytes a matrix."""
        n = x.shape[-1]
        gram = super().gram(self.keep(x)).flatten(-2)
        row, column = torch.triu_indices(n, n, device=x.device)
        index = row * n + column
        upper: Tensor = (
            torch.zeros_like(gram).index_copy_(-1, index, self.total(gram[..., index])).unflatten(-1, (n, n))
        )
        symmetric: Tensor = upper + upper.triu(1).mT
        return symmetric

    def total(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks."""
        return self._all_reduce(x.contiguous(), "sum")
