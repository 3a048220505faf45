"""The step of row_norm in blocks, against the general path, float64 by hand, and itself in other blocks."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_symopt import row_step as module
from lit_symopt.groups import DEFAULTS
from lit_symopt.layout import Layout
from lit_symopt.row_step import LONG, analytic, row_step, scratch_bytes, takes
from lit_symopt.rules import ema_, nesterov_
from lit_symopt.scratch import Arena
from lit_symopt.update import direction_to_update
from tests.matrices import generator
from tests.row_steps import (
    DECAY,
    LR,
    STEPS,
    a_pure_shift_gives_no_update_and_a_large_one_leaves_what_remains,
    every_option,
    random,
)
from tests.synchronizations import NoSynchronization


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many blocks as there can be."""
    monkeypatch.setitem(module.BLOCK_BYTES, "cpu", 1)


def stepped(weight: Tensor, *tensors: Tensor | None, **options: Any) -> Tensor:
    weight = weight.clone()
    row_step(weight, *tensors, **{"lr": LR, **options})  # type: ignore[arg-type]
    return weight


def general_step(weight: Tensor, gradient: Tensor, momentum: Tensor | None, options: dict[str, Any]) -> None:
    """The step of `lit_symopt.update` for one parameter that the blocks do not take."""
    group = {**DEFAULTS, "rule": "row_norm", "scale": "rms"} | {k: options[k] for k in ("centered", "row_damping")}
    direction = gradient
    if momentum is not None:
        (direction,) = (nesterov_ if options["nesterov"] else ema_)([momentum], [gradient], options["beta"])
    layout = Layout.experts() if weight.ndim == 3 else Layout.matrix()
    update = direction_to_update(direction.unsqueeze(0), group=group, layout=layout, shape=weight.shape)[0]
    weight.mul_(1 - LR * DECAY).sub_(LR * update)


# ---- the same steps


@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3, 9, 20), (2, 130, 33), (200, 1)])
@pytest.mark.usefixtures("small_blocks")
def test_three_steps_are_those_of_the_general_path(
    shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    weight = random(*shape, seed=1, dtype=dtype)
    expected = weight.clone()
    momentum, buffer = (torch.zeros_like(weight) if options["beta"] else None for _ in range(2))
    scale = analytic("rms", shape[-1])
    for step in range(STEPS):
        gradient = random(*shape, seed=10 + step, dtype=dtype) + 3
        kept = gradient.clone()
        row_step(weight, gradient, momentum, lr=LR, weight_decay=DECAY, scale=scale, **options)
        general_step(expected, gradient, buffer, options)
        assert torch.equal(gradient, kept)
    rounding = torch.finfo(dtype).eps / 2
    assert ((weight - expected).abs() / (expected.abs() + LR * scale)).max() <= STEPS * 8 * rounding
    if momentum is not None and buffer is not None:
        # What a momentum is a sum of is at most about 8 an entry and step.
        assert (momentum - buffer).abs().max() <= STEPS * 8 * rounding * 4


@every_option
@pytest.mark.parametrize("n", [17, LONG + 3])
@pytest.mark.usefixtures("small_blocks")
def test_a_step_is_its_equation_in_float64(n: int, options: dict[str, Any]) -> None:
    w, g, m = (random(300, n, seed=seed) for seed in range(3))
    beta, exact = options["beta"], m.double()
    momentum, half = m.clone() if beta else None, w.bfloat16()
    found = stepped(w, g, momentum, lr=LR, weight_decay=DECAY, scale=2.0, parameter=half, **options)
    assert torch.equal(half, found.bfloat16())
    v = g.double()
    if beta:
        exact = beta * exact + (v if options["nesterov"] else (1 - beta) * v)
        v = v + beta * exact if options["nesterov"] else exact
    v = v - v.mean(dim=0) if options["centered"] else v
    norms = v.norm(dim=1, keepdim=True)
    u = v / (norms + options["row_damping"] * norms.square().mean().sqrt())
    u = u - u.mean(dim=0) if options["centered"] else u
    expected = (1 - LR * DECAY) * w.double() - LR * 2.0 * u
    assert ((found - expected).abs() / (expected.abs() + 2 * LR)).max() <= 4 * 2.0**-24
    if momentum is not None:
        torch.testing.assert_close(momentum.double(), exact, rtol=1e-6, atol=1e-6)


@every_option
@pytest.mark.parametrize("n", [67, LONG + 3])
def test_the_size_of_the_blocks_and_the_number_of_threads_change_no_bit(
    n: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    w, g, m = (random(3000, n, seed=seed) for seed in range(3))
    # Few or many of a block, by its size.
    g[1214:1234], m[1214:1234] = 0, 1e-30
    g[1300], m[1300] = 0, 0
    before, found = torch.get_num_threads(), []
    try:
        for threads, size in product((1, 2), (1, 100_000, 1 << 30)):
            torch.set_num_threads(threads)
            monkeypatch.setitem(module.BLOCK_BYTES, "cpu", size)
            momentum = m.clone() if options["beta"] else None
            found.append(stepped(w, g, momentum, weight_decay=DECAY, **options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert not torch.equal(found[0], w)


# ---- rows of any size


def test_a_row_of_any_size_gets_norm_one_and_damping_is_relative_to_the_largest() -> None:
    g = torch.tensor([[1e-45, 0.0], [3e38, 3e38], [0.0, 0.0], [3e-30, -4e-30], [6.0, 8.0]])
    nothing, one = torch.zeros_like(g), 0.5**0.5
    plain = -stepped(nothing, g, lr=1.0)
    torch.testing.assert_close(plain, torch.tensor([[1.0, 0.0], [one, one], [0.0, 0.0], [0.6, -0.8], [0.6, 0.8]]))
    damped = -stepped(nothing, g, lr=1.0, row_damping=0.1)
    one /= 1 + 0.1 / 5**0.5
    torch.testing.assert_close(damped, torch.tensor([[0.0, 0.0], [one, one], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))


@every_option
@pytest.mark.parametrize("exponent", [-130, -70, 60, 110])
def test_a_step_does_not_see_the_scale_of_the_gradient(options: dict[str, Any], exponent: int) -> None:
    # Integers of 7 bits times a power of two: denormal ones are exact too.
    w, g = random(150, 9, seed=1), torch.randint(-64, 65, (150, 9), generator=generator(2)).float()
    options = {**options, "beta": 0.0, "nesterov": False}
    usual, scaled = (stepped(w, g * size, **options) for size in (1.0, 2.0**exponent))
    assert ((usual - scaled).abs() / (w.abs() + LR)).max() <= 2 * 2.0**-24


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e30])
@pytest.mark.parametrize("rows", [[7], [7, 30], list(range(5, 40))])
def test_rows_of_other_sizes_change_no_bit_of_the_rest_and_get_what_one_alone_gets(
    rows: list[int], size: float
) -> None:
    w, g = random(50, 12, seed=1), random(50, 12, seed=2)
    half = w.bfloat16()
    usual = stepped(w, g)
    g[rows] *= size
    found = stepped(w, g, parameter=half)
    alone = torch.cat([stepped(w[row : row + 1], g[row : row + 1]) for row in rows])
    assert torch.equal(found[rows], alone)
    assert size == 1e-40 or (alone - usual[rows]).abs().max() <= 4 * 2.0**-24 * (w.abs() + LR).max()
    rest = [row for row in range(50) if row not in rows]
    assert torch.equal(found[rest], usual[rest])
    assert torch.equal(half, found.bfloat16())


def test_under_damping_a_row_of_any_size_adds_what_its_equation_says() -> None:
    g = random(50, 12, seed=2)
    g[10:20] *= 1e-20
    g[20:30] *= 1e-40
    nothing = torch.zeros_like(g)
    for size in (1.0, 1e-12, 1e20):  # at the second, the squares that are lost would matter
        v = (g * size).double()
        norms = v.norm(dim=1, keepdim=True)
        exact = v / (norms + 0.1 * norms.square().mean().sqrt())
        found = -stepped(nothing, g * size, lr=1.0, row_damping=0.1)
        assert (found - exact).abs().max() <= 4 * 2.0**-24
        visible = exact.abs() > 1e-37
        torch.testing.assert_close(found.double()[visible], exact[visible], rtol=4 * 2.0**-24, atol=0)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_rows_of_zeros_get_the_decay_alone(damping: float) -> None:
    w, g = random(5, 4, seed=1), torch.zeros(5, 4)
    for centered in (False, True):
        found = stepped(w, g, weight_decay=DECAY, row_damping=damping, centered=centered)
        torch.testing.assert_close(found, (1 - LR * DECAY) * w)


def test_a_decay_that_takes_the_whole_weight_leaves_the_update() -> None:
    w, g = random(5, 4, seed=1), random(5, 4, seed=2)
    found = stepped(w, g, lr=0.5, weight_decay=2.0)
    torch.testing.assert_close(found, -0.5 * g / g.norm(dim=1, keepdim=True))


# ---- the shift


def test_a_pure_shift_with_its_rounding_gives_no_update_and_a_large_one_leaves_what_remains() -> None:
    a_pure_shift_gives_no_update_and_a_large_one_leaves_what_remains(stepped)


# ---- what is written


@every_option
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_parameter_in_half_precision_is_its_rounded_master(options: dict[str, Any], dtype: torch.dtype) -> None:
    weight, gradient = random(70, 9, seed=1), random(70, 9, seed=2, dtype=dtype)
    momenta = [torch.ones(70, 9) if options["beta"] else None for _ in range(2)]
    half = weight.to(dtype)
    found = stepped(weight, gradient, momenta[0], parameter=half, **options)
    assert torch.equal(half, found.to(dtype))
    assert torch.equal(found, stepped(weight, gradient.float(), momenta[1], **options))


@every_option
@pytest.mark.usefixtures("small_blocks")
def test_a_flag_masks_every_write(options: dict[str, Any]) -> None:
    w, g, m = (random(150, 9, seed=seed) for seed in range(3))
    momenta = [m.clone() if options["beta"] else None for _ in range(3)]
    usual = stepped(w, g, momenta[0], weight_decay=DECAY, **options)
    admitted = stepped(w, g, momenta[1], weight_decay=DECAY, admitted=torch.tensor(True), **options)
    assert torch.equal(usual, admitted)
    g[100, 3] = torch.nan
    half = w.bfloat16()
    refused = stepped(w, g, momenta[2], weight_decay=DECAY, parameter=half, admitted=torch.tensor(False), **options)
    assert torch.equal(refused, w)
    assert torch.equal(half, w.bfloat16())
    if momenta[0] is not None and momenta[1] is not None and momenta[2] is not None:
        assert torch.equal(momenta[0], momenta[1])
        assert torch.equal(momenta[2], m)


@every_option
@pytest.mark.parametrize("flag", [None, True])
@pytest.mark.parametrize("shape", [(150, 9), (3, 150, 9)])
def test_borrowed_memory_changes_nothing_and_is_no_more_than_is_said(
    options: dict[str, Any], flag: bool | None, shape: tuple[int, ...]
) -> None:
    w, m, g = random(*shape, seed=1), random(*shape, seed=2), random(*shape, seed=3, dtype=torch.bfloat16)
    g[..., 3, :] = 1e-30
    options = {**options, "admitted": None if flag is None else torch.tensor(flag)}
    momenta = [m.clone() if options["beta"] else None for _ in range(3)]
    expected, arena = stepped(w, g, momenta[0], **options), Arena()
    for momentum in momenta[1:]:  # the second time in the memory of the first
        with arena.lend():
            assert torch.equal(stepped(w, g, momentum, scratch=arena, **options), expected)
    assert 0 < arena.bytes(torch.device("cpu")) <= scratch_bytes(w, centered=options["centered"])


def test_a_gradient_of_any_strides_is_taken() -> None:
    w, g = random(150, 9, seed=1), random(150, 9, seed=2)
    strided = g.t().contiguous().t()
    assert not strided.is_contiguous()
    assert torch.equal(stepped(w, strided), stepped(w, g))


@every_option
def test_a_rate_on_the_device_gives_the_same_step_and_nothing_waits_for_it(options: dict[str, Any]) -> None:
    w, g, m = (random(150, 9, seed=seed) for seed in range(3))
    momenta = [m.clone() if options["beta"] else None for _ in range(2)]
    options = {**options, "weight_decay": DECAY, "admitted": torch.tensor(True), "parameter": w.bfloat16()}
    expected, rate = stepped(w, g, momenta[0], lr=LR, **options), torch.tensor(LR, dtype=torch.float64)
    with NoSynchronization():
        found = stepped(w, g, momenta[1], lr=rate, **options)
    assert ((found - expected).abs() / (expected.abs() + LR)).max() <= 4 * 2.0**-24


def test_nothing_to_update_is_no_error() -> None:
    for shape in ((0, 4), (4, 0)):
        empty = torch.ones(shape)
        row_step(empty, empty, lr=LR, centered=True, row_damping=0.1)


# ---- who qualifies

PLAIN = {**DEFAULTS, "rule": "row_norm"}


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (Layout.matrix(), (6, 4)),
        (Layout.experts(), (3, 6, 4)),
        (Layout.flatten(), (6, 2, 3)),
        (Layout.heads(2), (6, 4)),
        (Layout.gate_up("stacked"), (6, 4)),
        (Layout.row(), (6,)),
    ],
)
def test_layouts_whose_rows_lie_one_after_the_other_are_taken(layout: Layout, shape: tuple[int, ...]) -> None:
    weight = torch.ones(shape)
    assert takes(PLAIN, layout, weight)
    (matrices,) = layout.to_matrices(weight)
    assert matrices.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize(
    "layout",
    [
        Layout.transposed(),
        Layout.heads(2, dim="columns"),
        Layout.gate_up("interleaved"),
        Layout.gate_up("stacked", pairs=True),
    ],
)
def test_other_layouts_go_the_general_way(layout: Layout) -> None:
    assert not takes(PLAIN, layout, torch.ones(6, 4))


@pytest.mark.parametrize(
    "option",
    [{"rule": "sign"}, {"scale": "nuclear"}, {"precision": "exact"}, {"precision": "fp32"}, {"eps": 2.0}],
    ids=str,
)
def test_options_that_ask_for_more_go_the_general_way(option: dict[str, Any]) -> None:
    weight = torch.ones(6, 4)
    assert takes(PLAIN, Layout.matrix(), weight)
    assert not takes({**PLAIN, **option}, Layout.matrix(), weight)


def test_storage_and_number_decide_too() -> None:
    weight = torch.ones(6, 4)
    assert not takes(PLAIN, Layout.matrix(), weight.t())
    assert not takes(PLAIN, Layout.matrix(), weight, weight.t().contiguous().t())
    assert not takes(PLAIN, Layout.matrix(), weight.bfloat16())
    assert not takes(PLAIN, Layout.matrix(), weight[:0])
    assert not takes(PLAIN, Layout.matrix(), weight, count=2)
    assert takes(PLAIN, Layout.matrix(), torch.ones(512, 512), count=2)
    assert takes({**PLAIN, "precision": "exact"}, Layout.matrix(), weight.double())


@pytest.mark.gpu
@every_option
def test_a_gpu_takes_the_same_step(options: dict[str, Any]) -> None:
    w, g, m = (random(300, 70, seed=seed) for seed in range(3))
    momenta = [m.to(device) if options["beta"] else None for device in ("cpu", "cuda")]
    momenta[0] = None if momenta[0] is None else momenta[0].clone()
    expected = stepped(w, g, momenta[0], weight_decay=DECAY, **options)
    found = stepped(w.cuda(), g.cuda(), momenta[1], weight_decay=DECAY, **options).cpu()
    assert ((found - expected).abs() / (expected.abs() + LR)).max() <= 8 * 2.0**-24
