"""Polar factors and spectral steps in C++: against float64, torch's products, and themselves in other layouts."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lit_symopt import Layout, SymOpt
from lit_symopt.bench.counting import launches
from lit_symopt.cpp import polar as module
from lit_symopt.cpp.polar import _library, polar, spectral_step, workspace_bytes, workspaces
from lit_symopt.errors import ConfigError
from lit_symopt.linalg.low_precision import polar_by_quintics
from lit_symopt.profiling.expected import expected_operations
from lit_symopt.scratch import MIB, Arena
from tests.cpp.places import NEEDS_BF16
from tests.linalg.test_newton_schulz import HARD
from tests.matrices import generator, haar, polar_reference, relative_error, with_spectrum

pytestmark = NEEDS_BF16

SHAPES = [(3, 20, 20), (2, 130, 48), (2, 48, 130), (1, 300, 7), (4, 1, 9), (2, 2, 64, 64), (1, 4500, 35), (16, 16)]
ROUNDING = 2.0**-24


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def own_spectrum(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of x, and what u makes of each, in float64."""
    v, sigma, wh = torch.linalg.svd(x.double(), full_matrices=False)
    return sigma, (v.mT @ u.double() @ wh.mT).diagonal(dim1=-2, dim2=-1)


# ---- accuracy


@pytest.mark.parametrize("shape", SHAPES)
def test_the_polar_factor_is_that_of_torchs_products_up_to_rounding(shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    before = x.clone()
    found = polar(x)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    assert torch.equal(x, before)
    assert relative_error(found, polar_by_quintics(x)) <= 0.03  # eight bits, five steps


def test_sums_that_are_longer_than_a_panel_are_put_together() -> None:
    x = randn(4110, 4100)  # the products of the Gram matrices, too
    assert relative_error(polar(x), polar_by_quintics(x)) <= 0.05


@pytest.mark.parametrize(("m", "n"), [(128, 32), (256, 128), (128, 384), (512, 256)])
@pytest.mark.parametrize(("spread", "bound"), [(1e2, 0.06), (1e3, 0.35)])
def test_it_is_as_close_to_float64_as_the_table_of_polar_promises(m: int, n: int, spread: float, bound: float) -> None:
    k = min(m, n)
    sigma = spread ** -torch.linspace(0, 1, k, dtype=torch.float64)
    x = with_spectrum(m, n, sigma).float()
    assert relative_error(polar(x), polar_reference(x)) <= bound


@pytest.mark.parametrize("spectrum", HARD)
def test_no_singular_value_is_driven_away_by_rounding(spectrum: str) -> None:
    for m, n in ((20, 20), (42, 21), (128, 64), (96, 192), (384, 128)):
        sigma = HARD[spectrum](min(m, n))
        x = torch.stack([with_spectrum(m, n, sigma, seed=seed) for seed in range(3)]).bfloat16()
        u = polar(x.float())
        assert float(torch.linalg.matrix_norm(u, ord=2).max()) <= 1.05
        found, gains = own_spectrum(x, u)
        assert float(gains[found >= 1e-2 * found[:, :1]].min()) >= 0.9


@pytest.mark.parametrize(("m", "n"), [(96, 40), (40, 96), (64, 64)])
def test_it_commutes_with_rotations_of_both_sides_up_to_its_accuracy(m: int, n: int) -> None:
    x = with_spectrum(m, n, torch.linspace(1, 0.1, min(m, n)), seed=1)
    q, r = haar(m, m, seed=5), haar(n, n, seed=6)
    assert relative_error(polar((q @ x @ r).float()), q @ polar(x.float()).double() @ r) <= 0.05


@pytest.mark.parametrize("shape", [(2, 70, 40), (1, 40, 40)])
def test_that_of_the_transpose_is_the_transpose(shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    by_columns = x.mT.contiguous()
    if shape[-1] != shape[-2]:  # of square ones either side may count as the smaller
        assert torch.equal(polar(by_columns).mT, polar(x))
    assert relative_error(polar(by_columns).mT, polar(x)) <= 0.03


# ---- scale, and what has none


@pytest.mark.parametrize("exponent", [-100, -30, 30, 100])
def test_a_power_of_two_changes_no_bit(exponent: int) -> None:
    x = randn(3, 50, 33)
    assert torch.equal(polar(x * 2.0**exponent), polar(x))


@pytest.mark.parametrize("factor", [1e38, 1e30, 1e-30, 1e-38, 2.0**-140])
def test_it_takes_the_whole_range_of_float32(factor: float) -> None:
    x = randn(40, 30) / 10 * factor
    bound = 0.03 if factor > 1e-37 else 0.5  # of a denormal number few bits are left
    assert relative_error(polar(x), polar(x.double() / factor)) <= bound


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_zeros_and_what_is_not_finite_stay_with_their_matrix(shape: tuple[int, int]) -> None:
    x = randn(5, *shape)
    x[1] = 0
    x[2, 3, 4] = torch.nan
    x[3, 5, 6] = -torch.inf
    found = polar(x)
    assert not found[1].any()
    assert found[2].isnan().all()
    assert found[3].isnan().all()
    for index in (0, 4):
        assert torch.equal(found[index], polar(x[index]))


# ---- memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_it_takes_every_dtype_and_gives_it_back(dtype: torch.dtype) -> None:
    x = randn(2, 48, 31).bfloat16()
    found = polar(x.to(dtype))
    assert found.dtype == dtype
    assert torch.allclose(found.float(), polar(x.float()), rtol=2.0**-8, atol=0)


def views(x: Tensor) -> dict[str, Tensor]:
    """The same matrices [6, 33, 20] in other orders of memory."""
    wide = torch.zeros(6, 33, 50)
    wide[..., 7:27] = x
    every_second = torch.zeros(6, 33, 40)
    every_second[..., ::2] = x
    heads = x.view(2, 3, 33, 20).permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    return {
        "rows apart": wide[..., 7:27],
        "columns apart": every_second[..., ::2],
        "by columns": x.mT.contiguous().mT,
        "heads": heads.view(2, 3, 33, 20),
        "reversed batch": x.transpose(0, 1).contiguous().transpose(0, 1),
    }


@pytest.mark.parametrize("order", views(torch.zeros(6, 33, 20)))
@pytest.mark.parametrize("transposed", [False, True])
def test_the_order_of_memory_changes_no_bit(order: str, transposed: bool) -> None:
    x = randn(6, 33, 20)
    other = views(x)[order]
    given = other.mT if transposed else other
    found = polar(given, out=torch.empty_like(given))
    expected = polar(x)
    assert torch.equal((found.mT if transposed else found).reshape(expected.shape), expected)


def test_what_lies_between_the_columns_of_a_view_stays() -> None:
    memory = torch.full((40, 64), 7.0)
    polar(randn(40, 31), out=memory[:, 1:63:2])
    assert (memory[:, ::2] == 7).all()
    assert (memory[:, 63] == 7).all()
    assert (memory[:, 1:63:2].abs() < 2).all()


@pytest.mark.parametrize(("m", "n"), [(5, 3), (37, 100), (256, 256), (4096, 64), (4097, 60), (8200, 130)])
def test_python_and_cpp_agree_on_how_much_a_workspace_is(m: int, n: int) -> None:
    assert _library().polar_workspace_bytes(m, n) == workspace_bytes(m, n)
    assert _library().polar_step_bytes() == ctypes.sizeof(module._Step)


def test_borrowed_memory_changes_nothing_and_is_no_more_than_is_said() -> None:
    x, arena = randn(9, 120, 64), Arena()
    expected = polar(x)
    for _ in range(3):
        with arena.lend():
            assert torch.equal(polar(x, scratch=arena), expected)
    room = workspaces(9, 120, 64) * workspace_bytes(120, 64) + x.nbytes
    assert room <= arena.bytes(x.device) <= room + 1024


# ---- threads


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize(("m", "n"), [(150, 64), (64, 150), (96, 96), (4500, 20), (33, 10)])
def test_the_number_of_threads_changes_no_bit(threads: Any, count: int, m: int, n: int) -> None:
    x = randn(count, m, n)
    threads(1)
    expected = polar(x)
    for several in (2, 3, 4):
        threads(several)
        assert torch.equal(polar(x), expected), several


def test_one_workspace_for_all_threads_changes_no_bit(threads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    threads(3)
    x = randn(5, 90, 70)
    expected = polar(x)
    assert workspaces(5, 90, 70) == 3
    monkeypatch.setattr(module, "MOST", 2 * workspace_bytes(90, 70))
    assert workspaces(5, 90, 70, bound=module.MOST) == 1
    assert torch.equal(polar(x), expected)


# ---- whole steps


def written(w: Tensor, g: Tensor, m: Tensor | None, *, lr: float, decay: float, beta: float, nesterov: bool) -> Any:
    """Weight and momentum after the equation in float64, with the polar factor in C++ of the momentum in float32."""
    v = g
    if m is not None:
        m = beta * m.double() + (1.0 if nesterov else 1.0 - beta) * g.double()
        v = g.double() + beta * m if nesterov else m
    return (1 - decay) * w.double() - lr * polar(v.float()).double(), m


@pytest.mark.parametrize("shape", [(2, 40, 24), (24, 40), (3, 3, 32, 32)])
@pytest.mark.parametrize(("beta", "nesterov"), [(0.0, False), (0.95, False), (0.9, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_its_equation(shape: tuple[int, ...], beta: float, nesterov: bool, dtype: torch.dtype) -> None:
    weights = [randn(*shape, seed=seed) for seed in range(3)]
    gradients = [randn(*shape, seed=10 + seed).to(dtype) for seed in range(3)]
    momenta = [randn(*shape, seed=20 + seed) for seed in range(3)] if beta else []
    kept: list[Tensor | None] = [*momenta] or [None] * 3
    rates, decays = [0.1, 0.2, 0.0], [0.01, 0.0, 0.5]
    expected = [
        written(w, g.float(), m, lr=lr, decay=decay, beta=beta, nesterov=nesterov)
        for w, g, m, lr, decay in zip(weights, gradients, kept, rates, decays, strict=True)
    ]
    halves = [torch.empty_like(w, dtype=torch.bfloat16) for w in weights]
    given = [gradient.clone() for gradient in gradients]
    options = {"lr": rates, "weight_decay": decays, "beta": beta, "nesterov": nesterov}
    spectral_step(weights, given, momenta, parameters=halves, **options)  # type: ignore[arg-type]
    assert all(torch.equal(one, other) for one, other in zip(given, gradients, strict=True))
    for index, (w, m) in enumerate(expected):
        # The direction may differ in its last bit of float32, the polar factor then by roundings of bfloat16.
        assert relative_error(weights[index] - (1 - decays[index]) * w, w - (1 - decays[index]) * w) <= 1e-2
        if beta:
            assert (momenta[index] - m).abs().max() <= 4 * ROUNDING * m.abs().max()
        assert torch.equal(halves[index], weights[index].bfloat16())


def test_without_momentum_a_step_is_its_equation_to_the_rounding() -> None:
    w, g = randn(2, 60, 30, seed=1), randn(2, 60, 30, seed=2)
    expected = (1 - 0.02) * w.double() - 0.3 * polar(g).double()
    spectral_step([w], [g], lr=[0.3], weight_decay=[0.02])
    assert ((w - expected).abs() <= 3 * ROUNDING * (expected.abs() + 0.3)).all()


@pytest.mark.parametrize("order", views(torch.zeros(6, 33, 20)))
def test_weights_in_any_order_of_memory_are_updated_in_place(order: str) -> None:
    results = []
    for kind in (None, order):
        tensors = [randn(6, 33, 20, seed=seed) for seed in range(3)]
        w, g, m = tensors if kind is None else (views(tensor)[kind] for tensor in tensors)
        spectral_step([w], [g], [m], lr=[0.1], weight_decay=[0.1], beta=0.9, nesterov=True)
        results.append((w.reshape(6, 33, 20), m.reshape(6, 33, 20)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_autograd_knows_what_was_written() -> None:
    w, g, m = (randn(8, 8, seed=seed) for seed in range(3))
    before = [tensor._version for tensor in (w, g, m)]
    spectral_step([w], [g], [m], lr=[0.1], weight_decay=[0.0], beta=0.9)
    assert [tensor._version for tensor in (w, g, m)] == [before[0] + 1, before[1], before[2] + 1]


def test_nothing_to_update_is_no_error() -> None:
    empty = torch.empty(0, 4, 5)
    spectral_step([empty], [empty], lr=[0.1], weight_decay=[0.0])


@pytest.mark.parametrize("kind", ["weights", "momenta"])
def test_weights_and_momenta_of_another_dtype_are_refused(kind: str) -> None:
    tensors = {"weights": torch.zeros(4, 4), "momenta": torch.zeros(4, 4)}
    tensors[kind] = tensors[kind].double()
    with pytest.raises(ConfigError, match=f"{kind} of a step in C\\+\\+ must be float32"):
        spectral_step(
            [tensors["weights"]], [torch.zeros(4, 4)], [tensors["momenta"]], lr=[0.1], weight_decay=[0.0], beta=0.9
        )


# ---- within the optimizer


def optimizer(count: int, shape: tuple[int, ...], **options: Any) -> SymOpt:
    parameters = [(f"w{index}", nn.Parameter(randn(*shape, seed=index))) for index in range(count)]
    for index, (_, parameter) in enumerate(parameters):
        parameter.grad = randn(*shape, seed=100 + index)
    return SymOpt(parameters, rule="spectral", precision="bf16", backend="cpp", **options)


def test_a_step_borrows_as_much_for_many_matrices_as_for_few() -> None:
    kept = []
    for count in (4, 40):
        ours = optimizer(count, (128, 64))
        for _ in range(3):
            ours.step()
        kept.append(ours.kept_scratch(torch.device("cpu")))
    assert kept[0] == kept[1] <= torch.get_num_threads() * workspace_bytes(128, 64) + 1024


def test_the_bound_of_scratch_is_kept_and_one_below_a_matrix_is_refused(threads: Any) -> None:
    threads(4)
    need = workspace_bytes(256, 256)
    ours = optimizer(6, (256, 256), scratch=1.5 * need / MIB)
    for _ in range(3):
        ours.step()
    assert need <= ours.kept_scratch(torch.device("cpu")) <= 1.5 * need
    ours = optimizer(6, (256, 256), scratch=0.5 * need / MIB)
    before = [parameter.detach().clone() for parameter in ours.param_groups[0]["params"]]
    with pytest.raises(ConfigError, match=r"scratch=.* MiB does not hold the update of one matrix of 'w0'"):
        ours.step()
    assert all(map(torch.equal, before, ours.param_groups[0]["params"]))


def test_rules_that_are_more_than_a_polar_factor_keep_the_bound_too() -> None:
    ours = SymOpt(
        [("w", nn.Parameter(randn(8, 128, 64)))],
        rule="row_then_spectral",
        layout=Layout.experts(),
        precision="bf16",
        backend="cpp",
        scratch=2,
    )
    for _ in range(3):
        ours.param_groups[0]["params"][0].grad = randn(8, 128, 64, seed=1)
        ours.step()
    assert ours.kept_scratch(torch.device("cpu")) <= 2 * MIB


def test_operations_are_counted_and_seen_by_their_name() -> None:
    x = randn(3, 64, 256)
    with FlopCounterMode(display=False) as counter:
        polar(x)
    assert counter.get_total_flops() == 3 * (9 * 4 + 11) * 64**3  # of the form (2, 1, 2), see the module
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        polar(x)
    assert "lit_symopt::polar_step" in {event.key for event in profiler.key_averages()}


def test_the_products_that_a_profile_expects_are_those_that_are_counted() -> None:
    ours = optimizer(2, (128, 64))
    with FlopCounterMode(display=False) as counter:
        ours.step()
    expected = sum(one.products for one in expected_operations(ours).values())
    assert counter.get_total_flops() == expected == 2 * (9 * 2 + 11) * 64**3


@pytest.mark.parametrize("layout", [None, Layout.heads(3), Layout.gate_up("stacked")])
def test_launches_do_not_grow_with_the_number_of_matrices(layout: Layout | None) -> None:
    counts = []
    for count in (4, 16):
        ours = optimizer(count, (96, 64), layout=layout)
        for _ in range(3):
            ours.step()
        counts.append(launches(ours.step, torch.device("cpu")))
    assert counts[1] <= 1.1 * counts[0] < 25


@pytest.mark.parametrize("layout", [Layout.heads(3), Layout.gate_up("stacked"), Layout.gate_up("interleaved")])
@pytest.mark.parametrize("contiguous", [True, False])
def test_matrices_within_a_tensor_are_updated_where_they_lie(layout: Layout, contiguous: bool) -> None:
    """By their places in memory, or by views where the tensor is not contiguous: as matrices by themselves."""
    w, g = randn(96, 64, seed=1), randn(96, 64, seed=2)
    ours = optimizer(1, (96, 64), layout=layout, momentum=0.0, lr=0.5, scale="none")
    (parameter,) = ours.param_groups[0]["params"]
    parameter.data = w.clone() if contiguous else w.mT.contiguous().mT
    parameter.grad = g.clone()
    ours.step()
    (given,) = layout.to_matrices(g)
    expected = w.double() - 0.5 * layout.from_matrices([polar(given)], (96, 64)).double()
    assert (parameter - expected).abs().max() <= 3 * ROUNDING * 5
