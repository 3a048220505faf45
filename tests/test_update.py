"""Batches are cut into pieces, buckets are kept, memory is borrowed: and none of it may change a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_symopt import Layout, SymOpt
from lit_symopt.bench.counting import scratch_bytes as allocated_by
from lit_symopt.errors import ConfigError
from lit_symopt.pieces import piece_size, scratch_bytes
from lit_symopt.scratch import MIB, Arena
from tests.cpp.places import NEEDS_BF16

RULES: dict[str, dict[str, Any]] = {
    "bf16": {"rule": "spectral", "precision": "bf16", "scale": "rms"},
    "bf16, nesterov": {"rule": "spectral", "precision": "bf16", "momentum_kind": "nesterov", "scale": "spectral"},
    "fp16": {"rule": "spectral", "precision": "fp16", "scale": "rms"},
    "tf32": {"rule": "spectral", "precision": "tf32", "scale": "rms"},
    "fp32": {"rule": "spectral", "precision": "fp32"},
    "nuclear": {"rule": "spectral", "precision": "bf16", "scale": "nuclear"},
    "row norm of few features": {"rule": "row_norm", "scale": "nuclear", "momentum": 0.0},
    "centered": {"rule": "row_norm", "centered": True, "row_damping": 0.1, "scale": "nuclear"},
    "hybrid": {"rule": "row_then_spectral", "precision": "bf16"},
    "centered adamw": {"rule": "adamw", "centered": True},
}
SHAPES: dict[str, tuple[tuple[int, ...], Layout]] = {
    "matrices": ((48, 32), Layout.matrix()),
    "experts": ((12, 48, 32), Layout.experts()),
    "fused experts": ((6, 48, 32), Layout.experts(Layout.gate_up("stacked"))),
    "interleaved": ((6, 48, 32), Layout.experts(Layout.gate_up("interleaved"))),
    "heads": ((48, 32), Layout.heads(4)),
    "heads by columns": ((32, 48), Layout.heads(4, dim="columns")),
    "query, key, value": ((64, 32), Layout.qkv(4, 2, 8, order="stacked")),
    "transposed": ((32, 48), Layout.transposed()),
}


def stepped(
    shape: tuple[int, ...], *, steps: int = 3, count: int = 5, dtype: torch.dtype = torch.float32, **options: Any
) -> list[Tensor]:
    """Weights and states of equal parameters after some steps."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for _ in range(count)]
    optimizer = SymOpt(parameters, lr=0.02, weight_decay=0.1, **options)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(shape, generator=generator).to(dtype)
        optimizer.step()
    states = [value for parameter in parameters for value in optimizer.state[parameter].values()]
    return [*(parameter.detach() for parameter in parameters), *states]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_change_nothing(shape: str, rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix at a time, or one cell, against all at once."""
    size, layout = SHAPES[shape]
    options = {**RULES[rule], "layout": layout, "dtype": dtype}
    together = stepped(size, **options)
    monkeypatch.setattr("lit_symopt.pieces.IN_CACHE", 1)
    apart = stepped(size, **options)
    for a, b in zip(together, apart, strict=True):
        # Products of one matrix may round otherwise than those of many, in bfloat16 by 2^-8 of a step.
        rounded = dtype == torch.bfloat16 or options.get("precision") in ("bf16", "fp16")
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-2 if rounded else 1e-6)


@pytest.mark.parametrize("rule", ["spectral", "row_then_spectral", "spectral_then_row"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "tf32"])
def test_a_step_in_any_precision_is_the_exact_one_up_to_its_error(rule: str, precision: str) -> None:
    options: dict[str, Any] = {"rule": rule, "scale": "rms", "count": 3, "steps": 1}
    exact = stepped((96, 32), precision="exact", **options)
    found = stepped((96, 32), precision=precision, **options)
    length = 0.02 * 0.2 * (96 * 32) ** 0.5  # of a step: lr, the scale, all entries
    bound = {"fp32": 1e-5, "bf16": 0.04}.get(precision, 0.02)
    for a, b in zip(exact[:3], found[:3], strict=True):
        assert float((a - b).norm()) <= bound * length


def test_a_stack_of_experts_is_cut_between_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = torch._foreach_lerp_

    def spy(tensors: list[Tensor], *rest: Any) -> None:
        seen.append([tuple(tensor.shape) for tensor in tensors])
        real(tensors, *rest)

    monkeypatch.setattr(torch, "_foreach_lerp_", spy)
    options: dict[str, Any] = {"rule": "spectral", "precision": "bf16", "centered": False, "layout": Layout.experts()}
    need = scratch_bytes(options, Layout.matrix(), (48, 32), dtype=torch.float32, device_type="cpu")
    monkeypatch.setattr("lit_symopt.pieces.IN_CACHE", 5 * need)
    stepped((12, 48, 32), steps=1, count=2, **options)
    assert seen == [[(4, 48, 32)]] * 6  # 12 experts in pieces of at most 5 are three of 4


def test_a_bound_smaller_than_one_matrix_is_an_error_that_says_how_much_it_needs() -> None:
    weight = nn.Parameter(torch.randn(1024, 768))
    weight.grad = torch.randn(1024, 768)
    optimizer = SymOpt([("layers.0.weight", weight)], rule="spectral", precision="bf16", scratch=1)
    with pytest.raises(ConfigError, match=r"scratch=1 MiB .*'layers.0.weight'.* needs (\d+) MiB .*1024, 768") as error:
        optimizer.step()
    needed = int(str(error.value).split(" needs ")[1].split()[0])
    optimizer.param_groups[0]["scratch"] = needed
    optimizer.step()
    optimizer.param_groups[0]["scratch"] = needed - 1
    with pytest.raises(ConfigError, match="scratch"):
        optimizer.step()


def test_without_a_bound_a_matrix_may_be_of_any_size() -> None:
    options = {"rule": "spectral", "precision": "exact", "centered": False, "scratch": None}
    huge = (200_000, 1024)
    assert scratch_bytes(options, Layout.matrix(), huge, dtype=torch.float32, device_type="cuda") > 256 * MIB
    of = {"dtype": torch.float32, "device_type": "cuda", "of": "weight"}
    assert piece_size(3, options, Layout.matrix(), huge, **of) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("bound", [4, 16, 64])
@pytest.mark.parametrize(
    "options",
    [
        {"rule": "spectral", "precision": "bf16"},
        {"rule": "spectral", "precision": "bf16", "momentum_kind": "nesterov"},
        {"rule": "spectral", "precision": "fp16"},
        {"rule": "spectral", "precision": "tf32"},
        {"rule": "spectral", "precision": "fp32"},
        {"rule": "spectral", "centered": True, "precision": "bf16"},
        {"rule": "row_norm", "row_damping": 0.1},
        {"rule": "row_norm", "centered": True, "row_damping": 0.1, "scale": "nuclear"},
        {"rule": "row_then_spectral", "precision": "bf16"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_scratch_stays_below_its_bound(bound: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated at once besides parameters, gradients and states, as the profiler of torch sees it."""
    monkeypatch.setattr("lit_symopt.pieces.IN_CACHE", 1 << 60)
    parameters = [nn.Parameter(torch.randn(384, 128)) for _ in range(160)]
    for parameter in parameters:
        parameter.grad = torch.randn(384, 128)
    optimizer = SymOpt(parameters, scratch=bound, **options)
    optimizer.step()
    fresh = allocated_by(optimizer.step, torch.device("cpu"))
    assert fresh is not None
    assert fresh + optimizer.kept_scratch(torch.device("cpu")) <= bound * MIB


@pytest.mark.parametrize(
    ("backend", "rule"),
    [
        ("eager", "spectral"),
        pytest.param("cpp", "spectral", marks=NEEDS_BF16),
        pytest.param("cpp", "row_norm", marks=NEEDS_BF16),
    ],
)
def test_a_process_does_not_grow_from_step_to_step(backend: str, rule: str) -> None:
    parameters = [nn.Parameter(torch.randn(256, 128)) for _ in range(40)]
    optimizer = SymOpt(parameters, rule=rule, precision="bf16", momentum_kind="nesterov", backend=backend)

    def run(steps: int) -> None:
        for _ in range(steps):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    run(10)
    before = resident()
    run(100)
    assert resident() - before < 4 * MIB


# -- kept buckets ------------------------------------------------------------------------------------------------


def fresh_each_time(optimizer: SymOpt) -> None:
    """Makes an optimizer forget its buckets before a step."""
    optimizer.register_step_pre_hook(lambda optimizer, *_: setattr(optimizer, "_prepared", None))


def changes() -> dict[str, Any]:
    """What somebody may do to an optimizer between two steps."""

    def without_gradient(optimizer: SymOpt) -> None:
        optimizer.param_groups[0]["params"][1].grad = None

    def other_rates(optimizer: SymOpt) -> None:
        optimizer.param_groups[0]["lr"] *= 3
        optimizer.param_groups[1]["weight_decay"] = 0.5

    def other_momentum(optimizer: SymOpt) -> None:
        optimizer.param_groups[0]["momentum"] = 0.5

    def other_betas(optimizer: SymOpt) -> None:
        optimizer.param_groups[1]["betas"] = (0.5, 0.6)

    def other_radius(optimizer: SymOpt) -> None:
        optimizer.param_groups[0]["radius"] = 2.0

    def no_state(optimizer: SymOpt) -> None:
        optimizer.state.clear()

    def loaded_state(optimizer: SymOpt) -> None:
        saved = optimizer.state_dict()
        for state in saved["state"].values():
            for key, value in state.items():
                if key != "step":
                    state[key] = 2 * value
        optimizer.load_state_dict(saved)

    def new_group(optimizer: SymOpt) -> None:
        weight = nn.Parameter(torch.ones(8, 4))
        weight.grad = torch.full((8, 4), 0.5)
        optimizer.add_param_group({"params": [weight], "rule": "sgd"})

    def other_dtype(optimizer: SymOpt) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data = parameter.data.bfloat16()
                parameter.grad = None

    def loaded_weights(optimizer: SymOpt) -> None:
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].fill_(0.25)

    return {name: change for name, change in locals().items() if callable(change)}


@pytest.mark.parametrize("change", changes())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_buckets_notice_what_changes(change: str, dtype: torch.dtype) -> None:
    """Against an optimizer that makes its buckets anew at every step."""

    def run(*, forgetful: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        shapes = [(8, 4)] * 3 + [(4,)] * 2
        parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
        groups = [
            {"params": parameters[:3], "rule": "spectral", "scale": "rms"},
            {"params": parameters[3:], "rule": "adamw"},
        ]
        optimizer = SymOpt(groups, lr=0.05, weight_decay=0.1)
        if forgetful:
            fresh_each_time(optimizer)
        for step in range(6):
            if step == 3:
                changes()[change](optimizer)
            for group in optimizer.param_groups[:2]:
                for parameter in group["params"]:
                    gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                    if not (step == 3 and change == "without_gradient" and parameter is parameters[1]):
                        parameter.grad = gradient
            optimizer.step()
        return [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]

    for kept, anew in zip(run(forgetful=False), run(forgetful=True), strict=True):
        assert torch.equal(kept, anew)


def test_the_second_step_makes_no_new_buckets() -> None:
    parameters = [nn.Parameter(torch.randn(8, 4)) for _ in range(3)]
    optimizer = SymOpt(parameters, rule="spectral")
    found = []
    for step in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(8, 4)
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.step()
        found.append(optimizer._prepared)
    assert found[0] is not None
    assert found[0] is found[1] is found[2]


# -- AdamW -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["contiguous", "transposed", "every second column"])
@pytest.mark.parametrize("given", ["contiguous", "transposed", "expanded"])
def test_adamw_is_right_whatever_the_strides(stored: str, given: str) -> None:
    """torch's fused AdamW on a CPU reads memory in its order, whatever the strides say."""
    torch.manual_seed(0)
    weights = {"contiguous": torch.randn(5, 7), "transposed": torch.randn(7, 5).mT}
    weight = nn.Parameter(weights[stored] if stored in weights else torch.randn(5, 14)[:, ::2])
    plain = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    optimizer = SymOpt([weight], lr=0.1, rule="adamw", weight_decay=0.1)
    reference = torch.optim.AdamW([plain], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(3):
        gradients = {"contiguous": torch.randn(5, 7), "transposed": torch.randn(7, 5).mT}
        gradient = gradients[given] if given in gradients else torch.randn(1, 7).expand(5, 7)
        weight.grad, plain.grad = gradient, gradient.clone(memory_format=torch.contiguous_format)
        optimizer.step(), reference.step()
        torch.testing.assert_close(weight.detach(), plain.detach(), rtol=1e-6, atol=1e-7)


# -- borrowed memory ---------------------------------------------------------------------------------------------


def test_an_arena_lends_the_same_memory_again_and_never_twice_at_once() -> None:
    arena, device = Arena(), torch.device("cpu")

    def borrow() -> tuple[Tensor, Tensor, Tensor]:
        with arena.lend():
            one = arena.empty((3, 5), dtype=torch.float32, device=device)
            with arena.lend():
                inner = arena.empty((100,), dtype=torch.bfloat16, device=device)
            other = arena.empty((7,), dtype=torch.float64, device=device)
            one.fill_(1), other.fill_(2)
            assert (one == 1).all()
            return one, inner, other

    borrow()
    (one, inner, other), again = borrow(), borrow()
    assert [a.data_ptr() for a in again] == [one.data_ptr(), inner.data_ptr(), other.data_ptr()]
    assert inner.data_ptr() == other.data_ptr()  # given back, and lent again
    assert one.is_contiguous()
    assert one.data_ptr() % 64 == other.data_ptr() % 64 == 0
    assert arena.empty((3, 5), dtype=torch.float32, device=device).data_ptr() != one.data_ptr()  # outside of lend
    assert arena.bytes(device) == 512


def test_an_arena_gives_back_what_an_exception_left() -> None:
    arena = Arena()

    def fail() -> None:
        with arena.lend():
            arena.empty((64,), dtype=torch.float32, device="cpu")
            raise RuntimeError

    for _ in range(3):
        with pytest.raises(RuntimeError):
            fail()
    assert arena.bytes(torch.device("cpu")) == 256
