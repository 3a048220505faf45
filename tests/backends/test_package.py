"""The polar factor of the package gram-newton-schulz against a singular value decomposition in float64."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from lit_symopt.backends.choice import INSTALL
from tests.matrices import generator

pytestmark = pytest.mark.skipif(find_spec("gram_newton_schulz") is None, reason=f"needs `{INSTALL}`")


@pytest.mark.parametrize("shape", [(16, 16), (3, 20, 31), (2, 2, 64, 24), (5, 1), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e30])
def test_singular_values_come_near_one(shape: tuple[int, ...], dtype: torch.dtype, size: float) -> None:
    from lit_symopt.backends.package import polar

    x = (size * torch.randn(shape, generator=generator(0))).to(dtype)
    before = x.clone()
    found = polar(x)
    assert (found.shape, found.dtype, found.is_contiguous()) == (x.shape, dtype, True)
    assert torch.equal(x, before)
    u, sigma, vh = torch.linalg.svd(x.double(), full_matrices=False)
    values = torch.linalg.svdvals(found.double())
    assert float(values[sigma > 0.02 * sigma.norm(dim=-1, keepdim=True)].min()) > 0.7
    assert float(values.max()) < 1.2
    error = (found.double() - u @ vh).norm() / (u @ vh).norm()
    assert error < 0.2
    assert torch.equal(polar(x), found)


def test_zeros_stay_zeros_and_what_is_not_finite_makes_its_matrix_nan() -> None:
    from lit_symopt.backends.package import polar

    x = torch.zeros(3, 4, 6)
    x[1] = torch.randn(4, 6, generator=generator(1))
    x[2, 0, 0] = torch.nan
    found = polar(x)
    assert torch.equal(found[0], x[0])
    assert found[1].isfinite().all()
    assert found[2].isnan().all()


def test_strided_matrices_are_taken() -> None:
    from lit_symopt.backends.package import polar

    x = torch.randn(6, 4, 10, generator=generator(2))[::2, :, 1:8].mT
    assert torch.equal(polar(x), polar(x.contiguous()))
