"""The scales, against their formulas, and where they are refused."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from lit_symopt.errors import ConfigError
from lit_symopt.rules import RULES, get_rule, scale_factor, validate_scale
from tests.matrices import generator

SPECTRAL = ("spectral", "right_spectral", "left_spectral", "row_then_spectral")
ROW = ("row_norm", "spectral_then_row")
ALLOWED = {
    **{name: {"none", "spectral", "aspect", "rms", "nuclear"} for name in SPECTRAL},
    "row_then_spectral": {"none", "spectral", "aspect", "rms", "nuclear", "row_nuclear"},
    **{name: {"none", "rms", "row_rms", "nuclear"} for name in ROW},
    "sgd": {"none"},
    "sign": {"none", "inverse_fan_in"},
    "adamw": {"none"},
}
SCALES = ("none", "spectral", "aspect", "rms", "row_rms", "inverse_fan_in", "nuclear", "row_nuclear")


def factor(scale: str, rule: str, *, m: int = 6, n: int = 4, fan_out: int = 6, fan_in: int = 4) -> float:
    x = torch.randn(m, n, generator=generator(0))
    result = scale_factor(scale, rule=get_rule(rule), momentum=x, update=x, fan_out=fan_out, fan_in=fan_in)
    assert isinstance(result, float)
    return result


@pytest.mark.parametrize(("name", "scale"), list(product(ALLOWED, SCALES)))
def test_a_scale_that_makes_no_sense_is_an_error_that_names_rule_scale_and_choices(name: str, scale: str) -> None:
    if scale in ALLOWED[name]:
        validate_scale(scale, rule=get_rule(name))
        return
    with pytest.raises(ConfigError) as caught:
        validate_scale(scale, rule=get_rule(name))
    message = str(caught.value)
    assert repr(name) in message
    assert repr(scale) in message
    assert ", ".join(sorted(ALLOWED[name])) in message


def test_the_table_of_allowed_scales_covers_every_rule() -> None:
    assert set(ALLOWED) == set(RULES)


@pytest.mark.parametrize(("fan_out", "fan_in"), [(8, 2), (2, 8), (3, 3)])
def test_shape_scales_are_those_of_the_linear_map(fan_out: int, fan_in: int) -> None:
    shape = {"fan_out": fan_out, "fan_in": fan_in}
    for rule in SPECTRAL:
        assert factor("spectral", rule, **shape) == max(1.0, fan_out / fan_in) ** 0.5
        assert factor("aspect", rule, **shape) == (fan_out / fan_in) ** 0.5
    assert factor("inverse_fan_in", "sign", **shape) == 1 / fan_in


@pytest.mark.parametrize(("m", "n"), [(48, 16), (16, 48)])
def test_rms_gives_every_matrix_rule_entries_of_root_mean_square_0_2(m: int, n: int) -> None:
    x = torch.randn(m, n, generator=generator(0))
    for name in SPECTRAL + ROW:
        rule = get_rule(name)
        u = rule.function(x)
        scaled = u * scale_factor("rms", rule=rule, momentum=x, update=u, fan_out=m, fan_in=n)
        assert float(scaled.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-4)


def test_row_rms_gives_every_row_root_mean_square_one() -> None:
    x = torch.randn(6, 9, generator=generator(0))
    u = get_rule("row_norm").function(x)
    scaled = u * scale_factor("row_rms", rule=get_rule("row_norm"), momentum=x, update=u, fan_out=9, fan_in=6)
    torch.testing.assert_close(scaled.square().mean(dim=1), torch.ones(6))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("exponent", [-25, 0, 25])
def test_nuclear_is_a_power_of_the_nuclear_norm_of_each_matrix(alpha: float, exponent: int) -> None:
    x = torch.randn(2, 3, 6, 4, generator=generator(0)) * 10.0**exponent
    rule = get_rule("spectral")
    u = rule.function(x)
    result = scale_factor("nuclear", rule=rule, momentum=x, update=u, fan_out=6, fan_in=4, alpha=alpha)
    assert isinstance(result, torch.Tensor)
    expected = torch.linalg.svdvals(x.double()).sum(dim=-1)[..., None, None] ** alpha
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("exponent", [-12, 0, 12])
def test_row_nuclear_is_the_nuclear_norm_of_the_scaled_rows_whatever_the_size_of_the_momentum(
    centered: bool, exponent: int
) -> None:
    x = torch.randn(2, 6, 4, generator=generator(0))
    rows = x.double() - x.double().mean(dim=-2, keepdim=True) if centered else x.double()
    rows = rows / rows.norm(dim=-1, keepdim=True)
    rows = rows - rows.mean(dim=-2, keepdim=True) if centered else rows
    expected = torch.linalg.svdvals(rows).sum(dim=-1)[..., None, None]
    rule, momentum = get_rule("row_then_spectral"), x * 10.0**exponent
    u = rule.function(momentum, centered=centered, precision="exact")
    result = scale_factor("row_nuclear", rule=rule, momentum=momentum, update=u, fan_out=6, fan_in=4, centered=centered)
    assert isinstance(result, torch.Tensor)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=0)


def test_nuclear_of_a_zero_momentum_leaves_a_zero_update() -> None:
    zero = torch.zeros(2, 3, 3)
    for alpha in (0.0, 0.5, 1.0):
        result = scale_factor(
            "nuclear", rule=get_rule("row_norm"), momentum=zero, update=zero, fan_out=3, fan_in=3, alpha=alpha
        )
        assert torch.equal(result * zero, zero)


def test_nuclear_never_turns_an_ascent_around() -> None:
    one = torch.ones(1, 1)
    result = scale_factor("nuclear", rule=get_rule("spectral"), momentum=one, update=-one, fan_out=1, fan_in=1)
    assert torch.equal(torch.as_tensor(result), torch.zeros(1, 1))


@pytest.mark.parametrize("alpha", [-1.0, math.nan, math.inf])
def test_alpha_must_be_finite_and_not_negative(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"alpha=.* must be a finite number >= 0"):
        validate_scale("nuclear", rule=get_rule("spectral"), alpha=alpha)


def test_alpha_belongs_to_nuclear() -> None:
    validate_scale("nuclear", rule=get_rule("spectral"), alpha=0.5)
    with pytest.raises(ConfigError, match=r"alpha=0\.5 belongs to scale 'nuclear', not 'rms'"):
        validate_scale("rms", rule=get_rule("spectral"), alpha=0.5)
