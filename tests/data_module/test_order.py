"""The training order. Oracle: the endless stream of permutations, cut into batches by hand."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from lit_symopt.data.order import TrainingOrder, permutation
from lit_symopt.errors import DataError

seeds = st.integers(0, 2**64 - 1)


class Sized(Dataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def order(size: int, **options: Any) -> TrainingOrder:
    return TrainingOrder(Sized(size), **{"batch_size": 1, "seed": 0, **options})


def passes(sampler: TrainingOrder, count: int) -> list[int]:
    """Several passes, each used up."""
    taken: list[int] = []
    for _ in range(count):
        taken += list(sampler)
        sampler.consumed += len(sampler) * sampler.num_replicas
    return taken


@given(size=st.integers(1, 300), seed=seeds, epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(size, seed=seed, epoch=epoch).tolist()) == list(range(size))


def test_the_generator_gives_the_published_answer_of_philox() -> None:
    """Oracle: Random123's known-answer test of Philox-4x64-10 for counter 0, key 0 (NumPy counts before it draws)."""
    answer = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert np.random.Philox(key=0, counter=2**256 - 1).random_raw(4).tolist() == answer


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    """Oracle: values recorded once (NumPy 2.4.6)."""
    assert permutation(10, seed=1234, epoch=0).tolist() == [8, 9, 7, 3, 0, 1, 4, 2, 5, 6]
    assert permutation(10, seed=1234, epoch=1).tolist() == [0, 9, 5, 6, 4, 2, 8, 1, 7, 3]


@given(seed=seeds)
def test_epochs_and_seeds_differ(seed: int) -> None:
    first = permutation(50, seed=seed, epoch=0).tolist()
    assert first != permutation(50, seed=seed, epoch=1).tolist()
    assert first != permutation(50, seed=seed ^ 1, epoch=0).tolist()


@given(size=st.integers(1, 60), batch=st.integers(1, 7), seed=seeds, count=st.integers(1, 4))
def test_one_process_reads_the_stream_of_permutations(size: int, batch: int, seed: int, count: int) -> None:
    if size < batch:
        with pytest.raises(DataError, match=f"{size} windows are fewer than one batch of {batch}"):
            order(size, batch_size=batch, seed=seed)
        return
    stream = [window for epoch in range(count) for window in permutation(size, seed=seed, epoch=epoch).tolist()]
    taken = passes(order(size, batch_size=batch, seed=seed), count)
    assert len(taken) == size // batch * batch * count
    assert taken == stream[: len(taken)]


@given(
    world=st.integers(1, 4), batch=st.integers(1, 4), size=st.integers(16, 80), seed=seeds, start=st.integers(0, 100)
)
def test_a_global_batch_depends_on_its_size_alone(world: int, batch: int, size: int, seed: int, start: int) -> None:
    """The k-th batches of W processes, side by side, are the k-th batch of one process that takes W times as much."""
    single = order(size, batch_size=world * batch, seed=seed, start=start)
    ranks = [
        order(size, batch_size=batch, seed=seed, num_replicas=world, rank=rank, start=start) for rank in range(world)
    ]
    parts = [np.array(list(rank)).reshape(-1, batch) for rank in ranks]
    assert len({len(part) for part in parts}) == 1
    np.testing.assert_array_equal(np.concatenate(parts, axis=1).ravel(), list(single))


@given(size=st.integers(8, 50), used=st.integers(0, 200), seed=seeds)
def test_a_restored_position_goes_on_with_the_next_window(size: int, used: int, seed: int) -> None:
    """Also with another batch size and another number of processes."""
    stream = [w for epoch in range(used // size + 3) for w in permutation(size, seed=seed, epoch=epoch).tolist()]
    saved = order(size, batch_size=4, seed=seed, start=used).state_dict()
    restored = order(size, batch_size=2, seed=seed, num_replicas=2, rank=1)
    restored.load_state_dict(saved)
    restored.set_epoch(17)
    assert list(islice(restored, 2)) == stream[used + 2 : used + 4]


@pytest.mark.parametrize(("options", "message"), [({"seed": -1}, "seed"), ({"batch_size": 0}, "batch_size")])
def test_numbers_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        order(10, **options)


def test_a_position_in_other_data_is_refused() -> None:
    with pytest.raises(DataError, match=r"windows 11, but this run has windows 10.*same data"):
        order(10).load_state_dict(order(11).state_dict())
