"""Sums over the rows of a matrix that lie in several places. Oracle: the same sums in one place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_symopt.linalg import WHOLE, Rows, RowShards, polar
from tests.matrices import generator
from tests.row_shards import on_shards

COUNTS = [(5, 0), (0, 1), (2, 6)]  # 7 rows of 2 matrices on 3 ranks
REDUCTIONS: dict[str, Callable[[Rows, Tensor], Tensor]] = {
    "sum": lambda rows, x: rows.sum(x),
    "mean": lambda rows, x: rows.mean(x.to(torch.float64)),
    "max": lambda rows, x: rows.max(x),
    "gram": lambda rows, x: rows.gram(x),
}


@pytest.mark.parametrize("padding", [0.0, torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_reduction_over_shards_is_that_over_all_rows_on_every_rank(name: str, padding: float) -> None:
    x, reduction = torch.rand(2, 7, 4, dtype=torch.float64, generator=generator(0)), REDUCTIONS[name]
    expected = reduction(WHOLE, x)
    results, _ = on_shards(COUNTS, x, lambda local, rows: reduction(rows, local), padding=padding)
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-14, atol=0)
        assert torch.equal(result, results[0])


def test_a_gram_matrix_of_shards_is_symmetric_bitwise_and_moves_its_upper_triangle() -> None:
    x = torch.randn(2, 7, 4, dtype=torch.float64, generator=generator(0))
    (gram, *_), meeting = on_shards(COUNTS, x, lambda local, rows: rows.gram(local))
    assert torch.equal(gram, gram.mT)
    assert meeting.bytes == [2 * 8 * 4 * 5 // 2] * 3


def test_sums_of_float32_rows_are_exchanged_in_float64() -> None:
    # 2²⁴ + 1 is not a float32 number.
    x = torch.tensor([[[2.0**24], [1.0]]])
    results, _ = on_shards([(1,), (1,)], x, lambda local, rows: rows.sum(local))
    assert [result.item() for result in results] == [2.0**24 + 1] * 2


def test_shards_know_how_many_rows_the_whole_has() -> None:
    rows = RowShards(count=7, valid=None, all_reduce=lambda x, _: x)
    assert (rows.count(torch.ones(2, 3, 4)), WHOLE.count(torch.ones(2, 3, 4))) == (7, 3)
    assert not rows.empty(torch.ones(2, 0, 4))
    assert rows.empty(torch.ones(2, 3, 0))
    assert WHOLE.empty(torch.ones(2, 0, 4))


def test_the_polar_factor_of_a_matrix_on_one_rank_is_the_polar_factor() -> None:
    x = torch.randn(2, 7, 4, generator=generator(0))
    rows = RowShards(count=7, valid=None, all_reduce=lambda x, _: x)
    torch.testing.assert_close(polar(x, rows=rows), polar(x), rtol=1e-6, atol=1e-7)
