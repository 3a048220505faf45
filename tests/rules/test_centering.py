"""The quotient by the shift 1aᵀ that all rows share."""

from __future__ import annotations

import pytest
import torch

from lit_symopt.linalg import Precision
from lit_symopt.rules import Rule, get_rule, project
from tests.matrices import generator, relative_error

PRECISIONS: list[Precision] = ["exact", "fp32", "auto"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_centered_update_has_no_shift(rule: Rule, precision: Precision, dtype: torch.dtype) -> None:
    x = torch.randn(40, 6, dtype=dtype, generator=generator(0)) + 3
    u = rule.function(x, centered=True, precision=precision)
    assert u.sum(dim=0).abs().max() <= 40 * torch.finfo(dtype).eps * u.abs().max()


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e5])
@pytest.mark.parametrize("precision", [*PRECISIONS, "bf16"])
def test_a_centered_rule_does_not_see_a_shift(matrix_rule: Rule, precision: Precision, size: float) -> None:
    # Integers, so that the shifted matrix is the same matrix: float32 holds every entry exactly.
    x = torch.randint(-50, 50, (12, 5), generator=generator(0)).float()
    shift = (size * torch.tensor([3.0, -7.0, 1.0, 0.0, 9.0])).round()
    u = matrix_rule.function(x, centered=True, precision=precision)
    v = matrix_rule.function(x + shift, centered=True, precision=precision)
    assert relative_error(v, u) <= (0.05 if precision == "bf16" else 1e-5)


@pytest.mark.parametrize("precision", [*PRECISIONS, "bf16"])
@pytest.mark.parametrize("rows", [1, 3, 50, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_pure_shift_gives_no_update(rule: Rule, precision: Precision, rows: int, dtype: torch.dtype) -> None:
    shift = torch.randn(6, generator=generator(0)).to(dtype).expand(rows, 6)
    assert rule.function(shift, centered=True, precision=precision).eq(0).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_pure_shift_with_the_rounding_of_a_float32_sum_gives_no_update(rule: Rule, precision: Precision) -> None:
    shift = torch.randn(6, dtype=torch.float64, generator=generator(0))
    signs = torch.randn(50, 6, dtype=torch.float64, generator=generator(1)).sign()
    x = (shift * (1 + torch.finfo(torch.float32).eps * signs)).float()
    assert rule.function(x, centered=True, precision=precision).eq(0).all()


def test_a_row_that_is_the_mean_gets_no_step_of_its_own() -> None:
    # Π M has a zero row in the middle; row_norm must not turn its rounding into a unit row.
    x = torch.tensor([[1.0, 0.1], [0.3, 0.7], [-0.4, 1.3]], dtype=torch.float64).float()
    x[1] = (x[0].double() + x[2].double()).div(2).float()
    u = get_rule("row_norm").function(x, centered=True)
    torch.testing.assert_close(u[1], torch.zeros(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("columns", [4, 20])
def test_a_zero_row_of_an_uncentered_momentum_stays_zero(rule: Rule, columns: int) -> None:
    x = torch.randn(9, columns, generator=generator(0))
    x[5] = 0
    for precision in (*PRECISIONS, "bf16"):
        assert rule.function(x, precision=precision)[5].abs().max() <= 1e-6


def test_projection_is_accurate_relative_to_what_remains() -> None:
    x = torch.randn(100, 8, generator=generator(0)) + 1e4
    expected = x.double() - x.double().mean(dim=0)
    assert relative_error(project(x), expected) <= 1e-6


def test_projection_works_on_batches_and_is_idempotent() -> None:
    x = torch.randn(2, 3, 10, 4, generator=generator(0), dtype=torch.float64)
    once = project(x)
    torch.testing.assert_close(project(once), once, rtol=0, atol=1e-15)
    torch.testing.assert_close(once.sum(dim=-2), torch.zeros(2, 3, 4, dtype=torch.float64), rtol=0, atol=1e-14)
