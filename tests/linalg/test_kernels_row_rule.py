"""The fused row rule against `SymOpt`'s own steps, in the interpreter and on a GPU."""

from __future__ import annotations

from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_symopt import SymOpt
from lit_symopt.errors import ConfigError
from lit_symopt.layout import Layout
from lit_symopt.linalg.kernels import row_rule
from tests.matrices import generator
from tests.triton_places import NEEDS_TRITON, Run

pytestmark = NEEDS_TRITON

LR, DECAY = 1e-2, 0.1
ROUNDING = 2.0**-24
STEPS = 3


def random(*shape: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(device, dtype)


def half_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded; the interpreter rounds to bfloat16 towards zero."""
    if dtype == torch.bfloat16 and weight.device.type == "cpu":
        weight = (weight.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return weight.to(dtype)


# ---- the same steps


def against_symopt(shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """How far weight and momentum are from those of `SymOpt` after some steps, in roundings of what went into them."""
    start = random(*shape, seed=1, device=device, dtype=dtype)
    parameter = torch.nn.Parameter(start.clone())
    layout = Layout.experts(Layout.matrix()) if len(shape) == 3 else Layout.matrix()
    group = {"params": [parameter], "layout": layout, "lr": LR, "weight_decay": DECAY, "scale": "rms", **options}
    optimizer = SymOpt([group], rule="row_norm")

    scale, beta, nesterov = 0.2 * shape[-1] ** 0.5, options["momentum"], options["momentum_kind"] == "nesterov"
    weight, half = start.float().clone(), None if dtype == torch.float32 else start.clone()
    momentum = torch.zeros_like(weight) if beta else None
    for step in range(STEPS):
        gradient = (random(*shape, seed=10 + step, device=device) + 3).to(dtype)
        parameter.grad, kept = gradient.clone(), gradient.clone()
        optimizer.step()
        row_rule(
            weight,
            gradient,
            momentum,
            lr=LR,
            weight_decay=DECAY,
            beta=beta,
            nesterov=nesterov,
            scale=scale,
            row_damping=options["row_damping"],
            centered=options["centered"],
            parameter=half,
        )
        assert torch.equal(gradient, kept)
    state = optimizer.state[parameter]
    expected = parameter.detach() if half is None else state["master"]
    found = {"weight": float(((weight - expected).abs() / (expected.abs() + LR * scale)).max()) / ROUNDING}
    if momentum is not None:
        # What a momentum is a sum of is at most about STEPS times this.
        found["momentum"] = float((momentum - state["momentum_buffer"]).abs().max()) / (8.0 * ROUNDING)
    if half is not None:
        found["half"] = torch.equal(half, half_of(weight, dtype))
    return found


OPTIONS = [
    {"centered": centered, "row_damping": damping, "momentum_kind": kind, "momentum": beta}
    for centered, damping, (kind, beta) in product(
        (False, True), (0.0, 0.1), (("ema", 0.0), ("ema", 0.9), ("nesterov", 0.9))
    )
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3, 9, 20)])
def test_three_steps_are_those_of_symopt(on: Run, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    found = on(against_symopt, shape, options, torch.float32)
    assert found["weight"] <= 8
    assert found.get("momentum", 0) <= 4


@pytest.mark.parametrize("shape", [(70, 3), (4, 300), (3, 1025)])
def test_tall_and_wide_matrices_are_no_special_case(on: Run, shape: tuple[int, ...]) -> None:
    options = {"centered": True, "row_damping": 0.1, "momentum_kind": "nesterov", "momentum": 0.9}
    assert on(against_symopt, shape, options, torch.float32)["weight"] <= 8


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_parameter_in_half_precision_is_its_rounded_master(on: Run, dtype: torch.dtype, centered: bool) -> None:
    options = {"centered": centered, "row_damping": 0.1, "momentum_kind": "ema", "momentum": 0.9}
    found = on(against_symopt, (7, 20), options, dtype)
    assert found["weight"] <= 8
    assert found["half"]


# ---- one step


def stepped(weight: Tensor, gradient: Tensor, momentum: Tensor | None = None, **options: Any) -> Tensor:
    weight = weight.clone(memory_format=torch.preserve_format)
    row_rule(weight, gradient, momentum, **{"lr": LR, **options})
    return weight


def variants(device: str) -> dict[str, bool]:
    """What must not change a bit, or anything at all."""
    w, g = random(6, 10, seed=1, device=device), random(6, 10, seed=2, device=device)
    m = random(6, 10, seed=3, device=device)
    yes, no = torch.tensor(True, device=device), torch.tensor(False, device=device)
    found = {}
    for centered, damping in product((False, True), (0.0, 0.1)):
        options: dict[str, Any] = {"centered": centered, "row_damping": damping, "beta": 0.9, "weight_decay": DECAY}
        name = f"{centered=}, {damping=}"
        usual = stepped(w, g, m.clone(), **options)
        rates = {
            "lr": torch.tensor(LR, device=device),
            "weight_decay": torch.tensor(DECAY, dtype=torch.float64, device=device),
        }
        found[f"admitted, {name}"] = torch.equal(usual, stepped(w, g, m.clone(), **options, admitted=yes))
        off = (usual - stepped(w, g, m.clone(), **(options | rates))).abs().max()
        found[f"rates on the device, {name}"] = bool(off <= 2 * ROUNDING * w.abs().max())

        bad, weight, momentum, half = g.clone(), w.clone(), m.clone(), w.bfloat16()
        bad[2, 3] = torch.inf
        row_rule(weight, bad, momentum, lr=LR, parameter=half, admitted=no, **options)
        unchanged = [torch.equal(a, b) for a, b in ((weight, w), (momentum, m), (half, w.bfloat16()))]
        found[f"refused, {name}"] = all(unchanged)
    return found


def test_a_flag_on_the_device_masks_every_write_and_rates_may_lie_there_too(on: Run) -> None:
    found = on(variants)
    assert len(found) == 12
    assert all(found.values()), found


def strided(device: str) -> dict[str, float]:
    """How far views are from their copies, in roundings."""
    layouts: dict[str, Any] = {
        "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        "exchanged dimensions of the batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "every other column": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    }
    w, g, m = (random(2, 3, 5, 12, seed=seed, device=device) for seed in range(3))
    found = {}
    for (name, layout), centered in product(layouts.items(), (False, True)):
        options: dict[str, Any] = {"lr": LR, "beta": 0.9, "centered": centered, "row_damping": 0.1}
        expected, after = w.clone(), m.clone()
        row_rule(expected, g, after, **options)
        weight, momentum = layout(w), layout(m)
        row_rule(weight, layout(g) if centered else g, momentum, **options)
        assert weight.stride() != expected.stride()
        assert torch.equal(momentum, after)
        found[f"{name}, {centered=}"] = float((weight - expected).abs().max()) / (ROUNDING * float(w.abs().max()))
    return found


def test_views_of_any_strides_are_updated_in_place(on: Run) -> None:
    found = on(strided)
    assert len(found) == 6
    assert max(found.values()) <= 4, found


def extremes(device: str) -> tuple[Tensor, Tensor]:
    """Steps on rows whose squares over- or underflow."""
    g = torch.tensor([[1e-45, 0.0], [3e38, 3e38], [0.0, 0.0], [3e-30, -4e-30]], device=device)
    plain = stepped(torch.zeros_like(g), g, lr=1.0)
    damped = stepped(torch.zeros_like(g), g, lr=1.0, row_damping=0.1)
    return -plain.cpu(), -damped.cpu()


def test_a_row_of_any_size_gets_norm_one_and_damping_is_relative_to_the_largest(on: Run) -> None:
    plain, damped = on(extremes)
    torch.testing.assert_close(plain, torch.tensor([[1.0, 0.0], [0.5**0.5, 0.5**0.5], [0.0, 0.0], [0.6, -0.8]]))
    one = 0.5**0.5 / (1 + 0.1 / 4**0.5)
    torch.testing.assert_close(damped, torch.tensor([[0.0, 0.0], [one, one], [0.0, 0.0], [0.0, 0.0]]))


def shifts(device: str) -> tuple[bool, float]:
    """A gradient that is nothing but a shift and its rounding, and one whose shift is a million times what is left."""
    shift = random(1, 40, seed=3, device=device)
    rounded = shift * (1 + 2.0**-23 * random(9, 40, seed=5, device=device).sign())
    nothing = torch.zeros(9, 40, device=device)
    pure = torch.stack([stepped(nothing, g, lr=1.0, centered=True) for g in (shift.expand(9, -1), rounded)])
    small = random(9, 40, seed=4, device=device)
    mixed = small + 1e6 * shift
    update = -stepped(torch.zeros_like(mixed), mixed, lr=1.0, centered=True)
    exact = mixed.double() - mixed.double().mean(dim=0)
    exact = exact / exact.norm(dim=1, keepdim=True)
    exact = exact - exact.mean(dim=0)
    return bool((pure == 0).all()), float((update - exact).abs().max()) / ROUNDING


def test_what_remains_of_a_large_shift_is_right_relative_to_its_own_size(on: Run) -> None:
    nothing, off = on(shifts)
    assert nothing
    assert off <= 4


def looped(device: str) -> list[float]:
    """How far a program that goes over several tiles is from several programs."""
    module: Any = import_module("lit_symopt.linalg.kernels.row_rule")
    w, g = random(2, 700, 9, seed=1, device=device), random(2, 700, 9, seed=2, device=device)
    kept, found = module.SUMS, []
    expected = stepped(w, g, centered=True)
    for most in (1, 3, 4):
        module.SUMS = most
        found.append(float((stepped(w, g, centered=True) - expected).abs().max()) / ROUNDING)
    module.SUMS = kept
    return found


def test_how_many_programs_add_up_columns_does_not_matter(on: Run) -> None:
    assert max(on(looped)) <= 1


# ---- what cannot be


def refused(device: str) -> list[str]:
    w = torch.ones(4, 6, device=device)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((w.double(), w.double()), {}),
        ((w, w[:2]), {}),
        ((w, w, w.bfloat16()), {}),
        ((w[:1].expand(4, -1), w), {}),
        ((w, w), {"admitted": torch.tensor(1.0)}),
        ((w, w), {"lr": torch.ones(2)}),
        ((torch.ones(1, (1 << 16) + 1, device=device),) * 2, {}),
    ]
    found = []
    for tensors, options in calls:
        try:
            row_rule(*tensors, **{"lr": LR, **options})
        except ConfigError as refusal:
            found.append(str(refusal))
    empty = torch.ones(0, 4, device=device)
    row_rule(empty, empty, lr=LR)
    return found


def test_what_the_row_rule_cannot_take_is_refused_by_name(on: Run) -> None:
    double, misshapen, momentum, shared, flag, rate, long = on(refused)
    assert "weight must be float32, bfloat16, float16" in double
    assert "gradient must be" in misshapen
    assert "got float32 (2, 6)" in misshapen
    assert "momentum must be float32" in momentum
    assert "entries of weight share memory; clone it" in shared
    assert "admitted must be one boolean" in flag
    assert "lr must be one number" in rate
    assert "rows of at most 65,536 numbers, got 65,537" in long


@pytest.mark.gpu
def test_a_captured_step_follows_rates_and_flag_on_the_device() -> None:
    w, g = random(64, 48, seed=1, device="cuda"), random(64, 48, seed=2, device="cuda")
    lr, admitted = torch.tensor(LR, device="cuda"), torch.tensor(True, device="cuda")
    expected = stepped(stepped(w, g, centered=True), g, centered=True, lr=3 * LR)
    stepped(w, g, centered=True, lr=lr, admitted=admitted)  # compiled before it is captured
    weight, graph = w.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        row_rule(weight, g, lr=lr, centered=True, admitted=admitted)
    graph.replay()
    lr.mul_(3)
    graph.replay()
    admitted.fill_(False)
    graph.replay()
    torch.testing.assert_close(weight, expected, rtol=4 * ROUNDING, atol=4 * ROUNDING)
