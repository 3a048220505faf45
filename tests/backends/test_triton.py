"""The products of the Triton backend in the iteration and in the polar factor, against torch's, in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lit_symopt.backends.kernels import TRITON
from lit_symopt.backends.polar import polar_by_backend
from lit_symopt.backends.rows import row_step_by_backend
from lit_symopt.errors import ConfigError
from lit_symopt.linalg.execution import Execution
from lit_symopt.linalg.low_precision import QUINTICS
from lit_symopt.linalg.newton_schulz import PYTORCH, iterate
from lit_symopt.scratch import Arena
from tests.matrices import generator
from tests.triton_places import NEEDS_TRITON, Run

pytestmark = NEEDS_TRITON


def products(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> dict[str, float]:
    """The largest differences from float64, relative to the largest entry; buffers are pieces of one block."""
    arena = Arena()
    found: dict[str, float] = {}
    for _ in range(2):  # the second time all pieces are there
        with arena.lend():
            x = arena.empty(shape, dtype=dtype, device=device).copy_(torch.randn(shape, generator=generator(0)) / 8)
            tall = shape[-2] > shape[-1]
            side = min(shape[-2:])
            gram, p = (arena.empty((shape[0], side, side), dtype=dtype, device=device) for _ in range(2))
            out = arena.like(x)
            TRITON.gram(x, tall=tall, out=gram)
            wide = x.double()
            found["gram"] = _error(gram, wide.mT @ wide if tall else wide @ wide.mT)
            for a in (0.0, 3.0):
                TRITON.polynomial(gram, a=a, b=-2.0, c=1.5, out=p)
                g = gram.double()
                expected = a * torch.eye(side, dtype=g.dtype, device=device) - 2.0 * g + 1.5 * g @ g
                found[f"polynomial, {a}"] = _error(p, expected)
                TRITON.multiply(x, p, a=a, tall=tall, out=out)
                product = wide @ p.double() if tall else p.double() @ wide
                found[f"multiply, {a}"] = _error(out, a * wide + product)
            found["asymmetry"] = _error(p, p.mT.double())
    return found


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("shape", [(2, 16, 16), (3, 17, 40), (3, 40, 17), (1, 5, 1), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_three_products_are_those_of_float64(on: Run, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # The interpreter rounds bfloat16 towards zero, and a I is added after a rounding.
    bound = 2.0**-6 if dtype == torch.bfloat16 else 2.0**-20
    errors = on(products, shape, dtype)
    assert errors.pop("asymmetry") == 0
    assert max(errors.values()) < bound, errors


def iterations(shape: tuple[int, ...], form: Any, device: str) -> float:
    x = torch.randn(shape, generator=generator(1)).to(device, torch.bfloat16)
    found, eager = (iterate(x, QUINTICS, form=form, products=products).double() for products in (TRITON, PYTORCH))
    return float((found - eager).norm() / eager.norm())


@pytest.mark.parametrize("shape", [(2, 24, 24), (2, 20, 70), (2, 70, 20), (2, 2, 16, 40)])
@pytest.mark.parametrize("form", [(1, 1, 1, 1, 1), (2, 1, 2)])
def test_an_iteration_is_that_of_torchs_products(on: Run, shape: tuple[int, ...], form: Any) -> None:
    assert on(iterations, shape, form) < 0.06


def polar_factors(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[float, bool, bool, bool]:
    x = torch.randn(shape, generator=generator(2)).to(device, dtype).mT[..., ::2]
    arena = Arena()
    results = []
    for _ in range(3):
        with arena.lend():
            results.append(polar_by_backend(x, Execution("triton", arena)).clone())
    eager = polar_by_backend(x, Execution("eager"))
    error = (results[0].double() - eager.double()).norm() / eager.double().norm()
    same = all(torch.equal(results[0], other) for other in results[1:])
    return float(error), same, results[0].dtype == dtype, results[0].shape == x.shape


@pytest.mark.parametrize("shape", [(2, 40, 18), (3, 17, 66), (24, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_polar_factor_of_strided_views_in_borrowed_memory(
    on: Run, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    error, *same = on(polar_factors, shape, dtype)
    assert error < 0.06
    assert all(same)


def out_of_what_is_read(device: str) -> list[str]:
    block = torch.zeros(3, 8, 8, dtype=torch.bfloat16, device=device)
    refused = []
    calls: dict[str, Callable[[], None]] = {
        "gram": lambda: TRITON.gram(block[:1], tall=False, out=block[:1]),
        "polynomial": lambda: TRITON.polynomial(block[:1], a=0.0, b=1.0, c=1.0, out=block[:1]),
        "multiply": lambda: TRITON.multiply(block[:1], block[1:2], a=1.0, tall=False, out=block[1:2]),
        "neighbours": lambda: TRITON.multiply(block[:1], block[1:2], a=1.0, tall=False, out=block[2:]),
    }
    for name, call in calls.items():
        try:
            call()
        except ConfigError:
            refused.append(name)
    return refused


def test_results_may_lie_beside_what_is_read_but_not_upon_it(on: Run) -> None:
    assert on(out_of_what_is_read) == ["gram", "polynomial", "multiply"]


def row_steps(shape: Sequence[int], options: dict[str, Any], half: bool, device: str) -> float:
    """The largest difference of weights and momenta from those of eager after some steps, in units of lr·scale."""
    lr, scale = torch.full((), 1e-2, device=device), 0.2 * shape[-1] ** 0.5
    results = []
    for backend in ("triton", "eager"):
        weight, momentum = torch.randn(shape, generator=generator(3)).to(device), torch.zeros(shape, device=device)
        parameter = weight.bfloat16() if half else None
        for step in range(3):
            gradient = (torch.randn(shape, generator=generator(4 + step)) + 3).to(device)
            row_step_by_backend(
                weight,
                gradient.bfloat16() if half else gradient,
                momentum,
                how=Execution(backend),
                lr=lr if backend == "triton" else 1e-2,
                weight_decay=0.1,
                beta=0.9,
                scale=scale,
                parameter=parameter,
                admitted=torch.tensor(True, device=device),
                **options,
            )
        results.append((weight, momentum))
    largest: float = max(float((one - other).abs().max()) for one, other in zip(*results, strict=True))
    size: float = 1e-2 * scale
    return largest / size


@pytest.mark.parametrize("shape", [(40, 24), (2, 20, 33)])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("options", [{}, {"row_damping": 0.1, "nesterov": True}, {"centered": True}], ids=str)
def test_a_row_step_is_the_eager_one(on: Run, shape: tuple[int, ...], options: dict[str, Any], half: bool) -> None:
    assert on(row_steps, shape, options, half) < 2e-4


def test_the_package_has_no_row_step() -> None:
    how = Execution("gram-newton-schulz")
    with pytest.raises(ConfigError, match="gram-newton-schulz"):
        row_step_by_backend(torch.zeros(2, 2), torch.zeros(2, 2), how=how, lr=0.1)
