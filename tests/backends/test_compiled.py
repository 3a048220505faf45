"""Compiled steps against the eager ones, and how many graphs they take."""

from __future__ import annotations

from itertools import product
from shutil import which
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from lit_symopt.backends.compiled import polar, rates, row_step
from lit_symopt.backends.graphs import Graphs, pattern
from lit_symopt.linalg.forms import plain
from lit_symopt.linalg.low_precision import QUINTICS
from lit_symopt.linalg.newton_schulz import iterate
from lit_symopt.row_step import row_step as eager_row_step
from tests.matrices import generator

pytestmark = pytest.mark.skipif(which("g++") is None, reason="torch.compile needs a C++ compiler")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def graphs_of(run: Any) -> int:
    """How many graphs Dynamo has made in a call."""
    before = counters["stats"]["unique_graphs"]
    run()
    return int(counters["stats"]["unique_graphs"] - before)


# ---- patterns


def test_a_pattern_knows_which_sizes_are_one_or_equal() -> None:
    def of(*shapes: tuple[int, ...]) -> Any:
        return pattern(*[torch.empty(shape) for shape in shapes])

    assert of((2, 3), (3, 5)) == of((7, 4), (4, 9))
    assert of((2, 3), (3, 5)) != of((7, 4), (5, 9))
    assert of((2, 3)) != of((1, 3))
    assert of((2, 3)) != of((3, 3))
    assert pattern(torch.empty(2, 3)) != pattern(torch.empty(3, 2).mT)
    assert pattern(torch.empty(4, 6)[:, :3]) == pattern(torch.empty(9, 7)[:, :5])
    assert pattern(torch.empty(2)) != pattern(torch.empty(2).double())
    assert pattern(None) != pattern(torch.empty(1))


def test_thirty_shapes_take_one_graph() -> None:
    double = Graphs(lambda x, y: 2 * x + y)
    shapes = [(m, n) for m, n in product(range(2, 8), range(11, 16))]

    def run() -> None:
        for shape in shapes:
            x, y = randn(*shape), randn(*shape, seed=1)
            torch.testing.assert_close(double(x, y), 2 * x + y)

    assert len(shapes) == 30
    assert graphs_of(run) == 1
    assert double.compiled == 1


def test_a_function_of_its_own_is_compiled_for_every_pattern() -> None:
    """More patterns than torch.compile would bear with one function."""
    total = Graphs(lambda x: x.sum() + 1)
    shapes = [(5,) * ones + (1,) * (4 - ones) for ones in range(5)]
    shapes += [(1,) * (4 - twos) + (3,) * twos for twos in range(1, 4)]
    shapes += [(2, 3, 4, 5), (2, 2, 3, 4), (2, 3, 2, 4)]

    def run() -> None:
        for shape in shapes:
            torch.testing.assert_close(total(torch.ones(shape)), torch.tensor(float(torch.Size(shape).numel() + 1)))

    assert graphs_of(run) == total.compiled == len({pattern(torch.ones(shape)) for shape in shapes}) > 8


# ---- the polar factor


@pytest.mark.parametrize("shape", [(2, 24, 24), (3, 20, 40), (3, 56, 16), (16, 48)])
@pytest.mark.parametrize("form", [plain(5), (2, 1, 2)])
def test_the_polar_factor_is_the_eager_one(shape: tuple[int, ...], form: Any) -> None:
    x = randn(*shape)
    before = x.clone()
    found = polar(x, QUINTICS, form=form)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    assert torch.equal(x, before)
    eager = iterate(x.bfloat16(), QUINTICS, form=form).float()
    # Eight bits, five steps; the eager result is this far from float64 too.
    assert (found - eager).norm() < 0.03 * eager.norm()
    assert torch.equal(polar(x, QUINTICS, form=form), found)


def test_the_polar_factor_does_not_see_how_large_matrices_are() -> None:
    x = torch.cat([randn(3, 20, 40), torch.zeros(1, 20, 40), torch.full((1, 20, 40), torch.nan)])
    found = polar(x, QUINTICS, form=plain(5))
    for size in (2.0**-100, 2.0**100):
        torch.testing.assert_close(polar(size * x, QUINTICS, form=plain(5)), found, rtol=0, atol=0, equal_nan=True)
    assert not found[3].any()
    assert found[4].isnan().all()


# ---- the row step


OPTIONS: list[dict[str, Any]] = [
    {},
    {"beta": 0.9},
    {"beta": 0.9, "nesterov": True},
    {"beta": 0.9, "row_damping": 0.1},
    {"beta": 0.9, "centered": True},
    {"beta": 0.9, "centered": True, "row_damping": 0.1, "nesterov": True},
]


def both(
    shape: tuple[int, ...], options: dict[str, Any], *, steps: int = 3, half: bool = False, refused: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Weight, momentum and parameter after some steps, compiled and eager."""
    results = []
    for step in (row_step, eager_row_step):
        weight = randn(*shape)
        momentum = torch.zeros(shape) if options.get("beta") else None
        parameter = weight.bfloat16() if half else None
        for index in range(steps):
            gradient = randn(*shape, seed=1 + index) + 3
            step(
                weight,
                gradient.bfloat16() if half else gradient,
                momentum,
                lr=1e-2 / (1 + index),
                weight_decay=0.1,
                scale=0.2 * shape[-1] ** 0.5,
                parameter=parameter,
                admitted=torch.tensor(False) if refused else None,
                **options,
            )
        results.append([tensor for tensor in (weight, momentum, parameter) if tensor is not None])
    return results[0], results[1]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_row_step_is_the_eager_one(options: dict[str, Any]) -> None:
    for shape in [(40, 24), (3, 20, 33)]:
        found, eager = both(shape, options)
        for one, other in zip(found, eager, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)
        again, _ = both(shape, options)
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_a_parameter_in_half_precision_gets_the_rounded_weight() -> None:
    (weight, _, parameter), (_, _, eager) = both((40, 24), {"beta": 0.9}, half=True)
    assert torch.equal(parameter, weight.bfloat16())
    torch.testing.assert_close(parameter, eager)


def test_a_refused_step_changes_nothing() -> None:
    (weight, momentum), _ = both((40, 24), {"beta": 0.9}, refused=True)
    assert torch.equal(weight, randn(40, 24))
    assert not momentum.any()


def test_rows_of_any_size_have_norm_one() -> None:
    sizes = torch.tensor([0.0, 1e-44, 1e-38, 1e-20, 1.0, 1e20, 1e37]).unsqueeze(1)
    gradient = sizes * torch.tensor([[3.0, -4.0]])
    weight = torch.zeros(7, 2)
    row_step(weight, gradient, lr=1.0)
    norms = weight.norm(dim=1)
    assert norms[0] == 0
    torch.testing.assert_close(norms[1:], torch.ones(6))


def test_rates_that_change_compile_nothing_new() -> None:
    weight, momentum = randn(40, 24), torch.zeros(40, 24)

    def run(rate: float | Tensor, decay: float | Tensor) -> None:
        row_step(weight, randn(40, 24, seed=1), momentum, lr=rate, weight_decay=decay, beta=0.9)

    run(0.1, 0.1)

    def schedule() -> None:
        for step in range(2, 30):
            run(0.1 / step, 0.01 * step)

    assert graphs_of(schedule) == 0
    assert graphs_of(lambda: run(torch.tensor(0.1), torch.tensor(0.2))) == 0


def test_rates_that_are_tensors_are_those_that_are_numbers() -> None:
    numbers = rates(0.1, 0.5, scale=2.0, device=torch.device("cpu"))
    tensors = rates(torch.tensor(0.1, dtype=torch.float64), 0.5, scale=2.0, device=torch.device("cpu"))
    assert numbers == tensors


@pytest.mark.slow
def test_a_model_of_thirty_shapes_compiles_and_runs() -> None:
    shapes = [(m, n) for m in (1, 6, 17, 32, 48) for n in (2, 5, 17, 24, 32, 48)]
    assert len(shapes) == 30

    def run() -> None:
        for shape, options in product(shapes, OPTIONS[3:5]):
            found, eager = both(shape, options, steps=1)
            torch.testing.assert_close(found, eager, rtol=2e-5, atol=1e-6)
        for shape in shapes:
            x = randn(2, *shape)
            by_torch = iterate(x.bfloat16(), QUINTICS).float()
            assert (polar(x, QUINTICS, form=plain(5)) - by_torch).norm() < 0.05 * by_torch.norm()

    first = graphs_of(run)
    # Momentum and the rest are two graphs of each row step.
    assert first < 2 * len(shapes)
    assert graphs_of(run) == 0
