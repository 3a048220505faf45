"""Ranks that hold some rows each, as threads that meet at a barrier and add up what they brought."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Literal

import torch
from torch import Tensor

from lit_symopt.linalg import RowShards


class Meeting:
    """An `all_reduce` among threads that records what each rank brings."""

    def __init__(self, world: int) -> None:
        self.barrier = Barrier(world, timeout=30)
        self.brought: list[Tensor] = [torch.empty(0)] * world
        self.bytes = [0] * world
        self.calls: list[list[tuple[str, torch.dtype, int]]] = [[] for _ in range(world)]

    def all_reduce(self, rank: int) -> Callable[[Tensor, Literal["sum", "max"]], Tensor]:
        def reduce(x: Tensor, how: Literal["sum", "max"]) -> Tensor:
            assert x.is_contiguous()
            self.bytes[rank] += x.numel() * x.element_size()
            self.calls[rank].append((how, x.dtype, x.numel()))
            self.brought[rank] = x
            self.barrier.wait()
            together = torch.stack(self.brought)
            self.barrier.wait()
            return together.sum(dim=0) if how == "sum" else together.amax(dim=0)

        return reduce


def on_shards(
    counts: Sequence[tuple[int, ...]],
    x: Tensor,
    work: Callable[[Tensor, RowShards], Tensor],
    *,
    padding: float = torch.nan,
) -> tuple[list[Tensor], Meeting]:
    """What each rank gets when the rows of `x` [K, m, n] are dealt out, and the record of the meeting.

    Ranks whose matrices have different numbers of rows, or none, pad them with `padding`.
    """
    meeting = Meeting(len(counts))
    starts = torch.tensor(counts).cumsum(dim=0) - torch.tensor(counts)

    def run(rank: int) -> Tensor:
        try:
            return work(deal(rank), rows_of(rank))
        except BaseException:
            meeting.barrier.abort()
            raise

    def deal(rank: int) -> Tensor:
        local = x.new_full((len(x), max(1, *counts[rank]), x.shape[-1]), padding)
        for k, count in enumerate(counts[rank]):
            start = int(starts[rank, k])
            local[k, :count] = x[k, start : start + count]
        return local

    def rows_of(rank: int) -> RowShards:
        held = torch.tensor(counts[rank]).view(-1, 1, 1)
        valid = torch.arange(max(1, *counts[rank])).view(1, -1, 1) < held
        reduce = meeting.all_reduce(rank)
        return RowShards(count=x.shape[-2], valid=None if bool(valid.all()) else valid, all_reduce=reduce)

    with ThreadPoolExecutor(len(counts)) as pool:
        results = list(pool.map(run, range(len(counts))))
    return results, meeting


def put_together(counts: Sequence[tuple[int, ...]], results: Sequence[Tensor]) -> Tensor:
    """The rows of all ranks [K, m, n]; what stands in padding must be zero."""
    for local, held in zip(results, counts, strict=True):
        for k, count in enumerate(held):
            assert local[k, count:].eq(0).all()
    return torch.stack(
        [
            torch.cat([local[k, : held[k]] for local, held in zip(results, counts, strict=True)])
            for k in range(len(counts[0]))
        ]
    )
