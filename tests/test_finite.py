"""The check for gradients that are not finite: what it finds, and what it must not take for it."""

from __future__ import annotations

import pytest
import torch

from lit_symopt.errors import GradientError
from lit_symopt.finite import FiniteCheck

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("defer", [False, True])
def test_finite_numbers_whose_sum_overflows_are_finite(dtype: torch.dtype, defer: bool) -> None:
    huge = torch.full((40, 30), torch.finfo(dtype).max, dtype=dtype)
    assert not huge.sum().isfinite()
    check = FiniteCheck(defer=defer)
    admitted = check.admit(["a", "b", "c"], [torch.ones(3), huge, -huge])
    assert admitted is None or bool(admitted)
    check.raise_pending()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_anywhere_is_found_and_its_block_is_named(dtype: torch.dtype, bad: float) -> None:
    for place in (0, 17, 69_999):
        gradients = [torch.ones(5), torch.ones(70_000, dtype=dtype), torch.ones(0)]
        gradients[1][place] = bad
        with pytest.raises(GradientError, match=r"1 parameter\(s\) is not finite: 'b'\."):
            FiniteCheck().admit(["a", "b", "c"], gradients)


def test_opposite_infinities_do_not_cancel() -> None:
    gradient = torch.zeros(4, 6).t()
    gradient[1, 2], gradient[3, 1] = torch.inf, -torch.inf
    with pytest.raises(GradientError, match="'a'"):
        FiniteCheck().admit(["a"], [gradient])


def test_no_gradient_and_empty_gradients_are_finite() -> None:
    assert FiniteCheck().admit([], []) is None
    assert FiniteCheck().admit(["a"], [torch.ones(0, 3)]) is None
