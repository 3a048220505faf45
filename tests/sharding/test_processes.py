"""The harness of the tests of several processes: its own claims."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.sharding.processes import Ranks, RanksFailed, run_on_ranks


def add_ranks(value: float) -> tuple[int, torch.Tensor]:
    total = torch.full((2,), value + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), total


def fail_on(rank: int) -> None:
    print("said before it failed", flush=True)
    if dist.get_rank() == rank:
        raise ValueError("this one")
    dist.barrier()
    time.sleep(60.0)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang() -> None:
    time.sleep(60.0)


def environment(*names: str) -> dict[str, Any]:
    return {name: os.environ.get(name) for name in names} | {"group": dist.is_initialized()}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2) as started:
        yield started


def test_a_call_returns_what_each_rank_returned(ranks: Ranks) -> None:
    for value in (1.0, 5.0):  # the second call meets the same processes
        found = ranks(add_ranks, value)
        assert [rank for rank, _ in found] == [0, 1]
        assert all(total.tolist() == [2 * value + 1.0] * 2 for _, total in found)


def test_an_error_shows_the_traceback_of_its_rank_and_the_next_call_works(ranks: Ranks) -> None:
    begun = time.monotonic()
    with pytest.raises(RanksFailed, match="ValueError: this one") as failed:
        ranks(fail_on, 1)
    assert time.monotonic() - begun < 30.0
    assert "said before it failed" in str(failed.value)
    assert ranks(add_ranks, 0.0)[1][1].tolist() == [1.0, 1.0]


def test_a_killed_rank_is_named(ranks: Ranks) -> None:
    with pytest.raises(RanksFailed, match=r"rank 1 .*SIGKILL") as failed:
        ranks(die_on, 1)
    assert failed.value.outcomes[1].returncode == -signal.SIGKILL


def test_a_call_that_takes_too_long_is_killed(ranks: Ranks) -> None:
    with pytest.raises(RanksFailed, match="failed on 2 of 2 ranks"):
        ranks(hang, timeout=5.0)


def test_processes_without_a_group_have_what_a_launcher_sets() -> None:
    (found,) = run_on_ranks(environment, 1, "RANK", "WORLD_SIZE", "MASTER_PORT", "MINE", env={"MINE": "x"}, group=False)
    port = found.pop("MASTER_PORT")
    assert int(port) > 0
    assert found == {"RANK": "0", "WORLD_SIZE": "1", "MINE": "x", "group": False}
