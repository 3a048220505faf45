"""Row shards: every rank gets its rows of what the rule gives on the whole matrix. Oracle: the rule on all rows.

The ranks are threads (`tests/row_shards.py`), so the arithmetic is real.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_symopt.errors import ConfigError
from lit_symopt.linalg import Precision
from lit_symopt.linalg.polar import polar_by
from lit_symopt.rules import RULES, Rule, get_rule, project, scale_factor
from lit_symopt.rules.rows import POLAR, RowShards, payload
from tests.matrices import PROPERTY, generator, haar, log_uniform, relative_error, with_spectrum
from tests.row_shards import Meeting, on_shards, put_together

K, M, N = 3, 40, 5
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
FUNCTIONS = [name for name in RULES if name != "adamw"]
# A polar factor of float64 needs the whole matrix; its error is tested at the end.
ON_SHARDS = [(name, dtype) for name in FUNCTIONS for dtype in TOLERANCE if dtype == torch.float32 or name not in POLAR]

# How many rows of each of the K matrices lie on each rank: equal shards, then uneven and empty ones, and then
# matrices of one batch that are cut at different places.
SHARDS: dict[str, list[tuple[int, int, int]]] = {
    "one rank": [(40, 40, 40)],
    "two halves": [(20, 20, 20), (20, 20, 20)],
    "two uneven": [(33, 0, 7), (7, 40, 33)],
    "three, one empty": [(14, 14, 14), (0, 0, 0), (26, 26, 26)],
    "three uneven": [(1, 38, 40), (0, 1, 0), (39, 1, 0)],
}


def scaled_update(rule: Rule, scale: str, m: Tensor, options: dict[str, Any], **rows: Any) -> Tensor:
    """`scale · U` as the optimizer computes it."""
    update = rule.function(m, **options, **rows)
    chosen = {key: options[key] for key in ("centered", "row_damping")}
    given: dict[str, Any] = {"rule": rule, "momentum": m, "update": update, "fan_out": M, "fan_in": N}
    return update * scale_factor(scale, **given, **chosen, alpha=0.7, **rows)


def scaled_update_on_shards(rule: Rule, scale: str, options: dict[str, Any]) -> Callable[[Tensor, RowShards], Tensor]:
    """The same as a function of what a rank holds."""
    return lambda local, rows: scaled_update(rule, scale, local, options, rows=rows)


def momentum(dtype: torch.dtype, *, m: int = M, n: int = N, seed: int = 0) -> Tensor:
    """A shifted batch with rows of very different sizes, one of them zero; well conditioned, so that rounding stays."""
    x = torch.randn(K, m, n, dtype=torch.float64, generator=generator(seed)) + torch.arange(1.0, n + 1)
    x[:, ::7] *= 1e-3
    x[:, 3] = 0
    return x.to(dtype)


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("name", "dtype"), ON_SHARDS)
def test_every_rank_gets_its_rows_of_the_whole_update(
    name: str, dtype: torch.dtype, centered: bool, damping: float, shards: str
) -> None:
    rule, counts, x = get_rule(name), SHARDS[shards], momentum(dtype)
    options = {"centered": centered, "row_damping": damping, "precision": "fp32"}
    for scale in sorted(rule.scales):
        expected = scaled_update(rule, scale, x, options)
        results, meeting = on_shards(counts, x, scaled_update_on_shards(rule, scale, options))
        assert {result.dtype for result in results} == {dtype}
        assert relative_error(put_together(counts, results), expected) <= TOLERANCE[dtype]
        planned = payload(
            rule.name, n=N, centered=centered, scale=scale, row_damping=damping, dtype=dtype, precision="fp32"
        )
        assert meeting.bytes == [K * planned] * len(counts)


@pytest.mark.parametrize("precision", ["exact", "bf16", "auto"])
@pytest.mark.parametrize("name", ["row_norm", "sgd", "sign"])
def test_row_rules_are_the_same_on_shards_in_every_precision(name: str, precision: Precision) -> None:
    counts, x, rule = SHARDS["three uneven"], momentum(torch.float32), get_rule(name)
    options: dict[str, Any] = {"centered": True, "row_damping": 0.1, "precision": precision}
    results, _ = on_shards(counts, x, lambda local, rows: rule.function(local, rows=rows, **options))
    assert relative_error(put_together(counts, results), rule.function(x, **options)) <= 1e-6


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("name", sorted(POLAR))
def test_float32_intermediates_of_polar_rules_agree_to_the_rounding_they_start_from(name: str, centered: bool) -> None:
    # On a CPU `auto` decomposes, but keeps float32 in between: the projected matrix is rounded once on shards and twice
    # where it is whole, and the polar factor magnifies that by the condition, about 10 here.
    counts, x, rule = SHARDS["three uneven"], momentum(torch.float32), get_rule(name)
    results, _ = on_shards(counts, x, lambda local, rows: rule.function(local, centered=centered, rows=rows))
    assert relative_error(put_together(counts, results), rule.function(x, centered=centered)) <= 2e-6


@PROPERTY
@given(data=st.data(), seed=st.integers(0, 2**16), exponent=st.integers(-36, 30), n=st.integers(1, 6))
def test_however_the_rows_are_dealt_out(
    matrix_rule: Rule, data: st.DataObject, seed: int, exponent: int, n: int
) -> None:
    world, m = data.draw(st.integers(1, 3)), data.draw(st.integers(4 * n, 8 * n))
    cuts = [sorted(data.draw(st.lists(st.integers(0, m), min_size=world - 1, max_size=world - 1))) for _ in range(K)]
    edges = [[0, *cut, m] for cut in cuts]
    counts = [tuple(edge[rank + 1] - edge[rank] for edge in edges) for rank in range(world)]
    spectrum = log_uniform(n, spread=10)
    x = torch.stack([with_spectrum(m, n, spectrum, seed=seed + k) for k in range(K)])
    x = (10.0**exponent * x).float()
    for centered in (False, True):
        options: dict[str, Any] = {"centered": centered, "row_damping": 0.1, "precision": "fp32"}
        results, _ = on_shards(counts, x, scaled_update_on_shards(matrix_rule, "none", options))
        assert relative_error(put_together(counts, results), matrix_rule.function(x, **options)) <= 1e-6


# ---- what is exchanged

F32 = torch.float32
SUM, MAX = "sum", "max"
EXCHANGED: list[tuple[str, bool, float, str, torch.dtype, list[tuple[str, int]]]] = [
    ("row_norm", False, 0.0, "none", F32, []),
    ("row_norm", False, 0.0, "rms", F32, []),
    ("row_norm", False, 0.3, "none", F32, [(SUM, 3)]),
    ("row_norm", True, 0.0, "none", F32, [(SUM, 15), (SUM, 15)]),
    ("row_norm", True, 0.3, "nuclear", F32, [(SUM, 15), (SUM, 3), (SUM, 15), (SUM, 3)]),
    ("row_norm", False, 0.3, "none", torch.float64, [(MAX, 3), (SUM, 3)]),
    ("row_norm", True, 0.0, "none", torch.float64, [(SUM, 15)] * 4),
    ("spectral", False, 0.3, "none", F32, [(SUM, 45)]),
    ("left_spectral", True, 0.0, "aspect", F32, [(SUM, 15), (SUM, 45), (SUM, 15)]),
    ("spectral_then_row", True, 0.3, "none", F32, [(SUM, 15), (SUM, 45), (SUM, 3), (SUM, 15)]),
    ("row_then_spectral", True, 0.3, "none", F32, [(SUM, 15), (SUM, 3), (SUM, 15), (SUM, 45), (SUM, 15)]),
    ("row_then_spectral", False, 0.0, "row_nuclear", F32, [(SUM, 45), (SUM, 3)]),
    ("sign", True, 0.0, "inverse_fan_in", F32, [(SUM, 15), (SUM, 15)]),
    ("sgd", False, 0.0, "none", F32, []),
]


@pytest.mark.parametrize(("name", "centered", "damping", "scale", "dtype", "expected"), EXCHANGED)
def test_a_rule_exchanges_what_its_table_says_in_that_order(
    name: str, centered: bool, damping: float, scale: str, dtype: torch.dtype, expected: list[tuple[str, int]]
) -> None:
    rule = get_rule(name)
    options = {"centered": centered, "row_damping": damping, "precision": "fp32"}
    _, meeting = on_shards(
        SHARDS["three uneven"],
        momentum(dtype),
        scaled_update_on_shards(rule, scale, options),
    )
    assert meeting.calls == [[(how, torch.float64, numbers) for how, numbers in expected]] * 3


def test_centering_an_adamw_step_exchanges_one_row() -> None:
    x = momentum(torch.float32)
    results, meeting = on_shards(SHARDS["two uneven"], x, lambda local, rows: project(local, rows=rows))
    assert relative_error(put_together(SHARDS["two uneven"], results), project(x)) <= 1e-6
    one = payload("adamw", n=N, centered=True, scale="none", row_damping=0.0, dtype=torch.float32, precision="auto")
    assert one == 8 * N
    assert meeting.bytes == [K * one] * 2


# ---- corners


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e38])
def test_the_smallest_and_largest_float32_momentum_has_the_same_update(
    matrix_rule: Rule, size: float, centered: bool
) -> None:
    x = torch.randint(-3, 4, (K, M, N), generator=generator(1)).double().mul(size).float()
    counts = SHARDS["three uneven"]
    options: dict[str, Any] = {"centered": centered, "precision": "fp32", "row_damping": 0.1}
    results, _ = on_shards(counts, x, lambda local, rows: matrix_rule.function(local, rows=rows, **options))
    assert relative_error(put_together(counts, results), matrix_rule.function(x, **options)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e5])
def test_a_shift_much_larger_than_the_rest_is_taken_away_on_shards_too(dtype: torch.dtype, size: float) -> None:
    # Integers, which float32 holds exactly, so that the oracle is the matrix without the shift.
    x = torch.randint(-50, 50, (K, M, N), generator=generator(0)).to(dtype)
    counts = SHARDS["two uneven"]
    shift = (size * torch.tensor([3.0, -7.0, 1.0, 0.0, 9.0])).to(dtype)
    results, _ = on_shards(counts, x + shift, lambda local, rows: project(local, rows=rows))
    expected = x.double() - x.double().mean(dim=-2, keepdim=True)
    assert relative_error(put_together(counts, results), expected) <= (1e-7 if dtype == torch.float32 else 1e-15)


@pytest.mark.parametrize(("name", "dtype"), ON_SHARDS)
def test_a_pure_shift_gives_no_update_on_shards(name: str, dtype: torch.dtype) -> None:
    rule = get_rule(name)
    x = torch.randn(K, 1, N, generator=generator(0), dtype=dtype).expand(K, M, N).contiguous()
    options: dict[str, Any] = {"centered": True, "precision": "fp32"}
    results, _ = on_shards(SHARDS["three uneven"], x, lambda local, rows: rule.function(local, rows=rows, **options))
    assert all(result.eq(0).all() for result in results)


def test_zero_momentum_gives_zero_updates_and_factors_on_shards(rule: Rule) -> None:
    options = {"centered": True, "row_damping": 0.1, "precision": "fp32"}
    for scale in sorted(rule.scales):
        results, _ = on_shards(
            SHARDS["three, one empty"],
            torch.zeros(K, M, N),
            scaled_update_on_shards(rule, scale, options),
        )
        assert all(result.eq(0).all() for result in results)


def test_a_rank_without_a_row_may_also_bring_an_empty_tensor(rule: Rule) -> None:
    x, meeting = momentum(torch.float32), Meeting(2)
    options = {"centered": True, "row_damping": 0.1, "precision": "fp32"}
    shards = [x[:, :0], x]

    def run(rank: int, scale: str) -> Tensor:
        rows = RowShards(count=M, valid=None, all_reduce=meeting.all_reduce(rank))
        return scaled_update(rule, scale, shards[rank], options, rows=rows)

    for scale in sorted(rule.scales):
        with ThreadPoolExecutor(2) as pool:
            empty, full = pool.map(run, range(2), [scale] * 2)
        assert empty.shape == (K, 0, N)
        assert relative_error(full, scaled_update(rule, scale, x, options)) <= 1e-6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_entry_that_is_not_finite_on_one_rank_spoils_its_whole_matrix_and_no_other(bad: float) -> None:
    x = momentum(torch.float32)
    x[1, 39, 2] = bad
    results, _ = on_shards(SHARDS["two halves"], x, lambda local, rows: get_rule("spectral").function(local, rows=rows))
    for result in results:
        assert result[1].isnan().all()
        assert result[[0, 2]].isfinite().all()


def test_the_momentum_is_never_written_or_returned(rule: Rule) -> None:
    x = momentum(torch.float32)
    before = x.clone()
    options: dict[str, Any] = {"centered": True, "row_damping": 0.1, "precision": "fp32"}
    reduce = Meeting(1).all_reduce(0)
    rows = RowShards(count=M, valid=None, all_reduce=reduce)
    rule.function(x, rows=rows, **options).fill_(7.0)
    rule.function(x, rows=rows, precision="fp32").fill_(7.0)
    assert torch.equal(x, before)


def test_the_gram_matrix_by_iteration_works_on_shards() -> None:
    # What an accelerator does above 256 columns, called by its name here.
    x = torch.stack([with_spectrum(60, 12, log_uniform(12, spread=1e3), seed=k) for k in range(K)]).float()
    counts = [(20, 60, 0), (40, 0, 60)]
    results, _ = on_shards(counts, x, lambda local, rows: polar_by("iteration", local, rows=rows))
    assert relative_error(put_together(counts, results), polar_by("iteration", x)) <= 1e-6


# ---- what row shards cannot do


@pytest.mark.parametrize(
    ("precision", "dtype", "says"),
    [("exact", torch.float32, "'svd'"), ("bf16", torch.float32, "'bf16'"), ("fp32", torch.float64, "'svd'")],
)
def test_a_polar_factor_that_needs_the_whole_matrix_is_refused(
    precision: Precision, dtype: torch.dtype, says: str
) -> None:
    rows = RowShards(count=M, valid=None, all_reduce=Meeting(1).all_reduce(0))
    for name in sorted(POLAR):
        with pytest.raises(ConfigError, match=f"by {says}.*put the matrix together"):
            get_rule(name).function(momentum(dtype), precision=precision, rows=rows)
        with pytest.raises(ConfigError, match="needs whole matrices"):
            payload(name, n=N, centered=False, scale="none", row_damping=0.0, dtype=dtype, precision=precision)


def test_a_matrix_with_more_columns_than_rows_is_refused() -> None:
    rows = RowShards(count=4, valid=None, all_reduce=Meeting(1).all_reduce(0))
    with pytest.raises(ConfigError, match="not of 4 x 5 by 'eigh'"):
        get_rule("spectral").function(haar(5, 4, seed=0).mT[None].float(), precision="fp32", rows=rows)


def test_adamw_says_on_shards_too_that_it_is_not_a_function_of_the_momentum() -> None:
    rows = RowShards(count=M, valid=None, all_reduce=Meeting(1).all_reduce(0))
    with pytest.raises(ConfigError, match="not a function of the momentum"):
        RULES["adamw"].function(momentum(torch.float32), rows=rows)


def test_a_payload_of_an_impossible_scale_is_refused() -> None:
    with pytest.raises(ConfigError, match="makes no sense after rule 'row_norm'"):
        payload("row_norm", n=N, centered=False, scale="aspect", row_damping=0.0, dtype=torch.float32, precision="auto")
