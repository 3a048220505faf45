"""What every rule promises: symmetry, invariance to scale, descent, zeros, and to leave its argument alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_symopt.linalg import Precision
from lit_symopt.rules import Rule, get_rule, scale_factor
from tests.matrices import (
    PROPERTY,
    condition,
    generator,
    haar,
    log_uniform,
    permutation,
    polar_reference,
    relative_error,
    with_spectrum,
)

shapes = st.integers(1, 24)
seeds = st.integers(0, 2**16)
spreads = st.floats(0, 4)


def matrix(m: int, n: int, spread: float, seed: int) -> Tensor:
    return with_spectrum(m, n, log_uniform(min(m, n), spread=10**spread), seed=seed)


def group_element(rule: Rule, *, centered: bool, m: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """A random element of the rule's group; centering leaves the permutations of the rows."""
    if rule.group == "signed permutations":
        return permutation(m, seed=seed), permutation(n, seed=seed + 1)
    rotates_rows = rule.group.startswith("O(m)") and not centered
    return (haar if rotates_rows else _permute)(m, m, seed=seed), haar(n, n, seed=seed + 1)


def _permute(m: int, _: int, *, seed: int) -> Tensor:
    return permutation(m, seed=seed)


def smallest_condition(rule: Rule, x: Tensor, *, centered: bool) -> float:
    """κ of the matrix whose polar factor the rule takes, 1 if none."""
    if centered:
        x = x - x.mean(dim=0)
    if rule.name == "row_then_spectral":
        x = torch.nn.functional.normalize(x, dim=1, eps=1e-30)
        if centered:
            x = x - x.mean(dim=0)
    return condition(x) if "spectral" in rule.name and x.abs().max() > 0 else 1.0


@pytest.mark.parametrize("centered", [False, True])
@PROPERTY
@given(m=st.integers(2, 24), n=shapes, spread=st.floats(0, 4), seed=seeds)
def test_a_rule_commutes_with_its_group(rule: Rule, centered: bool, m: int, n: int, spread: float, seed: int) -> None:
    x = matrix(m, n, spread, seed)
    left, right = group_element(rule, centered=centered, m=m, n=n, seed=seed)
    kappa = smallest_condition(rule, x, centered=centered)

    in_double = rule.function(left @ x @ right, centered=centered)
    assert relative_error(in_double, left @ rule.function(x, centered=centered) @ right) <= 1e-9

    x = x.float()
    in_float = rule.function((left @ x.double() @ right).float(), centered=centered, precision="fp32")
    expected = left @ rule.function(x, centered=centered, precision="fp32").double() @ right
    assert relative_error(in_float, expected) <= max(1e-5, 5e-7 * kappa)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("precision", ["exact", "fp32", "auto"])
@PROPERTY
@given(m=st.integers(2, 24), n=shapes, spread=st.floats(0, 4), exponent=st.floats(-12, 12), seed=seeds)
def test_a_matrix_rule_does_not_see_the_scale_of_the_momentum(
    matrix_rule: Rule, centered: bool, precision: Precision, m: int, n: int, spread: float, exponent: float, seed: int
) -> None:
    x = matrix(m, n, spread, seed).float()
    scaled = (x.double() * 10**exponent).float()
    options = {"centered": centered, "precision": precision}
    kappa = smallest_condition(matrix_rule, x, centered=centered)
    u, v = matrix_rule.function(x, **options), matrix_rule.function(scaled, **options)  # type: ignore[arg-type]
    assert relative_error(v, u) <= max(1e-5, 5e-7 * kappa)


def test_analytic_scales_do_not_see_the_scale_of_the_momentum(matrix_rule: Rule) -> None:
    x = torch.randn(6, 4, generator=generator(0))
    for scale in matrix_rule.scales - {"nuclear", "row_nuclear"}:
        one, other = (
            scale_factor(scale, rule=matrix_rule, momentum=m, update=matrix_rule.function(m), fan_out=6, fan_in=4)
            for m in (x, 1e9 * x)
        )
        assert one == other


@pytest.mark.parametrize("precision", ["exact", "fp32", "bf16", "auto"])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("exponent", [-30, 30])
def test_a_bfloat16_momentum_times_a_power_of_two_gives_the_same_update_bitwise(
    matrix_rule: Rule, centered: bool, precision: Precision, exponent: int
) -> None:
    x = torch.randn(3, 9, 6, generator=generator(0)).bfloat16()
    u = matrix_rule.function(x, centered=centered, precision=precision)
    v = matrix_rule.function(x * 2.0**exponent, centered=centered, precision=precision)
    assert u.dtype == torch.bfloat16
    assert torch.equal(u, v)


@pytest.mark.parametrize(
    ("name", "centered"),
    [
        *((name, c) for name in ("row_norm", "spectral", "right_spectral", "left_spectral") for c in (False, True)),
        ("spectral_then_row", False),
        ("spectral_then_row", True),
        ("row_then_spectral", False),
    ],
)
@PROPERTY
@given(m=shapes, n=shapes, spread=spreads, seed=seeds, damping=st.sampled_from([0.0, 0.3]))
def test_the_update_points_downhill(
    name: str, centered: bool, m: int, n: int, spread: float, seed: int, damping: float
) -> None:
    x = matrix(m, n, spread, seed).float()
    for precision in ("exact", "fp32", "auto"):
        u = get_rule(name).function(x, centered=centered, precision=precision, row_damping=damping)
        assert float((x.double() * u.double()).sum()) >= -1e-7 * float(x.double().norm() * u.double().norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("centered", [False, True])
def test_zero_momentum_gives_zero_update(rule: Rule, centered: bool, dtype: torch.dtype) -> None:
    for precision in ("exact", "fp32", "bf16", "auto"):
        u = rule.function(torch.zeros(2, 5, 3, dtype=dtype), centered=centered, precision=precision, row_damping=0.1)
        assert u.dtype == dtype
        assert torch.equal(u, torch.zeros(2, 5, 3, dtype=dtype))


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 3, 2), (1, 1), (1, 4), (4, 1)])
def test_the_smallest_shapes_work(rule: Rule, centered: bool, shape: tuple[int, ...]) -> None:
    u = rule.function(torch.ones(shape), centered=centered, row_damping=0.1)
    assert u.shape == shape
    assert u.isfinite().all()
    if centered and shape[-2] == 1:
        assert torch.equal(u, torch.zeros(shape))


@pytest.mark.parametrize("precision", ["exact", "fp32", "bf16", "auto"])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_rule_is_reproducible_and_never_writes_or_returns_its_argument(
    rule: Rule, centered: bool, precision: Precision, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 30, 20, dtype=dtype, generator=generator(0))
    before = x.clone()
    u = rule.function(x, centered=centered, precision=precision, row_damping=0.1)
    assert torch.equal(u, rule.function(x, centered=centered, precision=precision, row_damping=0.1))
    u.zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize("centered", [False, True])
def test_a_batch_is_its_matrices_one_by_one(rule: Rule, centered: bool) -> None:
    x = torch.randn(2, 3, 8, 5, generator=generator(0))
    one_by_one = torch.stack([torch.stack([rule.function(b, centered=centered) for b in a]) for a in x])
    torch.testing.assert_close(rule.function(x, centered=centered), one_by_one)


# ---- definitions, in float64 by hand

DEFINITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "spectral": lambda x, _: polar_reference(x),
    "right_spectral": lambda x, _: x @ torch.linalg.inv(_root(x.mT @ x)),
    "left_spectral": lambda x, _: torch.linalg.inv(_root(x @ x.mT)) @ x,
    "row_norm": lambda x, _: _rows(x),
    "row_then_spectral": lambda x, pi: polar_reference(pi @ _rows(x)),
    "spectral_then_row": lambda x, _: _rows(polar_reference(x)),
    "sgd": lambda x, _: x,
    "sign": lambda x, _: x.sign(),
}


def _rows(x: Tensor) -> Tensor:
    return cast(Tensor, x / torch.linalg.vector_norm(x, dim=1, keepdim=True))


def _root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return cast(Tensor, (vectors * values.sqrt()) @ vectors.mT)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("exact", 1e-5), ("fp32", 1e-3), ("auto", 1e-3)])
def test_a_rule_is_its_equation(rule: Rule, centered: bool, precision: Precision, tolerance: float) -> None:
    left = rule.name == "left_spectral" and not centered  # an explicit inverse needs a Gram matrix of full rank
    m, n = (5, 7) if left else (7, 5)
    x = torch.randn(m, n, generator=generator(2))
    pi = torch.eye(m, dtype=torch.float64) - (1 / m if centered else 0)
    definition = DEFINITIONS["spectral" if rule.name == "left_spectral" and centered else rule.name]
    expected = pi @ definition(pi @ x.double(), pi)
    assert relative_error(rule.function(x, centered=centered, precision=precision), expected) <= tolerance


def test_in_exact_precision_the_three_spectral_rules_agree_with_both_gram_matrices() -> None:
    x = torch.randn(6, 6, dtype=torch.float64, generator=generator(0))
    through_right, through_left = DEFINITIONS["right_spectral"](x, x), DEFINITIONS["left_spectral"](x, x)
    for name in ("spectral", "right_spectral", "left_spectral"):
        u = get_rule(name).function(x, precision="exact")
        assert relative_error(u, through_right) < 1e-10
        assert relative_error(u, through_left) < 1e-10
