"""Row scaling: unit rows at any magnitude, and the relative damping."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_symopt.rules import get_rule
from tests.matrices import PROPERTY, generator, relative_error

row_norm = get_rule("row_norm").function


@PROPERTY
@given(exponents=st.lists(st.integers(-37, 37), min_size=1, max_size=8), n=st.integers(1, 9))
def test_every_row_that_is_not_zero_gets_norm_one_however_small(exponents: list[int], n: int) -> None:
    x = torch.randn(len(exponents), n, generator=generator(n)).sign()
    x = x * 10.0 ** torch.tensor(exponents).unsqueeze(-1)
    torch.testing.assert_close(row_norm(x).norm(dim=-1), torch.ones(len(exponents)))


def test_the_smallest_float32_row_gets_norm_one_too() -> None:
    x = torch.tensor([[1e-45, 0.0], [3e38, 3e38]])
    torch.testing.assert_close(row_norm(x), torch.tensor([[1.0, 0.0], [0.5**0.5, 0.5**0.5]]))


def test_eps_guards_nothing_but_zero_rows() -> None:
    x = torch.tensor([[3e-30, 4e-30], [0.0, 0.0]])
    for eps in (0.1, 1e-8, 1e-30):
        torch.testing.assert_close(row_norm(x, eps=eps), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


@PROPERTY
@given(damping=st.floats(0.01, 2), exponent=st.integers(-30, 30), seed=st.integers(0, 99))
def test_damping_is_relative_to_the_rows_of_the_matrix(damping: float, exponent: int, seed: int) -> None:
    x = torch.randn(2, 7, 5, generator=generator(seed)) * torch.logspace(0, -4, 7).unsqueeze(-1)
    norms = x.double().norm(dim=-1, keepdim=True)
    expected = x.double() / (norms + damping * norms.square().mean(dim=-2, keepdim=True).sqrt())
    u = row_norm((x.double() * 10.0**exponent).float(), row_damping=damping)
    assert relative_error(u, expected) <= 1e-6


def test_damping_fades_a_row_that_is_small_against_the_others() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1e-3], [0.0, 1e-43], [0.0, 0.0]])
    norms = row_norm(x, row_damping=0.1).norm(dim=-1)
    assert 0.9 < norms[0] < 1
    assert 0.01 < norms[1] < 0.05
    assert norms[2] < 1e-30
    assert norms[3] == 0
