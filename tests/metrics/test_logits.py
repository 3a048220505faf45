"""LogitStatistics: soft caps, large numbers, samples, and the memory it takes."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_symopt.metrics import LogitStatistics, sample_positions, shift_of
from lit_symopt.metrics import logits as module

ZERO = torch.tensor(0.0)


def test_a_shift_of_all_logits_changes_only_what_is_not_centered() -> None:
    logits = torch.randn(7, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, shifted = LogitStatistics(), LogitStatistics()
    plain.update(logits, shift=ZERO)
    shifted.update(logits + 50.0, shift=ZERO)
    one, other = plain.compute(), shifted.compute()
    for name in ("centered_rms", "centered_max", "entropy", "largest_probability"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-10, atol=1e-10)
    assert math.isclose(other["logsumexp"] - one["logsumexp"], 50.0, rel_tol=1e-9)
    assert other["rms"] > 49 > one["rms"]


def test_a_soft_cap_is_applied_before_everything() -> None:
    logits = torch.tensor([[100.0, -30.0, 0.0]])
    capped, plain = LogitStatistics(), LogitStatistics()
    capped.update(logits, shift=ZERO, softcap=30.0)
    plain.update(30.0 * torch.tanh(logits / 30.0), shift=ZERO)
    for name, value in plain.compute().items():
        torch.testing.assert_close(capped.compute()[name], value, msg=name)
    assert capped.compute()["max"] <= 30.0
    assert logits[0, 0] == 100.0  # the model's own logits stay


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_huge_logits_are_finite_and_certain(dtype: torch.dtype) -> None:
    statistics = LogitStatistics()
    statistics.update(torch.tensor([[3e4, 0.0, -3e4]], dtype=dtype), shift=ZERO)
    found = statistics.compute()
    assert all(torch.isfinite(value).all() for value in found.values())
    assert (found["entropy"].item(), found["largest_probability"].item()) == (0.0, 1.0)


def test_not_a_number_shows() -> None:
    statistics = LogitStatistics()
    statistics.update(torch.tensor([[float("nan"), 0.0]]), shift=ZERO)
    assert all(statistics.compute()[name].isnan() for name in ("rms", "max", "entropy"))


def test_small_pieces_give_what_one_piece_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(9, 40)
    whole, pieces = LogitStatistics(), LogitStatistics()
    whole.update(logits, shift=ZERO)
    monkeypatch.setattr(module, "CHUNK", 80)  # two positions at a time
    pieces.update(logits, shift=ZERO)
    for name, value in whole.compute().items():
        torch.testing.assert_close(pieces.compute()[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_positions_are_a_sample_without_repetition_that_draws_from_no_global_generator() -> None:
    before = torch.get_rng_state()
    one, again, other = (sample_positions(1000, 50, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len(one.unique()) == 50
    assert sample_positions(1, 50, seed=0).tolist() == [0]


def test_the_shift_is_the_length_along_the_ones() -> None:
    weight = torch.randn(12, 5, dtype=torch.float64)
    centered = weight - weight.mean(0)
    assert shift_of(centered) < 1e-14
    added = torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0], dtype=torch.float64)
    assert math.isclose(shift_of(centered + added).item(), 5.0 * math.sqrt(12))


PEAK = """
import re, torch
from pathlib import Path
from lit_symopt.metrics import LogitStatistics, sample_positions, shift_of
torch.set_num_threads(1)
V, N = 262_144, 512
logits, weight = torch.zeros(1, N, V, dtype=torch.bfloat16), torch.zeros(V, 64, dtype=torch.bfloat16)
small = LogitStatistics()  # warms up what is loaded once
small.update(torch.zeros(1, 8), shift=shift_of(weight[:8]))
# getrusage would count the process that started this one.
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
before = peak()
statistics = LogitStatistics()
statistics.update(logits, shift=shift_of(weight), positions=sample_positions(N, 64, seed=0))
print(peak() - before, logits.nbytes)
assert statistics.compute()["positions"] == 64
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of a process from Linux's /proc")
def test_a_vocabulary_of_262144_takes_less_than_100_mb_more() -> None:
    # Oracle: the largest resident memory of a process that does nothing else. Its bfloat16 logits are 268 MB.
    result = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, timeout=120)
    more, own = map(int, result.stdout.split())
    assert own == 268_435_456
    assert 0 < more < 100e6
