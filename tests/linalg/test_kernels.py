"""The products of the Triton kernels against float64, interpreted and on a GPU, and where kernels are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_symopt.errors import ConfigError
from lit_symopt.linalg.coefficients import MUON_QUINTIC
from lit_symopt.linalg.kernels import (
    load,
    quintic_step,
    scaled_add_product,
    symmetric_polynomial,
    symmetric_product,
)
from tests.matrices import generator
from tests.sharding.processes import Ranks
from tests.triton_places import NEEDS_TRITON, Run

SHAPES = [(1, 1), (17, 5), (5, 17), (33, 70), (3, 20, 31), (2, 1, 16, 16)]
DTYPES = [torch.float32, torch.bfloat16]

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def matrices(shape: tuple[int, ...], dtype: torch.dtype, device: str, *, seed: int = 0) -> Tensor:
    """Of Frobenius norm one each, so that a quintic neither over- nor underflows half precision."""
    x = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    norms: Tensor = torch.linalg.matrix_norm(x, keepdim=True)
    return (x / norms).to(device, dtype)


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, in roundings of the largest entry; the interpreter rounds bfloat16 towards zero."""
    rounding = ROUNDING[actual.dtype]
    if actual.dtype == torch.bfloat16 and actual.device.type == "cpu":
        rounding *= 2
    return float((actual.double() - expected).abs().max() / expected.abs().max()) / rounding


# ---- the products


def product(shape: tuple[int, ...], dtype: torch.dtype, transpose: bool, device: str) -> tuple[float, bool]:
    x = matrices(shape, dtype, device)
    a = symmetric_product(x, transpose=transpose)
    wide = x.double().mT if transpose else x.double()
    return error(a, wide @ wide.mT), torch.equal(a, a.mT)


@NEEDS_TRITON
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_symmetric_product_is_rounded_once_and_bitwise_symmetric(
    on: Run, shape: tuple[int, ...], dtype: torch.dtype, transpose: bool
) -> None:
    off, symmetric = on(product, shape, dtype, transpose)
    assert symmetric
    assert off < (5 if dtype == torch.float32 else 1.01)


def long_sum(device: str) -> tuple[bool, bool]:
    ones = torch.ones(3, 1000, dtype=torch.bfloat16, device=device)
    in_float32, in_half = symmetric_product(ones, out_dtype=torch.float32), symmetric_product(ones)
    return bool((in_float32 == 1000).all()), bool((in_half == 1000).all())


@NEEDS_TRITON
def test_sums_of_half_precision_are_in_float32(on: Run) -> None:
    """In bfloat16 a sum of ones ends at 256."""
    assert on(long_sum) == (True, True)


def polynomial(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[float, bool]:
    gram = symmetric_product(matrices(shape, dtype, device))
    p = symmetric_polynomial(gram, b=-4.7750, c=2.0315)
    exact = gram.double()
    return error(p, -4.7750 * exact + 2.0315 * exact @ exact), torch.equal(p, p.mT)


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_symmetric_polynomial_is_rounded_once_and_bitwise_symmetric(
    on: Run, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    off, symmetric = on(polynomial, shape, dtype)
    assert symmetric
    assert off < (5 if dtype == torch.float32 else 1.01)


def added(shape: tuple[int, ...], dtype: torch.dtype, transpose: bool, device: str) -> float:
    x = matrices(shape, dtype, device)
    p = symmetric_product(matrices(shape, dtype, device, seed=1), transpose=transpose)
    by = x.double() @ p.double() if transpose else p.double() @ x.double()
    return error(scaled_add_product(x, p, a=3.4445, transpose=transpose), 3.4445 * x.double() + by)


@NEEDS_TRITON
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_scaled_sum_with_a_product_is_rounded_once(
    on: Run, shape: tuple[int, ...], dtype: torch.dtype, transpose: bool
) -> None:
    assert on(added, shape, dtype, transpose) < (5 if dtype == torch.float32 else 1.01)


def step(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[float, bool]:
    x = matrices(shape, dtype, device)
    a, b, c = MUON_QUINTIC
    exact = x.double()
    gram = exact @ exact.mT
    found = quintic_step(x, MUON_QUINTIC)
    given = quintic_step(x, MUON_QUINTIC, gram=symmetric_product(x, transpose=shape[-2] > shape[-1]))
    return error(found, a * exact + (b * gram + c * gram @ gram) @ exact), torch.equal(found, given)


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_quintic_step_is_that_of_float64(on: Run, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    off, same = on(step, shape, dtype)
    assert off < 5  # three roundings, of which two are multiplied by X
    assert same


def strided(device: str) -> dict[str, bool]:
    """Whether views give what their copies give, bit for bit."""
    whole = matrices((2, 3, 9, 38), torch.float32, device)
    views = {
        "columns": whole[..., ::2],
        "rows": whole[..., 1::3, :],
        "a transposed matrix": whole.mT,
        "exchanged dimensions of the batch": whole.transpose(0, 1),
        "a repeated matrix": whole[:1, :1].expand(2, 3, -1, -1),
    }
    found = {}
    for name, x in views.items():
        copy = x.clone(memory_format=torch.contiguous_format)
        out = torch.empty_like(copy)
        given = quintic_step(x, MUON_QUINTIC, out=out) is out
        same = torch.equal(out, quintic_step(copy, MUON_QUINTIC))
        found[name] = given and same and torch.equal(symmetric_product(x), symmetric_product(copy))
    return found


@NEEDS_TRITON
def test_a_view_of_any_strides_gives_what_its_copy_gives(on: Run) -> None:
    found = on(strided)
    assert len(found) == 5
    assert all(found.values()), found


def empty(device: str) -> list[tuple[int, ...]]:
    shapes = [(0, 3), (3, 0), (2, 0, 4), (0, 4, 4)]
    assert not symmetric_product(torch.ones(3, 0, device=device)).any()
    return [tuple(quintic_step(torch.ones(shape, device=device), MUON_QUINTIC).shape) for shape in shapes]


@NEEDS_TRITON
def test_matrices_without_entries_are_no_special_case(on: Run) -> None:
    assert on(empty) == [(0, 3), (3, 0), (2, 0, 4), (0, 4, 4)]


def refused(device: str) -> list[str]:
    x = torch.ones(4, 6, device=device)
    square = torch.ones(4, 4, device=device)
    calls: list[Callable[[], object]] = [
        lambda: symmetric_product(x.double()),
        lambda: symmetric_product(x[0]),
        lambda: symmetric_product(x, out=torch.empty(6, 6, device=device)),
        lambda: symmetric_polynomial(x, b=1.0, c=1.0),
        lambda: symmetric_polynomial(square, b=1.0, c=1.0, out=square),
        lambda: scaled_add_product(x, x, a=1.0),
        lambda: scaled_add_product(x, square, a=1.0, out=x),
    ]
    found = []
    for call in calls:
        try:
            found.append(str(call()))
        except ConfigError as refusal:
            found.append(str(refusal))
    return found


@NEEDS_TRITON
def test_what_a_product_cannot_take_is_refused_by_name(on: Run) -> None:
    double, vector, misfit, oblong, shared, p, itself = on(refused)
    assert "takes bfloat16, float16, float32, got float64" in double
    assert "needs matrices [..., m, n], got shape (6,)" in vector
    assert "out must be contiguous float32 (4, 4)" in misfit
    assert "needs square matrices, got shape (4, 6)" in oblong
    assert "shares memory" in shared
    assert "p must be float32 (4, 4)" in p
    assert "shares memory" in itself


# ---- when they are asked for

SCRIPT = """
import os, sys, torch
import lit_symopt, lit_symopt.linalg.kernels as kernels
assert not [name for name in sys.modules if name.split(".")[0] == "triton"]
for attempt in range(2):
    try:
        kernels.symmetric_product(torch.ones(2, 2))
    except lit_symopt.linalg.kernels.load.ConfigError as error:
        print(error)
    os.environ["TRITON_INTERPRET"] = "1"
"""


@NEEDS_TRITON
def test_triton_is_imported_when_a_kernel_is_asked_for_and_a_cpu_without_the_interpreter_is_refused() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plain, too_late = done.stdout.splitlines()
    assert "the tensors are on 'cpu'; choose backend 'eager', or" in plain
    assert "set TRITON_INTERPRET=1 before Triton is imported" in plain
    assert "was not set when Triton was imported and is set now" in too_late


def test_without_triton_a_kernel_is_refused_with_the_command_that_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    load.require.cache_clear()
    with pytest.raises(ConfigError, match=r'pip install "lit-symopt\[triton\]", or choose backend \'eager\''):
        load.require("cuda")


def compiled() -> dict[str, dict[str, int]]:
    from profiles.kernels import resources

    return resources(widths=(1, 1024))


@NEEDS_TRITON
@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings its compiler on Linux")
@pytest.mark.slow
def test_every_kernel_compiles_for_an_h100_without_spilling_registers(tmp_path: Any) -> None:
    with Ranks(1, env={"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}, group=False) as ranks:
        (found,) = ranks(compiled)
    assert len(found) >= 20
    for name, used in found.items():
        assert used["stack"] == 0, name
        assert used["shared"] <= 227 * 1024, name


# ---- on a GPU


@NEEDS_TRITON
@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(5000, 40), (300, 70, 130), (4, 513, 2049)])
def test_matrices_of_many_tiles_are_as_right_as_small_ones(shape: tuple[int, ...]) -> None:
    """At 5,000 rows the tiles of the triangle are some thousand."""
    off, symmetric = product(shape, torch.bfloat16, False, "cuda")
    assert symmetric
    assert off < 1.05
    assert added((*shape[:-2], 512, shape[-1]), torch.bfloat16, False, "cuda") < 1.05


def by_tuning(device: str) -> list[bool]:
    """Whether every tuning gives the same bits."""
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "symmetric_product": symmetric_product,
        "quintic_step": lambda x: scaled_add_product(x, symmetric_product(x), a=2.0),
    }
    found = []
    for name, call in calls.items():
        module = import_module(f"lit_symopt.linalg.kernels.{name}")
        x = matrices((3, 300, 500), torch.bfloat16, device)
        call(x)
        tuner = module._kernel()
        configs, results = tuner.configs, []
        for config in configs:
            tuner.configs = [config]  # a single one is taken without timing
            results.append(call(x))
        tuner.configs = configs
        found.append(all(torch.equal(result, results[0]) for result in results))
    return found


@NEEDS_TRITON
@pytest.mark.gpu
def test_which_tuning_wins_does_not_change_a_bit() -> None:
    """Otherwise ranks that tune for themselves could part, and runs would not repeat."""
    assert by_tuning("cuda") == [True, True]
