"""Ceilings. Oracle: one more product and one more copy, timed by a plain stopwatch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lit_symopt.errors import ProfileError
from lit_symopt.profiling.ceilings import measure_ceilings
from lit_symopt.profiling.run import Ceilings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured() -> tuple[Ceilings, float]:
    began = time.perf_counter()
    ceilings = measure_ceilings(CPU, [torch.float64, torch.float32])
    return ceilings, time.perf_counter() - began


def fastest(run: Callable[[], object], repetitions: int) -> float:
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def within(low: float, high: float, ratio: Callable[[], float]) -> bool:
    """Whether one of five tries lies between: other processes may take a core in the middle of one."""
    return any(low < ratio() < high for _ in range(5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_another_product_reaches_about_the_peak(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 512, 768, dtype=dtype).unbind()

    def ratio() -> float:
        peak = measure_ceilings(CPU, [dtype], seconds=0.2).flops[str(dtype).removeprefix("torch.")]
        return 2 * 512 * 768 * 512 / fastest(lambda: a @ b.mT, 10) / peak

    assert within(0.6, 1.3, ratio)


def test_a_copy_counts_the_bytes_that_it_reads_and_writes() -> None:
    source = torch.ones(1 << 26)
    target = source.clone()

    def ratio() -> float:
        bandwidth = measure_ceilings(CPU, [], seconds=0.2).bytes_per_second
        return 2 * source.nbytes / fastest(lambda: target.copy_(source), 5) / bandwidth

    assert within(0.65, 1.5, ratio)


def test_float64_is_slower_than_float32_and_every_number_has_a_spread(measured: tuple[Ceilings, float]) -> None:
    ceilings, _ = measured
    assert ceilings.flops["float64"] < ceilings.flops["float32"]
    assert set(ceilings.spread) == {"float64", "float32", "copy"}
    assert all(spread >= 1 for spread in ceilings.spread.values())


def test_it_takes_about_the_time_it_is_given(measured: tuple[Ceilings, float]) -> None:
    assert measured[1] < 10  # 1.2 asked for; other processes take their share of a busy machine


def shortcuts() -> tuple[str, ...]:
    """What torch may do instead of products in float32; before torch 2.9 there is one word for all backends."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return (torch.get_float32_matmul_precision(),)
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]


def allow(wanted: tuple[str, ...]) -> None:
    """Make `shortcuts` be this."""
    if len(wanted) == 1:
        torch.set_float32_matmul_precision(wanted[0])
    else:
        torch.backends.cuda.matmul.fp32_precision = wanted[0]
        torch.backends.mkldnn.matmul.fp32_precision = wanted[1]  # type: ignore[attr-defined]


def test_random_numbers_threads_and_the_precision_of_products_stay_as_they_are() -> None:
    before = shortcuts()
    try:
        for kept in (("highest",), ("medium",)) if len(before) == 1 else (("ieee", "ieee"), ("tf32", "bf16")):
            allow(kept)
            state, threads = torch.get_rng_state(), torch.get_num_threads()
            measure_ceilings(CPU, [torch.float32], seconds=0.02)
            assert torch.equal(state, torch.get_rng_state())
            assert threads == torch.get_num_threads()
            assert shortcuts() == kept
    finally:
        allow(before)


def test_products_of_float32_are_measured_without_shortcuts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = torch.mm

    def product(*arguments: Any, **options: Any) -> Any:
        seen.append(shortcuts()[0])
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "mm", product)
    measure_ceilings(CPU, [torch.float32], seconds=0.02)
    assert set(seen) <= {"ieee", "highest"}
    assert seen


def test_half_precision_and_no_dtype_at_all_can_be_asked_for() -> None:
    ceilings = measure_ceilings(CPU, [torch.bfloat16, torch.bfloat16], seconds=0.05)
    assert list(ceilings.flops) == ["bfloat16"]
    assert ceilings.flops["bfloat16"] > 1e8
    assert measure_ceilings(CPU, [], seconds=0.05).flops == {}


def test_what_cannot_be_measured_is_refused_by_name() -> None:
    with pytest.raises(ProfileError, match=r"cpu has no product of two 256 x 256 matrices in torch\.bool"):
        measure_ceilings(CPU, [torch.bool], seconds=0.05)
    for seconds in (0, -1, float("nan")):
        with pytest.raises(ProfileError, match=r"seconds=.* must be positive"):
            measure_ceilings(CPU, [torch.float32], seconds=seconds)
