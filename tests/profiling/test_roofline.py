"""The roofline. Oracles: sums by hand, and kernels of which it is known what binds them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
import torch

from lit_symopt.errors import ProfileError
from lit_symopt.profiling.ceilings import measure_ceilings
from lit_symopt.profiling.costs import Cost, StepCosts, TraceCosts
from lit_symopt.profiling.roofline import roofline
from lit_symopt.profiling.run import Ceilings, Work

CEILINGS = Ceilings(flops={"float64": 1e9, "float32": 2e9}, bytes_per_second=1e8)


def cost(us: float, *, role: str = "query", rule: str = "spectral", phase: str = "rule") -> Cost:
    return Cost(stage="optimizer", role=role, rule=rule, phase=phase, kernel="k", calls=1, device_us=us, host_us=us / 2)


def window(*steps: list[Cost]) -> TraceCosts:
    made = [StepCosts(step=index, wall_us=1e6, update_us=1e6, costs=tuple(costs)) for index, costs in enumerate(steps)]
    return TraceCosts(device="cpu", worker="rank0", steps=tuple(made))


def work(flops: float, bytes_: float, *, dtype: str = "float64", role: str = "query", rule: str = "spectral") -> Work:
    return Work(role=role, rule=rule, flops=flops, bytes=bytes_, dtype=dtype, blocks=1, elements=10)


def test_the_measured_time_is_the_median_over_steps_of_the_sum_over_phases_without_communication() -> None:
    windows = [
        window([cost(10), cost(5, phase="write"), cost(7, role="key"), cost(900, phase="communication")], [cost(40)]),
        window([cost(25)]),
    ]
    (point,) = roofline(windows, [work(1000, 10)], CEILINGS)
    assert point.measured_us == 25
    assert point.flops_per_second == pytest.approx(1000 / 25e-6)
    assert point.bytes_per_second == pytest.approx(10 / 25e-6)


def test_the_longer_of_the_two_least_times_binds() -> None:
    windows = [window([cost(400)])]
    (compute,) = roofline(windows, [work(100_000, 1000)], CEILINGS)  # 100 µs and 10 µs
    assert (compute.bound, compute.least_us, compute.share, compute.intensity) == ("compute", 100, 0.25, 100)
    (memory,) = roofline(windows, [work(1000, 20_000)], CEILINGS)  # 1 µs and 200 µs
    assert (memory.bound, memory.least_us, memory.share, memory.intensity) == ("memory", 200, 0.5, 0.05)


def test_a_record_says_what_follows_from_the_numbers() -> None:
    (point,) = roofline([window([cost(400)])], [work(100_000, 1000)], CEILINGS)
    written = json.loads(json.dumps(point.to_json()))
    assert (written["share"], written["bound"], written["least_us"], written["flops"]) == (
        0.25,
        "compute",
        100,
        100_000,
    )


def test_several_dtypes_of_a_rule_each_have_their_peak() -> None:
    windows = [window([cost(400)])]
    (point,) = roofline(windows, [work(100_000, 1), work(100_000, 1, dtype="float32")], CEILINGS)
    assert (point.compute_us, point.dtype, point.flops, point.bytes) == (150, "float64+float32", 200_000, 2)


def test_only_what_was_both_expected_and_measured_has_a_point() -> None:
    windows = [window([cost(10), cost(10, role="value")])]
    expected = [work(1, 1, role="key"), work(1, 1), work(1, 0, role="value")]
    assert [point.role for point in roofline(windows, expected, CEILINGS)] == ["query"]
    assert roofline([], expected, CEILINGS) == roofline([window()], expected, CEILINGS) == ()


def test_a_dtype_whose_peak_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(ProfileError, match=r"query/spectral are computed in bfloat16.*only float64, float32"):
        roofline([window([cost(10)])], [work(1, 1, dtype="bfloat16")], CEILINGS)


def test_a_large_product_and_a_large_copy_lie_near_their_roofs() -> None:
    # The oracle is the hardware: these two are what the ceilings are made of.
    a, source = torch.randn(640, 640, dtype=torch.float64), torch.ones(1 << 26)
    target = source.clone()
    for _ in range(5):  # other processes may take a core in the middle
        ceilings = measure_ceilings(torch.device("cpu"), [torch.float64], seconds=0.4)
        steps = [
            [cost(microseconds(lambda: a @ a), role="a"), cost(microseconds(lambda: target.copy_(source)), role="b")]
            for _ in range(7)
        ]
        expected = [work(2 * 640**3, 3 * a.nbytes, role="a"), work(0, 2 * source.nbytes, role="b")]
        product, copy = roofline([window(*steps)], expected, ceilings)
        assert (product.bound, copy.bound) == ("compute", "memory")
        if 0.5 < product.share < 1.3 and 0.5 < copy.share < 1.5:
            return
    pytest.fail(f"the last shares were {product.share:.2f} and {copy.share:.2f}")


def microseconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e6
