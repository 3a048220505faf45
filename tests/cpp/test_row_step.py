"""The step of row_norm in C++, against the eager one, float64 by hand, and itself in other layouts and threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_symopt.cpp.row_step import CHUNK, GATHERED, SMALL, row_step, scratch_bytes
from lit_symopt.errors import ConfigError
from lit_symopt.row_step import row_step as eager_row_step
from lit_symopt.scratch import Arena
from tests.cpp.places import NEEDS_COMPILER
from tests.matrices import generator
from tests.row_steps import (
    DECAY,
    LR,
    OPTIONS,
    ROUNDING,
    STEPS,
    a_pure_shift_gives_no_update_and_a_large_one_leaves_what_remains,
    every_option,
    random,
)

pytestmark = NEEDS_COMPILER


def stepped(weight: Tensor, *tensors: Tensor | None, **options: Any) -> Tensor:
    weight = weight.clone(memory_format=torch.preserve_format)
    row_step(weight, *tensors, **{"lr": LR, **options})  # type: ignore[arg-type]
    return weight


def oracle(w: Tensor, g: Tensor, m: Tensor | None, *, scale: float, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Weight and momentum of the equation, in float64."""
    v, beta = g.double(), options["beta"]
    buffer = v if m is None else m.double()
    if m is not None:
        buffer = beta * buffer + (v if options["nesterov"] else (1 - beta) * v)
        v = v + beta * buffer if options["nesterov"] else buffer
    v = v - v.mean(dim=-2, keepdim=True) if options["centered"] else v
    norms = v.norm(dim=-1, keepdim=True)
    u = v / (norms + options["row_damping"] * norms.square().mean(dim=-2, keepdim=True).sqrt())
    u = u - u.mean(dim=-2, keepdim=True) if options["centered"] else u
    return (1 - LR * DECAY) * w.double() - LR * scale * u, buffer


# ---- the same steps


@every_option
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3, 9, 20), (2, 130, 33), (200, 1), (40, 600)])
def test_three_steps_are_those_of_eager_operations(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    weight, scale = random(*shape, seed=1), 0.2 * shape[-1] ** 0.5
    expected = weight.clone()
    momentum, buffer = (torch.zeros_like(weight) if options["beta"] else None for _ in range(2))
    for step in range(STEPS):
        gradient = random(*shape, seed=10 + step) + 3
        kept = gradient.clone()
        for function, w, m in ((row_step, weight, momentum), (eager_row_step, expected, buffer)):
            function(w, gradient, m, lr=LR, weight_decay=DECAY, scale=scale, **options)
        assert torch.equal(gradient, kept)
    assert ((weight - expected).abs() / (expected.abs() + LR * scale)).max() <= STEPS * 8 * ROUNDING
    if momentum is not None and buffer is not None:
        # What a momentum is a sum of is at most about 8 an entry and step.
        assert (momentum - buffer).abs().max() <= STEPS * 8 * ROUNDING * 4


@every_option
@pytest.mark.parametrize("shape", [(300, 17), (300, 64), (70, 1000), (2, 3, 65, 129)])
def test_a_step_is_its_equation_in_float64(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    w, g, m = (random(*shape, seed=seed) for seed in range(3))
    momentum = m.clone() if options["beta"] else None
    found = stepped(w, g, momentum, weight_decay=DECAY, scale=2.0, **options)
    expected, buffer = oracle(w, g, m if options["beta"] else None, scale=2.0, options=options)
    assert ((found - expected).abs() / (expected.abs() + 2 * LR)).max() <= 4 * ROUNDING
    if momentum is not None:
        assert (momentum - buffer).abs().max() <= 4 * ROUNDING * buffer.abs().max()


@every_option
def test_the_number_of_threads_changes_no_bit(options: dict[str, Any]) -> None:
    w, g, m = (random(2, 1100, 67, seed=seed) for seed in range(3))
    assert w.numel() > SMALL
    assert w.shape[1] % CHUNK
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            momentum = m.clone() if options["beta"] else None
            found.append((stepped(w, g, momentum, weight_decay=DECAY, **options), momentum))
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(found[0][0], w)
    for weight, momentum in found[1:]:
        assert torch.equal(weight, found[0][0])
        assert momentum is None or torch.equal(momentum, found[0][1])  # type: ignore[arg-type]


@every_option
def test_a_step_commutes_with_permutations_of_the_rows(options: dict[str, Any]) -> None:
    w, g, m = (random(150, 37, seed=seed) for seed in range(3))
    order = torch.randperm(150, generator=generator(4))
    momenta = (m.clone(), m[order]) if options["beta"] else (None, None)
    found, permuted = stepped(w, g, momenta[0], **options)[order], stepped(w[order], g[order], momenta[1], **options)
    if options["centered"] or options["row_damping"]:  # sums over rows in another order
        assert ((found - permuted).abs() / (found.abs() + LR)).max() <= 2 * ROUNDING
    else:
        assert torch.equal(found, permuted)


# ---- layouts

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "exchanged dimensions of the batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "heads of columns": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other column": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "part of the columns": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
}


@pytest.mark.parametrize("options", OPTIONS[1::3] + OPTIONS[-1:], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of_all", [True, False])
def test_views_of_any_strides_are_updated_in_place(layout: str, options: dict[str, Any], of_all: bool) -> None:
    view = LAYOUTS[layout]
    w, g, m = (random(2, 3, CHUNK + GATHERED + 5, 12, seed=seed) for seed in range(3))
    after, half = m.clone(), w.bfloat16()
    expected = stepped(w, g, after, parameter=half, **options)
    weight, momentum, parameter = view(w), view(m), view(w.bfloat16())
    assert weight.stride() != w.stride()
    gradient = view(g) if of_all else g
    row_step(weight, gradient, momentum, lr=LR, parameter=parameter, **options)
    assert torch.equal(momentum, after)
    assert torch.equal(weight, expected)
    assert torch.equal(parameter, half)


def test_what_lies_between_the_columns_of_a_view_stays() -> None:
    whole = random(40, 30, seed=1)
    kept, part = whole.clone(), whole[:, 10:20]
    row_step(part, random(40, 10, seed=2), lr=LR)
    assert not torch.equal(part, kept[:, 10:20])
    for columns in (slice(0, 10), slice(20, 30)):
        assert torch.equal(whole[:, columns], kept[:, columns])


@every_option
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly_and_written_rounded(options: dict[str, Any], dtype: torch.dtype) -> None:
    weight, gradient = random(70, 41, seed=1), random(70, 41, seed=2, dtype=dtype)
    momenta = [torch.ones(70, 41) if options["beta"] else None for _ in range(2)]
    half = weight.to(dtype)
    found = stepped(weight, gradient, momenta[0], parameter=half, **options)
    assert torch.equal(half, found.to(dtype))
    assert torch.equal(found, stepped(weight, gradient.float(), momenta[1], **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_in_half_precision_is_converted_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(-1, 64)
    momentum = torch.full(every.shape, 7.0)
    row_step(torch.zeros(every.shape), every, momentum, lr=LR, beta=0.0)
    torch.testing.assert_close(momentum, every.float(), rtol=0, atol=0, equal_nan=True)
    # Float32 numbers at, between and beside those of half precision: halfway cases go to even.
    bits = every.float().view(torch.int32).unsqueeze(-1)
    middle = (1 << 15) if dtype == torch.bfloat16 else (1 << 12)
    numbers = torch.cat([bits + step for step in (-middle, -1, 0, 1, middle - 1, middle, middle + 1)], dim=-1)
    weight = numbers.view(torch.float32).flatten(0, 1)
    weight = torch.cat([weight, random(500, 7, seed=1) * 2.0 ** torch.arange(-500, 500, 2.0).div(16).unsqueeze(-1)])
    half = torch.zeros(weight.shape, dtype=dtype)
    row_step(weight, torch.zeros_like(weight), lr=0.0, parameter=half)
    torch.testing.assert_close(half, weight.to(dtype), rtol=0, atol=0, equal_nan=True)


# ---- rows of any size


@pytest.mark.parametrize("options", OPTIONS[:1] + OPTIONS[6:7], ids=str)
@pytest.mark.parametrize("n", [2, 70])
@pytest.mark.parametrize("lr", [1.0, 1e-4])
def test_rows_of_any_size_move_as_far(lr: float, n: int, options: dict[str, Any]) -> None:
    sizes = torch.tensor([0.0, 1e-44, 1e-40, 1e-30, 1e-17, 1.0, 1e17, 1e30, 1e37]).unsqueeze(1)
    if options["centered"]:
        sizes = torch.cat([sizes[-1:], -sizes[-1:]])  # of others, a mean would leave nothing
    norms = stepped(torch.zeros(len(sizes), n), sizes.expand(-1, n), lr=lr, **options).norm(dim=1)
    torch.testing.assert_close(norms, lr * (sizes[:, 0] != 0).float(), rtol=4 * ROUNDING, atol=0)


@every_option
@pytest.mark.parametrize("exponent", [-130, -70, 60, 110])
def test_a_step_does_not_see_the_scale_of_the_gradient(options: dict[str, Any], exponent: int) -> None:
    # Integers of 7 bits times a power of two: denormal ones are exact too.
    w, g = random(150, 70, seed=1), torch.randint(-64, 65, (150, 70), generator=generator(2)).float()
    options = {**options, "beta": 0.0, "nesterov": False}
    usual, scaled = (stepped(w, g * size, **options) for size in (1.0, 2.0**exponent))
    assert ((usual - scaled).abs() / (w.abs() + LR)).max() <= 4 * ROUNDING


def test_under_damping_a_row_of_any_size_adds_what_its_equation_says() -> None:
    g = random(50, 70, seed=2)
    g[10:20] *= 1e-20
    g[20:30] *= 1e-40
    nothing = torch.zeros_like(g)
    for size in (1.0, 1e-12, 1e20):
        v = (g * size).double()
        norms = v.norm(dim=1, keepdim=True)
        exact = v / (norms + 0.1 * norms.square().mean().sqrt())
        found = -stepped(nothing, g * size, lr=1.0, row_damping=0.1)
        visible = exact.abs() > 1e-37
        torch.testing.assert_close(found.double()[visible], exact[visible], rtol=4 * ROUNDING, atol=0)
        assert found[~visible].abs().max() <= 1e-37


@every_option
def test_rows_of_zeros_get_the_decay_alone(options: dict[str, Any]) -> None:
    w, zeros = random(50, 9, seed=1), torch.zeros(50, 9)
    found = stepped(w, zeros, zeros.clone() if options["beta"] else None, weight_decay=DECAY, **options)
    torch.testing.assert_close(found, (1 - LR * DECAY) * w, rtol=2 * ROUNDING, atol=0)


def test_a_row_of_zeros_among_others_gets_the_decay_alone() -> None:
    w, g = random(50, 9, seed=1), random(50, 9, seed=2)
    g[7] = 0
    for damping in (0.0, 0.1):
        found = stepped(w, g, weight_decay=DECAY, row_damping=damping)
        torch.testing.assert_close(found[7], (1 - LR * DECAY) * w[7], rtol=2 * ROUNDING, atol=0)


def test_a_decay_that_takes_the_whole_weight_leaves_the_update() -> None:
    w, g = random(5, 4, seed=1), random(5, 4, seed=2)
    found = stepped(w, g, lr=0.5, weight_decay=2.0)
    assert (found + 0.5 * g / g.norm(dim=1, keepdim=True)).abs().max() <= 4 * ROUNDING * (w.abs().max() + 0.5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_and_spreads_as_far_as_sums_do(bad: float) -> None:
    w, g = random(50, 70, seed=1), random(50, 70, seed=2)
    usual = stepped(w, g)
    g[20, 3] = bad
    plain = stepped(w, g)
    rest = torch.arange(50) != 20
    assert torch.equal(plain[rest], usual[rest])
    assert plain[20, 3].isnan()
    damped, centered = stepped(w, g, row_damping=0.1), stepped(w, g, centered=True)
    assert damped[20, 3].isnan()
    if bad != bad:
        assert all(found.isnan().all() for found in (plain[20], damped, centered))


# ---- the shift


def test_a_pure_shift_with_its_rounding_gives_no_update_and_a_large_one_leaves_what_remains() -> None:
    a_pure_shift_gives_no_update_and_a_large_one_leaves_what_remains(stepped)


# ---- what is written, and how


@every_option
def test_a_refused_step_writes_nothing_and_an_admitted_one_all(options: dict[str, Any]) -> None:
    w, g, m = (random(150, 9, seed=seed) for seed in range(3))
    momenta = [m.clone() if options["beta"] else None for _ in range(3)]
    usual = stepped(w, g, momenta[0], **options)
    assert torch.equal(usual, stepped(w, g, momenta[1], admitted=torch.tensor(True), **options))
    g[100, 3] = torch.nan
    half = w.bfloat16()
    assert torch.equal(stepped(w, g, momenta[2], parameter=half, admitted=torch.tensor(False), **options), w)
    assert torch.equal(half, w.bfloat16())
    assert momenta[2] is None or torch.equal(momenta[2], m)


def test_rates_may_be_tensors() -> None:
    w, g = random(20, 9, seed=1), random(20, 9, seed=2)
    rates = {"lr": torch.tensor([LR], dtype=torch.float64), "weight_decay": torch.tensor(DECAY, dtype=torch.float64)}
    assert torch.equal(stepped(w, g, **rates), stepped(w, g, weight_decay=DECAY))


@every_option
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(150, 9), (3, 70, 5000)])
def test_borrowed_memory_changes_nothing_and_is_no_more_than_is_said(
    options: dict[str, Any], shape: tuple[int, ...], transposed: bool
) -> None:
    w, m, g = (random(*shape, seed=seed) for seed in range(3))
    g = LAYOUTS["transposed"](g) if transposed else g
    momenta = [m.clone() if options["beta"] else None for _ in range(3)]
    expected, arena = stepped(w, g, momenta[0], **options), Arena()
    for momentum in momenta[1:]:  # the second time in the memory of the first
        with arena.lend():
            assert torch.equal(stepped(w, g, momentum, scratch=arena, **options), expected)
    most = scratch_bytes(w, centered=options["centered"], damped=options["row_damping"] != 0)
    assert 0 < arena.bytes(torch.device("cpu")) <= most


def test_nothing_to_update_is_no_error() -> None:
    for shape in ((0, 4), (4, 0), (0, 3, 4)):
        empty = torch.ones(shape)
        row_step(empty, empty, lr=LR, centered=True, row_damping=0.1)


def test_autograd_knows_what_was_written() -> None:
    weight, gradient, momentum = (random(6, 4, seed=seed) for seed in range(3))
    parameter = torch.nn.Parameter(weight)
    versions = [one._version for one in (parameter, gradient, momentum)]
    row_step(parameter, gradient, momentum, lr=LR, beta=0.9)
    assert [one._version for one in (parameter, gradient, momentum)] == [versions[0] + 1, versions[1], versions[2] + 1]


def test_a_profiler_sees_the_step_by_its_name() -> None:
    w, g = random(20, 9, seed=1), random(20, 9, seed=2)
    row_step(w, g, lr=LR)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        row_step(w, g, lr=LR)
    found = [event for event in profile.events() or [] if event.name == "lit_symopt::row_step"]
    assert len(found) == 1
    assert not found[0].is_user_annotation


# ---- what cannot be


def test_what_the_row_step_cannot_take_is_refused_by_name() -> None:
    w = torch.ones(4, 6)
    refused: list[tuple[tuple[Tensor, ...], dict[str, Any], str]] = [
        ((w.double(), w), {}, r"weight must be torch.float32 \(4, 6\) on the CPU, got torch.float64 \(4, 6\)"),
        ((w, w.double()), {}, "gradient must be torch.float32 or torch.bfloat16 or torch.float16"),
        ((w, w[:2]), {}, r"gradient must be .* got torch.float32 \(2, 6\)"),
        ((w, w.to("meta")), {}, "gradient must be .* on meta"),
        ((w, w, w.bfloat16()), {}, "momentum must be torch.float32"),
        ((w, w), {"parameter": w}, "parameter must be torch.bfloat16 or torch.float16"),
        ((w[:1].expand(4, -1), w), {}, "entries of weight share memory; clone it"),
        ((w[0], w[0]), {}, r"needs matrices \[..., m, n\], got shape \(6,\)"),
        ((w, w), {"admitted": torch.tensor(1.0)}, "admitted must be one boolean"),
        ((w, w), {"lr": torch.ones(2)}, r"lr must be one number, got shape \(2,\)"),
    ]
    for tensors, options, problem in refused:
        with pytest.raises(ConfigError, match=f"kernel row_step: {problem}.*choose backend 'eager'"):
            row_step(*tensors, **{"lr": LR, **options})
    assert torch.equal(w, torch.ones(4, 6))
