"""What this machine reaches at best: a large matrix product in each dtype, and a large copy.

The ceiling is the best of several repetitions after a warm-up, since whatever disturbs a measurement only makes it
slower; the spread is the highest over the lowest. Products of float32 are measured without TF32, so that a
polar factor in precision `tf32` may reach more than their ceiling.
Decompositions have no ceiling of their own: they are held against that of the products and stay far below it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from lit_symopt.errors import ProfileError
from lit_symopt.profiling.run import Ceilings

SMALLEST = 256
LARGEST = {"cpu": 2048, "cuda": 8192}
"""Side of the square matrices: doubled as long as one product takes a tenth of its share of the time, up to this."""

BUFFER = {"cpu": 1 << 28, "cuda": 1 << 29}
"""Bytes of each of the two buffers of the copy: well above the last cache."""

LEAST_REPETITIONS = 3
COPY = "copy"


def measure_ceilings(device: torch.device, dtypes: Sequence[torch.dtype], *, seconds: float = 1.2) -> Ceilings:
    """Peak of a matrix product by dtype, and bandwidth of a copy.

    Takes memory for two buffers of 256 MB (GPU: 512 MB) and three matrices a dtype, and gives it back: what a process
    had at most is to be read before. Threads and random numbers stay as they are.

    Args:
        device: where updates are computed.
        dtypes: of the products; those of the expected work.
        seconds: for everything, about; one product and one copy are repeated at least three times.

    Raises:
        ProfileError: for a dtype in which the device has no matrix product, or for a time that is not positive.
        torch.OutOfMemoryError: if not even the copy's buffers, or the smallest matrices, fit.

    Example:
        >>> ceilings = measure_ceilings(torch.device("cpu"), [torch.float64], seconds=0.1)
        >>> list(ceilings.flops), ceilings.bytes_per_second > 1e8, ceilings.spread["float64"] >= 1
        (['float64'], True, True)
    """
    if not seconds > 0:
        raise ProfileError(f"seconds={seconds} must be positive: it is the time the ceilings of {device} are given")
    runs: dict[str, Callable[[], object]] = {}
    done: dict[str, float] = {}
    with _without_tf32():
        for dtype in dict.fromkeys(dtypes):
            name = str(dtype).removeprefix("torch.")
            side, runs[name] = _largest_product(device, dtype, seconds / (len(dtypes) + 1) / 10)
            done[name] = 2.0 * side**3
        done[COPY], runs[COPY] = _copy(device)
        times = _in_turn(runs, device, seconds)
    runs.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    best = {name: done[name] / min(taken) for name, taken in times.items()}
    return Ceilings(
        bytes_per_second=best.pop(COPY),
        flops=best,
        spread={name: max(taken) / min(taken) for name, taken in times.items()},
    )


def _in_turn(runs: Mapping[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Seconds of each repetition; all in turn, so that a busy moment of the machine falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < LEAST_REPETITIONS or time.perf_counter() < end:
        for name, run in runs.items():
            times[name].append(_timed(run, device))
        rounds += 1
    return times


def _largest_product(device: torch.device, dtype: torch.dtype, seconds: float) -> tuple[int, Callable[[], object]]:
    """The largest square product that takes no more than so many seconds: its side, and what runs it."""
    side = SMALLEST
    run = _product(device, dtype, side)
    # The next size takes eight times as long.
    while 2 * side <= LARGEST.get(device.type, LARGEST["cuda"]):
        if 8 * min(_timed(run, device) for _ in range(2)) > seconds:
            break
        try:
            larger = _product(device, dtype, 2 * side)
        except torch.OutOfMemoryError:  # of a GPU on which a model still lies: what fits must do
            break
        run, side = larger, 2 * side
    return side, run


def _product(device: torch.device, dtype: torch.dtype, side: int) -> Callable[[], object]:
    """A product that has been run once."""
    # Zeros would let a GPU draw less power, and clock higher, than numbers do.
    generator = torch.Generator(device).manual_seed(0)
    try:
        a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        torch.mm(a, b, out=out)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        raise ProfileError(
            f"{device} has no product of two {side} x {side} matrices in {dtype}: {error}; measure other dtypes"
        ) from error
    return lambda: torch.mm(a, b, out=out)


def _copy(device: torch.device) -> tuple[float, Callable[[], object]]:
    """A copy that has been run once: bytes read and written, and what runs it."""
    size = BUFFER.get(device.type, BUFFER["cuda"])
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = source.clone()
    return 2.0 * size, lambda: target.copy_(source)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds on the device."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(device))
        run()
        stop.record(torch.cuda.current_stream(device))
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3
    began = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - began


@contextmanager
def _without_tf32() -> Iterator[None]:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch before 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    # The older switch, which asks all backends at once, raises where somebody has set one by the newer.
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    kept = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, value in zip(backends, kept, strict=True):
            backend.fp32_precision = value
