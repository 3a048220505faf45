"""The iteration: forms against each other and against float64, borrowed memory, products that others provide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_symopt.linalg.coefficients import MUON_QUINTIC, polar_express
from lit_symopt.linalg.forms import ACCURATE, Form, plain
from lit_symopt.linalg.low_precision import QUINTICS, STEPS, polar_by_quintics, polar_scratch_bytes
from lit_symopt.linalg.newton_schulz import PYTORCH, PyTorchProducts, iterate, scratch_bytes
from lit_symopt.scratch import ALIGNED, Arena
from tests.matrices import generator, haar, log_uniform, polar_reference, relative_error, with_spectrum

FORMS: list[Form] = [plain(5), (2, 1, 2), (2, 2, 1), (1, 2, 2), (2, 3), (3, 2), (1, 4), (5,)]
SHAPES = [(3, 12, 5), (2, 5, 12), (2, 6, 6)]


def composed(x: Tensor, scale: float, quintics: Any = QUINTICS) -> Tensor:
    """The quintics applied to the singular values of scale · x, in float64."""
    v, sigma, wh = torch.linalg.svd(x.double(), full_matrices=False)
    sigma = scale * sigma
    for a, b, c in quintics:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return cast(Tensor, (v * sigma.unsqueeze(-2)) @ wh)


def scale_of(x: Tensor) -> float:
    """1.01 times the Schatten-4 norm, inverted."""
    return 1 / (1.01 * float(torch.linalg.svdvals(x.double()).pow(4).sum() ** 0.25))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (6, 6)])
def test_every_form_applies_the_quintics_to_the_singular_values(form: Form, shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=generator(1), dtype=torch.float64)
    assert relative_error(iterate(x, QUINTICS, form=form), composed(x, scale_of(x))) <= 1e-9


def test_the_default_form_is_on_the_matrix() -> None:
    x = torch.randn(2, 40, 10, generator=generator(1))
    muon = [MUON_QUINTIC] * 5
    assert torch.equal(iterate(x, muon), iterate(x, muon, form=plain(5)))


# ---- accuracy in low precision

TF32 = 13
"""Bits of float32 that a TF32 unit does not read."""


class RoundedProducts(PyTorchProducts):
    """Products of float32 as TF32 units compute them, as far as a CPU can: entries are rounded before they are read."""

    def gram(self, x: Tensor, *, tall: bool, out: Tensor) -> None:
        super().gram(rounded(x), tall=tall, out=out)

    def polynomial(self, gram: Tensor, *, a: float, b: float, c: float, out: Tensor) -> None:
        read = rounded(gram)
        torch.baddbmm(gram, read, read, beta=b, alpha=c, out=out)
        if a:
            out.diagonal(dim1=-2, dim2=-1).add_(a)

    def multiply(self, x: Tensor, p: Tensor, *, a: float, tall: bool, out: Tensor) -> None:
        if a:
            p.diagonal(dim1=-2, dim2=-1).add_(a)
        super().multiply(rounded(x), rounded(p), a=0.0, tall=tall, out=out)


def rounded(x: Tensor) -> Tensor:
    """To the nearest number with the eleven bits of TF32."""
    return ((x.contiguous().view(torch.int32) + (1 << (TF32 - 1))) & -(1 << TF32)).view(torch.float32)


def in_low_precision(x: Tensor, dtype: torch.dtype, form: Form) -> Tensor:
    """The iteration in a dtype, float32 standing for TF32; in float64."""
    x = x / torch.linalg.matrix_norm(x, keepdim=True)
    products = RoundedProducts() if dtype == torch.float32 else PYTORCH
    return iterate(x.to(dtype), QUINTICS, form=form, products=products).double()


LOW = [(dtype, form) for dtype, forms in ACCURATE.items() for form in forms[STEPS]]

HARD: dict[str, Callable[[int], Tensor]] = {
    # What a Gram matrix in bfloat16 likes least: a large part, and one at the top of a lobe.
    "half and 0.2": lambda k: torch.cat([torch.ones(k - k // 2), torch.full((k // 2,), 0.2)]),
    "half and 0.05": lambda k: torch.cat([torch.ones(k - k // 2), torch.full((k // 2,), 0.05)]),
    "one and 0.11": lambda k: torch.cat([torch.ones(1), torch.full((k - 1,), 0.11)]),
    "one and 0.02": lambda k: torch.cat([torch.ones(1), torch.full((k - 1,), 0.02)]),
    "flat": lambda k: log_uniform(k, spread=1),
    "all but one, 1e-4": lambda k: torch.cat([torch.ones(k - 1), torch.full((1,), 1e-4)]),
    "log-uniform over 1e3": lambda k: log_uniform(k, spread=1e3),
}


@pytest.mark.parametrize(("dtype", "form"), LOW)
@pytest.mark.parametrize("spectrum", HARD)
def test_no_singular_value_is_driven_away_by_rounding(dtype: torch.dtype, form: Form, spectrum: str) -> None:
    highest = 1.05 if dtype == torch.bfloat16 else 1.02
    for m, n in ((20, 20), (42, 21), (128, 64), (96, 192), (384, 128)):
        sigma = HARD[spectrum](min(m, n))
        x = torch.stack([with_spectrum(m, n, sigma, seed=seed) for seed in range(3)]).bfloat16()
        u = in_low_precision(x.float(), dtype, form)
        assert float(torch.linalg.matrix_norm(u, ord=2).max()) <= highest
        v, found, wh = torch.linalg.svd(x.double(), full_matrices=False)
        gains = (v.mT @ u @ wh.mT).diagonal(dim1=-2, dim2=-1)
        assert float(gains[found >= 1e-2 * found[:, :1]].min()) >= 0.9


@pytest.mark.parametrize(("dtype", "form"), LOW)
@pytest.mark.parametrize("shape", [(256, 128), (128, 384), (192, 192)])
def test_an_accurate_form_is_as_close_as_the_table_of_polar_promises(
    dtype: torch.dtype, form: Form, shape: tuple[int, int]
) -> None:
    m, n = shape
    coarse, wide = (0.06, 0.35) if dtype == torch.bfloat16 else (0.02, 0.3)
    tall = 0.04 if dtype == torch.bfloat16 else 0.02
    for name, bound in {"gaussian": 0.1 if m == n else tall, "1e2": coarse, "1e3": wide, "1e4": 0.6}.items():
        if name == "gaussian":
            x = torch.randn(m, n, generator=generator(2))
        else:
            x = with_spectrum(m, n, log_uniform(min(m, n), spread=float(name)), seed=3).float()
        u = in_low_precision(x, dtype, form)
        assert relative_error(u, polar_reference(x)) <= bound, name


def test_the_gram_form_needs_the_safety_of_its_quintics() -> None:
    x = torch.stack([with_spectrum(42, 21, HARD["half and 0.2"](21), seed=seed) for seed in range(3)]).bfloat16()
    tight = polar_express(lower=3e-3, steps=5, cushion=0.1, safety=1.01)
    assert not float(torch.linalg.matrix_norm(iterate(x, tight, form=(2, 1, 2)).double(), ord=2).max()) <= 2


def test_with_longer_segments_bfloat16_fails_so_that_they_are_not_among_the_accurate_forms() -> None:
    spectra = {(5,): log_uniform(21, spread=1e2), (3, 2): HARD["half and 0.05"](21)}
    for form, sigma in spectra.items():
        x = torch.stack([with_spectrum(42, 21, sigma, seed=seed) for seed in range(3)]).bfloat16()
        assert not float(torch.linalg.matrix_norm(iterate(x, QUINTICS, form=form).double(), ord=2).max()) <= 2
        assert form not in ACCURATE[torch.bfloat16][STEPS]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_without_a_restart_eleven_bits_fail_too(dtype: torch.dtype) -> None:
    sigma = torch.cat([torch.ones(1), torch.full((32,), 0.01), torch.full((31,), 3e-3)])
    x = torch.stack([with_spectrum(256, 64, sigma, seed=seed) for seed in range(3)]).float()
    assert not float(torch.linalg.matrix_norm(in_low_precision(x, dtype, (5,)), ord=2).max()) <= 2


@pytest.mark.parametrize(("dtype", "form"), LOW)
def test_a_gaussian_matrix_lands_where_comparisons_demand(dtype: torch.dtype, form: Form) -> None:
    x = torch.randn(256, 512, generator=generator(5))
    v, sigma, wh = torch.linalg.svd(x.double(), full_matrices=False)
    gains = (v.mT @ in_low_precision(x, dtype, form) @ wh.mT).diagonal()
    gains = gains[sigma > 0.01 * sigma.norm()]
    assert float(gains.min()) >= 0.97
    assert float(gains.max()) <= 1.03


# ---- memory


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("into", [False, True])
def test_where_the_result_is_written_does_not_change_a_bit(
    form: Form, shape: tuple[int, ...], overwrite: bool, into: bool
) -> None:
    x = torch.randn(shape, generator=generator(3)).bfloat16()
    expected = iterate(x, QUINTICS, form=form)
    given, out, arena = x.clone(), torch.full_like(x, torch.nan) if into else None, Arena()
    for _ in range(2):
        given.copy_(x)
        with arena.lend():
            found = iterate(given, QUINTICS, form=form, scratch=arena, overwrite=overwrite, out=out)
            assert found.equal(expected)
            assert out is None or found.data_ptr() == out.data_ptr()
        assert overwrite or given.equal(x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("into", [False, True])
def test_what_is_borrowed_is_what_was_said(form: Form, shape: tuple[int, ...], overwrite: bool, into: bool) -> None:
    count, m, n = 64 * shape[0], *shape[1:]  # pieces are multiples of the alignment
    x = torch.randn(count, m, n, generator=generator(3)).bfloat16()
    arena, out = Arena(), torch.empty_like(x) if into else None
    with arena.lend():
        iterate(x, QUINTICS, form=form, scratch=arena, overwrite=overwrite, out=out)
    said = count * scratch_bytes(m, n, form=form, overwrite=overwrite, out=into)
    assert said <= arena.bytes(torch.device("cpu")) <= said + 8 * ALIGNED


@pytest.mark.parametrize("shape", [(70, 64, 64), (64, 128, 64), (64, 8, 9)])
@pytest.mark.parametrize("into", [False, True])
def test_a_polar_factor_borrows_what_was_said_and_nothing_large_is_fresh(shape: tuple[int, ...], into: bool) -> None:
    x, arena = torch.randn(shape, generator=generator(4)), Arena()
    out = torch.empty(shape, dtype=torch.bfloat16) if into else None

    class Fresh(TorchDispatchMode):
        """Remembers the entries of every result that is not one of the arguments."""

        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            known = {value.untyped_storage().data_ptr() for value in [*args, *(kwargs or {}).values()] if _is(value)}
            for value in result if isinstance(result, tuple) else (result,):
                if _is(value) and value.untyped_storage().data_ptr() not in known:
                    self.largest = max(self.largest, value.numel())
            return result

    for step in range(2):
        fresh = Fresh()  # type: ignore[no-untyped-call]
        with arena.lend(), fresh:
            u = polar_by_quintics(x, scratch=arena, out=out)
        assert relative_error(u, polar_reference(x)) <= 0.1
        if step:
            assert fresh.largest <= shape[0]  # numbers of matrices
    said = shape[0] * polar_scratch_bytes(*shape[1:], dtype=torch.bfloat16, out=into)
    assert said <= arena.bytes(torch.device("cpu")) <= said + 8 * ALIGNED


def _is(value: object) -> bool:
    return isinstance(value, Tensor)


# ---- products


class InFloat64(PyTorchProducts):
    """Products that are rounded once, from float64."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def gram(self, x: Tensor, *, tall: bool, out: Tensor) -> None:
        self.calls.append("gram")
        x = x.double().mT if tall else x.double()
        out.copy_(x @ x.mT)

    def polynomial(self, gram: Tensor, *, a: float, b: float, c: float, out: Tensor) -> None:
        self.calls.append("polynomial")
        g = gram.double()
        out.copy_(a * torch.eye(g.shape[-1]) + b * g + c * g @ g)

    def multiply(self, x: Tensor, p: Tensor, *, a: float, tall: bool, out: Tensor) -> None:
        self.calls.append("multiply")
        y, q = x.double(), p.double()
        out.copy_(a * y + (y @ q if tall else q @ y))


@pytest.mark.parametrize("form", ACCURATE[torch.bfloat16][5])
@pytest.mark.parametrize("shape", [(2, 40, 16), (2, 16, 40), (2, 16, 16)])
def test_products_of_another_backend_take_part_in_every_step(form: Form, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=generator(6)).bfloat16()
    products = InFloat64()
    u = iterate(x, QUINTICS, form=form, products=products)
    assert relative_error(u, iterate(x, QUINTICS, form=form, products=PYTORCH)) <= 0.03
    assert products.calls.count("gram") == len(form)
    assert products.calls.count("polynomial") == 5
    assert products.calls.count("multiply") == len(form) + 3 * (5 - len(form))


@pytest.mark.parametrize("form", FORMS)
def test_zero_stays_zero_and_damage_stays_in_its_matrix(form: Form) -> None:
    x = torch.randn(4, 9, 6, generator=generator(0)).bfloat16()
    alone = iterate(x[3:], QUINTICS, form=form)
    x[0], x[1, 2, 3], x[2, 0, 0] = 0, torch.nan, torch.inf
    u = iterate(x, QUINTICS, form=form)
    assert u[0].eq(0).all()
    assert u[1:3].isnan().all()
    torch.testing.assert_close(u[3:], alone)


@pytest.mark.parametrize("form", ACCURATE[torch.bfloat16][5])
def test_a_zero_row_or_column_stays_exactly_zero(form: Form) -> None:
    for m, n in ((20, 8), (8, 20), (12, 12)):
        x = torch.randn(m, n, generator=generator(0)).bfloat16()
        x[3], x[:, 2] = 0, 0
        u = iterate(x, QUINTICS, form=form)
        assert u[3].eq(0).all()
        assert u[:, 2].eq(0).all()


def test_an_orthogonal_matrix_stays_nearly_itself() -> None:
    q = haar(128, 64, seed=1)
    for form in ACCURATE[torch.bfloat16][5]:
        assert relative_error(iterate(q.bfloat16(), QUINTICS, form=form), q) <= 0.03
