"""What is looked at during a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lit_symopt.study.train import spread


def seen(loader: DataLoader[Any]) -> list[list[int]]:
    return [batch[0].tolist() for batch in loader]


def numbers(count: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(count)), **options)


def test_looks_go_over_the_whole_set_in_order() -> None:
    assert seen(spread(numbers(100, batch_size=5), 2)) == [[0, 10, 20, 30, 40], [50, 60, 70, 80, 90]]


@pytest.mark.parametrize("batches", [1, 3, 7])
@pytest.mark.parametrize("count", [40, 41, 97])
def test_no_example_is_looked_at_twice_and_gaps_are_even(count: int, batches: int) -> None:
    found = [number for batch in seen(spread(numbers(count, batch_size=4), batches)) for number in batch]
    gaps = {after - before for before, after in zip(found, [*found[1:], count], strict=True)}
    assert len(found) == 4 * batches
    assert max(gaps) - min(gaps) <= 1
    assert min(gaps) >= 1


def test_what_cannot_be_spread_stays_as_it_is() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(9))

    loaders: tuple[Any, ...] = (
        numbers(8, batch_size=4),  # no more than two batches
        DataLoader(Stream(), batch_size=2),
        numbers(40, batch_size=None),
        numbers(40, batch_sampler=[[0, 1], [2, 3], [4, 5]]),
        [],
    )
    for loader in loaders:
        assert spread(loader, 2) is loader
