"""The quintics, against the published tables and against what defines them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_symopt.linalg.coefficients import (
    MUON_QUINTIC,
    PUBLISHED_CUSHION,
    PUBLISHED_POLAR_EXPRESS,
    Quintic,
    minimax_quintic,
    polar_express,
)
from lit_symopt.linalg.newton_schulz import GRAM_LOWER, GRAM_STEPS
from tests.matrices import PROPERTY


def compose(quintics: tuple[Quintic, ...], x: Tensor) -> Tensor:
    for a, b, c in quintics:
        x = a * x + b * x**3 + c * x**5
    return x


def worst(quintic: Quintic, lower: float, upper: float) -> float:
    x = torch.linspace(lower, upper, 20001, dtype=torch.float64)
    return float((1 - compose((quintic,), x)).abs().max())


def grid(lower: float) -> Tensor:
    return torch.logspace(float(torch.tensor(lower, dtype=torch.float64).log10()), 0, 20001, dtype=torch.float64)


def test_polar_express_is_the_published_table() -> None:
    ours = polar_express(lower=1e-3, steps=8, cushion=PUBLISHED_CUSHION)
    torch.testing.assert_close(
        torch.tensor(ours, dtype=torch.float64),
        torch.tensor(PUBLISHED_POLAR_EXPRESS, dtype=torch.float64),
        rtol=0,
        atol=1e-8,  # the last row is printed as its limit
    )


@PROPERTY
@given(lower=st.floats(1e-4, 0.9), moved=st.tuples(*3 * [st.floats(-1, 1)]), size=st.floats(1e-6, 1e-1))
def test_no_other_quintic_is_closer_to_one(lower: float, moved: tuple[float, float, float], size: float) -> None:
    best = minimax_quintic(lower, 1.0)
    a, b, c = (p + size * d for p, d in zip(best, moved, strict=True))
    assert worst((a, b, c), lower, 1.0) >= worst(best, lower, 1.0) * (1 - 1e-6)


@PROPERTY
@given(lower=st.floats(1e-4, 0.99))
def test_the_minimax_error_is_taken_at_both_ends_with_opposite_sign(lower: float) -> None:
    quintic = minimax_quintic(lower, 1.0)
    ends = 1 - compose((quintic,), torch.tensor([lower, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends[0], -ends[1], rtol=1e-6, atol=1e-12)
    assert float(ends[0]) == pytest.approx(worst(quintic, lower, 1.0), rel=1e-6, abs=1e-12)


def test_the_gram_iteration_converges_on_all_that_is_promised() -> None:
    error = (1 - compose(polar_express(lower=GRAM_LOWER, steps=GRAM_STEPS), grid(GRAM_LOWER))).abs().max()
    assert error < 1e-6


def test_five_muon_steps_bring_all_but_the_smallest_into_the_documented_range() -> None:
    singular_values = compose(5 * (MUON_QUINTIC,), grid(5e-3))
    assert singular_values.min() > 0.66
    assert singular_values.max() < 1.22


def test_safety_divides_the_argument_of_all_but_the_last_step() -> None:
    plain = polar_express(lower=1e-2, steps=3)
    safe = polar_express(lower=1e-2, steps=3, safety=1.02)
    for (a, b, c), (d, e, f) in zip(plain[:2], safe[:2], strict=True):
        assert (d, e, f) == pytest.approx((a / 1.02, b / 1.02**3, c / 1.02**5))
    assert safe[2] == plain[2]


@pytest.mark.parametrize(
    "bad", [{"lower": 0.0}, {"lower": 1.5}, {"steps": 0}, {"cushion": 1.0}, {"cushion": -0.1}, {"safety": 0.9}]
)
def test_bounds_that_make_no_sense_are_refused(bad: dict[str, float]) -> None:
    options = {"lower": 1e-3, "steps": 5} | bad
    with pytest.raises(ValueError, match="polar_express needs"):
        polar_express(**options)
