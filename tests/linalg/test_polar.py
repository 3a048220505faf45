"""The numerical promises of the polar factor, against a float64 singular value decomposition of the same input."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_symopt.errors import ConfigError
from lit_symopt.linalg import Execution, Precision, inverse_root, polar
from lit_symopt.linalg.low_precision import DTYPES, LowPrecision, polar_by_quintics, tf32_allowed
from lit_symopt.linalg.polar import Method, method_for, polar_by
from lit_symopt.scratch import Arena
from tests.matrices import (
    PROPERTY,
    condition,
    generator,
    haar,
    log_uniform,
    polar_reference,
    relative_error,
    with_spectrum,
)

FP32_METHODS: list[Method] = ["eigh", "iteration"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
LOW: tuple[LowPrecision, ...] = get_args(LowPrecision)


def nasty(k: int) -> dict[str, Tensor]:
    """Spectra within [1e-4, 1] that an iteration or a filter may like least."""
    ones = torch.ones(k)
    return {
        "flat": ones,
        "ones and a single 1e-4": torch.cat([ones[1:], 1e-4 * ones[:1]]),
        "a single one and 1e-4": torch.cat([ones[:1], 1e-4 * ones[1:]]),
        "half and half": torch.cat([ones[: k // 2], 1e-4 * ones[k // 2 :]]),
        "arithmetic": torch.linspace(1, 1e-4, k),
    }


# ---- accuracy


def test_polar_of_an_orthogonal_matrix_is_itself() -> None:
    q = haar(24, 16, seed=1)
    assert relative_error(polar(q), q) < 1e-14
    assert relative_error(polar(q.float(), precision="fp32"), q) < 1e-6


def test_polar_of_a_diagonal_matrix_is_its_sign() -> None:
    diagonal = torch.tensor([3.0, -1e-2, 1e-4, -7.0])
    torch.testing.assert_close(polar(diagonal.diag(), precision="fp32"), diagonal.sign().diag())


@PROPERTY
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    spread=st.floats(0, 4),
    deficiency=st.integers(0, 39),
    exponent=st.integers(-12, 12),
    seed=st.integers(0, 2**16),
)
def test_every_float32_matrix_has_the_promised_polar_factor(
    m: int, n: int, spread: float, deficiency: int, exponent: int, seed: int
) -> None:
    k = min(m, n)
    sigma = log_uniform(k, spread=10**spread, rank=max(1, k - deficiency))
    x = (10.0**exponent * with_spectrum(m, n, sigma, seed=seed)).float()
    reference = polar_reference(x)
    assert relative_error(polar(x, precision="exact"), reference) <= 1e-5
    assert relative_error(polar(x, precision="fp32"), reference) <= 1e-3
    assert relative_error(polar_by("iteration", x), reference) <= 1e-3


@PROPERTY
@given(m=st.integers(1, 30), n=st.integers(1, 30), spread=st.floats(0, 4), seed=st.integers(0, 2**16))
def test_float64_is_converged_whatever_the_precision(m: int, n: int, spread: float, seed: int) -> None:
    x = with_spectrum(m, n, log_uniform(min(m, n), spread=10**spread), seed=seed)
    for precision in PRECISIONS:
        u = polar(x, precision=precision)
        assert u.dtype == torch.float64
        assert relative_error(u, polar_reference(x)) <= 1e-10


@pytest.mark.parametrize("method", FP32_METHODS)
@pytest.mark.parametrize("spectrum", nasty(96))
def test_any_spectrum_within_four_decades_is_accurate(method: Method, spectrum: str) -> None:
    x = with_spectrum(130, 96, nasty(96)[spectrum]).float()
    assert relative_error(polar_by(method, x), polar_reference(x)) <= 3e-3


@pytest.mark.parametrize("method", FP32_METHODS)
@pytest.mark.parametrize(("m", "n"), [(320, 280), (270, 512)])
@pytest.mark.parametrize("rank", [1, 8, 200])
def test_large_rank_deficient_matrices_keep_their_null_space_empty(method: Method, m: int, n: int, rank: int) -> None:
    x = with_spectrum(m, n, log_uniform(min(m, n), spread=1e2, rank=rank)).float()
    assert relative_error(polar_by(method, x), polar_reference(x)) <= 1e-3


@pytest.mark.parametrize("method", FP32_METHODS)
@pytest.mark.parametrize("rows", [64, 300])
def test_centered_matrices_which_are_always_singular_are_accurate(method: Method, rows: int) -> None:
    x = torch.randn(rows, rows + 40, generator=generator(3))
    x = x - x.mean(dim=0)
    assert relative_error(polar_by(method, x), polar_reference(x)) <= 1e-3


def test_a_product_of_float32_factors_is_rank_deficient_up_to_its_rounding() -> None:
    left, right = torch.randn(300, 8, generator=generator(1)), torch.randn(8, 280, generator=generator(2))
    x = left @ right
    for method in FP32_METHODS:
        assert relative_error(polar_by(method, x), polar_reference(x)) <= 1e-3


@pytest.mark.parametrize("method", FP32_METHODS)
def test_the_rounding_of_an_accumulated_momentum_does_not_come_back_as_a_direction(method: Method) -> None:
    sigma = (
        log_uniform(280, spread=10, rank=8) + 2e-7
    )  # three roundings of float32 in every direction of the null space
    x = with_spectrum(320, 280, sigma)
    assert relative_error(polar_by(method, x.float()), polar_reference(x)) <= 1e-4


# ---- the documented errors

METHODS: tuple[Method, ...] = ("svd", "eigh", "iteration", "bf16", "fp16", "tf32")
TABLE = {  # as in the docstring of lit_symopt.linalg.polar
    "Gaussian, m >= 2 n": (1e-6, 1e-6, 1e-5, 0.04, 0.02, 0.02),
    "Gaussian, square": (1e-6, 1e-6, 1e-2, 0.1, 0.1, 0.1),
    "log-uniform over 1e2": (1e-6, 1e-6, 1e-5, 0.06, 0.02, 0.02),
    "log-uniform over 1e3": (1e-6, 1e-6, 1e-4, 0.35, 0.3, 0.3),
    "log-uniform over 1e4": (1e-6, 1e-6, 1e-3, 0.6, 0.6, 0.6),
    "a single one and 1e-4": (1e-6, 1e-6, 1e-3, 1.0, 1.0, 1.0),
    "ones and a single 1e-4": (1e-6, 1e-6, 1e-3, 1.0, 1.0, 1.0),
    "rank 8": (1e-6, 1e-6, 1e-3, 1.2, 0.2, 0.2),
}


def documented(spectrum: str, m: int, n: int) -> Tensor:
    if spectrum.startswith("Gaussian"):
        return torch.randn(m, n if spectrum.endswith("n") else m, generator=generator(m))
    if spectrum.startswith("log-uniform"):
        sigma = log_uniform(min(m, n), spread=float(spectrum.rsplit(maxsplit=1)[-1]))
    elif spectrum == "rank 8":
        sigma = log_uniform(min(m, n), spread=1, rank=8)
    else:
        sigma = nasty(min(m, n))[spectrum]
    return with_spectrum(m, n, sigma).float()


@pytest.mark.parametrize("spectrum", TABLE)
@pytest.mark.parametrize(("m", "n"), [(128, 32), (256, 128), (512, 256)])
def test_every_method_stays_within_the_documented_error(spectrum: str, m: int, n: int) -> None:
    x = documented(spectrum, m, n)
    reference = polar_reference(x)
    for method, bound in zip(METHODS, TABLE[spectrum], strict=True):
        assert relative_error(polar_by(method, x), reference) <= bound, method


@pytest.mark.parametrize(
    ("precision", "low", "high"), [("bf16", 0.8, 1.05), ("fp16", 0.95, 1.02), ("tf32", 0.95, 1.02)]
)
@pytest.mark.parametrize("spectrum", TABLE)
def test_low_precision_brings_large_singular_values_close_to_one(
    spectrum: str, precision: Precision, low: float, high: float
) -> None:
    x = documented(spectrum, 256, 128)
    u = polar(x, precision=precision).double()
    v, sigma, wh = torch.linalg.svd(x.double(), full_matrices=False)
    gains = (v.mT @ u @ wh.mT).diagonal()
    assert float(gains[sigma >= 1e-2 * sigma[0]].min()) >= low
    assert float(torch.linalg.svdvals(u).max()) <= high


def test_auto_is_fp32_on_a_cpu() -> None:
    x = torch.randn(3, 300, 260, generator=generator(0))
    assert torch.equal(polar(x, precision="auto"), polar(x, precision="fp32"))


@pytest.mark.parametrize(
    ("precision", "dtype", "device_type", "side", "method"),
    [
        ("auto", torch.float32, "cpu", 4096, "eigh"),
        ("auto", torch.float32, "cuda", 64, "bf16"),
        ("auto", torch.float64, "cuda", 64, "svd"),
        ("fp32", torch.float32, "cuda", 256, "eigh"),
        ("fp32", torch.float32, "cuda", 257, "iteration"),
        ("fp32", torch.float64, "cuda", 257, "svd"),
        ("exact", torch.bfloat16, "cuda", 257, "svd"),
        ("bf16", torch.float32, "cpu", 64, "bf16"),
        ("fp16", torch.float32, "cuda", 64, "fp16"),
        ("tf32", torch.bfloat16, "cpu", 64, "tf32"),
        ("tf32", torch.float64, "cuda", 64, "svd"),
    ],
)
def test_the_method_is_a_function_of_precision_dtype_device_and_shape(
    precision: Precision, dtype: torch.dtype, device_type: str, side: int, method: Method
) -> None:
    assert method_for(precision, dtype=dtype, device_type=device_type, side=side) == method


# ---- symmetry


@PROPERTY
@given(m=st.integers(1, 32), n=st.integers(1, 32), spread=st.floats(0, 4), seed=st.integers(0, 2**16))
def test_polar_commutes_with_rotations_of_both_sides(m: int, n: int, spread: float, seed: int) -> None:
    x = with_spectrum(m, n, log_uniform(min(m, n), spread=10**spread), seed=seed)
    left, right = haar(m, m, seed=seed + 1), haar(n, n, seed=seed + 2)
    assert relative_error(polar(left @ x @ right), left @ polar(x) @ right) <= 1e-9
    rotated = (left @ x.float().double() @ right).float()
    for method in FP32_METHODS:
        expected = left @ polar_by(method, x.float()).double() @ right
        assert relative_error(polar_by(method, rotated), expected) <= max(1e-5, 5e-7 * condition(x))


@pytest.mark.parametrize("method", FP32_METHODS)
@pytest.mark.parametrize("rank", [8, 270])
def test_large_matrices_commute_with_rotations_of_both_sides(method: Method, rank: int) -> None:
    x = with_spectrum(300, 270, log_uniform(270, spread=10, rank=rank)).float()
    left, right = haar(300, 300, seed=5), haar(270, 270, seed=6)
    expected = left @ polar_by(method, x).double() @ right
    assert relative_error(polar_by(method, (left @ x.double() @ right).float()), expected) <= 1e-5


@pytest.mark.parametrize("precision", PRECISIONS)
def test_polar_of_the_transpose_is_the_transpose(precision: Precision) -> None:
    x = torch.randn(20, 12, generator=generator(0))
    found, expected = polar(x.mT, precision=precision), polar(x, precision=precision).mT
    if precision == "tf32":  # products of float32 add up in another order
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("exponent", [-30, -12, 12, 30])
def test_polar_does_not_see_the_scale(precision: Precision, exponent: int) -> None:
    x = torch.randn(20, 12, generator=generator(0))
    scaled = (x.double() * 10.0**exponent).float()
    tolerance = {"bf16": 0.02, "fp16": 3e-3}.get(precision, 1e-5)  # the rounding to them depends on all digits
    assert relative_error(polar(scaled, precision=precision), polar(x, precision=precision)) <= tolerance
    exact_scale = 2.0 ** (3 * exponent)  # powers of two leave no trace
    assert torch.equal(polar(x * exact_scale, precision=precision), polar(x, precision=precision))


@pytest.mark.parametrize("exponent", [-40, 40])
def test_bfloat16_matrices_times_a_power_of_two_have_the_same_polar_factor(exponent: int) -> None:
    x = torch.randn(20, 12, generator=generator(0)).bfloat16()
    for precision in PRECISIONS:
        u = polar(x * 2.0**exponent, precision=precision)
        assert u.dtype == torch.bfloat16
        assert torch.equal(u, polar(x, precision=precision))


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("shape", [(5, 90, 70), (5, 70, 160), (5, 12, 12)])
def test_low_precision_scales_by_powers_of_two_and_each_matrix_alone(
    shape: tuple[int, ...], precision: LowPrecision
) -> None:
    x = torch.randn(shape, generator=generator(0))
    alike = polar(x, precision=precision)
    apart = x * torch.tensor([2.0**-100, 2.0**100, 1.0, 2.0**-30, 2.0**30]).view(-1, 1, 1)
    assert torch.equal(polar(apart, precision=precision), alike)
    assert torch.equal(polar(apart[:1], precision=precision), polar(x[:1], precision=precision))


@pytest.mark.parametrize("precision", LOW)
def test_low_precision_of_a_batch_with_empty_experts_is_that_of_the_others(precision: LowPrecision) -> None:
    x = torch.randn(6, 90, 70, generator=generator(0))
    expected = polar(x, precision=precision)
    x[1::2] = 0
    u = polar(x, precision=precision)
    assert u[1::2].eq(0).all()
    assert torch.equal(u[::2], expected[::2])
    x[0] *= 2.0**-100  # what vanishes when it is squared is not empty
    assert torch.equal(polar(x, precision=precision), u)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("factor", [3.4e38, 1e30, 1e-30, 1e-38, 2.0**-135])
def test_low_precision_takes_the_whole_range_of_float32(factor: float, precision: LowPrecision) -> None:
    x = torch.randn(3, 90, 40, generator=generator(0))
    x = x / x.abs().max() * factor  # with 2⁻¹³⁵ all are denormal and have 14 bits
    assert float(x.abs().max()) > 0
    u = polar(x, precision=precision)
    assert relative_error(u, polar_reference(x / factor)) <= 0.04


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_is_one_result_for_what_every_dtype_can_hold_and_in_the_dtype_asked_for(
    dtype: torch.dtype, precision: LowPrecision
) -> None:
    x = torch.randn(2, 80, 70, generator=generator(0)).bfloat16()
    x = x.clamp(-4, 4).masked_fill(x.abs() < 2**-10, 0)  # a number of float16 too
    u = polar_by_quintics(x, method=precision)
    assert u.dtype == DTYPES[precision]
    assert polar(x.to(dtype), precision=precision).dtype == dtype
    assert torch.equal(polar(x.to(dtype), precision=precision), u.to(dtype))
    out = torch.full_like(u, torch.nan)
    assert polar_by_quintics(x.to(dtype), method=precision, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, u)


@pytest.mark.parametrize("precision", LOW)
def test_borrowed_memory_changes_nothing_and_nothing_is_left_behind(precision: LowPrecision) -> None:
    x, arena = torch.randn(4, 160, 70, generator=generator(0)), Arena()
    expected, before = polar(x, precision=precision), x.clone()
    for _ in range(3):
        with arena.lend():
            assert torch.equal(polar(x, precision=precision, how=Execution(scratch=arena)), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("precision", LOW)
def test_low_precision_takes_matrices_in_any_order_of_memory(precision: LowPrecision) -> None:
    x = torch.randn(3, 160, 70, generator=generator(0))
    expected = polar(x, precision=precision)
    assert torch.equal(polar(x.mT.contiguous().mT, precision=precision), expected)
    assert relative_error(polar(x.mT, precision=precision), expected.mT) <= 0.02
    assert torch.equal(polar(x.transpose(0, 1).contiguous().transpose(0, 1), precision=precision), expected)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 90, 70), (2, 70, 160), (5, 5)])
def test_low_precision_asks_no_device_but_a_cpu_for_a_number(
    dtype: torch.dtype, shape: tuple[int, ...], precision: LowPrecision
) -> None:
    # Tensors without numbers take the way of accelerators, and raise where one is asked for.
    u = polar_by(precision, torch.empty(shape, dtype=dtype, device="meta"))
    assert (u.shape, u.dtype) == (shape, dtype)


@pytest.mark.parametrize("before", ["ieee", "tf32"])
def test_tf32_is_allowed_for_its_products_alone(before: str) -> None:
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    value, allowed = (before, "tf32") if name == "fp32_precision" else (before == "tf32", True)
    kept = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        with tf32_allowed(True):
            assert getattr(matmul, name) == allowed
        assert getattr(matmul, name) == value
        with pytest.raises(RuntimeError), tf32_allowed(True):
            raise RuntimeError
        assert getattr(matmul, name) == value
        with tf32_allowed(False):
            assert getattr(matmul, name) == value
    finally:
        setattr(matmul, name, kept)


# ---- edges


@pytest.mark.parametrize("method", get_args(Method))
def test_zero_gives_zero_and_damage_stays_in_its_matrix(method: Method) -> None:
    x = torch.randn(4, 6, 5, generator=generator(0))
    alone = polar_by(method, x[3:])
    x[0] = 0
    x[1, 2, 3] = torch.nan
    x[2, 0, 0] = torch.inf
    u = polar_by(method, x)
    assert torch.equal(u[0], torch.zeros(6, 5))
    assert u[1].isnan().all()
    assert u[2].isnan().all()
    torch.testing.assert_close(u[3:], alone)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 4, 3), (2, 0, 3), (0, 0)])
def test_an_empty_batch_has_an_empty_polar_factor(precision: Precision, shape: tuple[int, ...]) -> None:
    assert polar(torch.empty(shape), precision=precision).shape == shape


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_single_row_column_or_entry_is_divided_by_its_norm(precision: Precision) -> None:
    tolerance = {"bf16": 0.05, "fp16": 0.02, "tf32": 0.02}.get(precision, 1e-6)
    for shape in ((1, 1), (1, 7), (7, 1), (3, 2, 1, 5)):
        x = torch.randn(shape, generator=generator(1)) * 1e-20
        expected = x.double() / torch.linalg.matrix_norm(x.double(), keepdim=True)
        assert relative_error(polar(x, precision=precision), expected) <= tolerance


@pytest.mark.parametrize("method", [*FP32_METHODS, "svd"])
def test_a_batch_is_its_matrices_one_by_one(method: Method) -> None:
    x = torch.randn(2, 3, 7, 5, generator=generator(0))
    one_by_one = torch.stack([torch.stack([polar_by(method, b) for b in a]) for a in x])
    torch.testing.assert_close(polar_by(method, x), one_by_one)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_polar_is_bitwise_reproducible_and_never_writes_its_argument(precision: Precision) -> None:
    x = torch.randn(3, 40, 30, generator=generator(0))
    before = x.clone()
    assert torch.equal(polar(x, precision=precision), polar(x, precision=precision))
    assert torch.equal(x, before)


def test_a_zero_row_stays_exactly_zero_in_a_tall_matrix() -> None:
    x = torch.randn(20, 6, generator=generator(0))
    x[3] = 0
    for precision in PRECISIONS:
        assert polar(x, precision=precision)[3].eq(0).all()


def test_inverse_root_times_gram_times_inverse_root_is_the_projection_on_the_range() -> None:
    x = with_spectrum(40, 12, log_uniform(12, spread=1e2, rank=9))
    root = inverse_root(x.mT @ x)
    _, _, wh = torch.linalg.svd(x, full_matrices=False)
    assert relative_error(root @ (x.mT @ x) @ root, wh[:9].mT @ wh[:9]) < 1e-10


def test_inverse_root_refuses_a_gram_matrix_that_has_lost_its_digits() -> None:
    with pytest.raises(ConfigError, match=r"must be float64, got torch\.float32"):
        inverse_root(torch.eye(3))


def test_an_unknown_precision_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=re.escape("precision 'fp8' is not known; choose one of exact, fp32, tf32")):
        polar(torch.eye(2), precision="fp8")  # type: ignore[arg-type]


@pytest.mark.parametrize("x", [torch.ones(3), torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2) * 1j])
def test_what_is_not_a_real_matrix_is_refused(x: Tensor) -> None:
    with pytest.raises(ConfigError, match="polar needs real matrices"):
        polar(x)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("method", [*LOW, "iteration"])
def test_iterations_do_not_wait_for_the_device(method: Method) -> None:
    x = torch.randn(2, 320, 300, generator=generator(0)).cuda()
    polar_by(method, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        u = polar_by(method, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative_error(u.cpu(), polar_reference(x.cpu())) <= (0.1 if method in LOW else 1e-3)
