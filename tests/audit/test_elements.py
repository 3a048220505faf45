"""Group elements are in their groups, and far from the identity."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from lit_symopt.audit.elements import haar, invertible, permutation, plane_rotations, rotation, scales, signs, wreath


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.mark.parametrize("n", [2, 3, 17, 1000])
def test_a_permutation_has_no_fixed_point(n: int) -> None:
    p = permutation(n, generator())
    assert sorted(p.tolist()) == list(range(n))
    assert not (p == torch.arange(n)).any()


def test_a_wreath_element_keeps_groups_together() -> None:
    p = wreath(3, 4, generator())
    assert sorted(p.tolist()) == list(range(12))
    groups = p.view(3, 4) // 4
    assert (groups == groups[:, :1]).all()
    assert not (groups[:, 0] == torch.arange(3)).any()


@pytest.mark.parametrize("n", [1, 2, 20])
def test_haar_matrices_are_orthogonal_and_far_from_the_identity(n: int) -> None:
    q = haar(n, generator(), batch=(3,))
    eye = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(q @ q.mT, eye.expand(3, n, n))
    assert bool(((q - eye).norm(dim=(-2, -1)) >= 0.5 * n**0.5).all())


def test_invertible_matrices_are_well_conditioned_and_far_from_orthogonal() -> None:
    sigma = torch.linalg.svdvals(invertible(8, generator(), batch=(2,)))
    torch.testing.assert_close(sigma[:, 0], torch.full((2,), 2.0).double())
    torch.testing.assert_close(sigma[:, -1], torch.full((2,), 0.5).double())


def test_plane_rotations_are_orthogonal_and_commute_with_every_turn_of_their_planes() -> None:
    planes = [(0, 3), (1, 4), (2, 5)]
    r = plane_rotations(8, planes, generator(), batch=(2,))
    torch.testing.assert_close(r @ r.mT, torch.eye(8, dtype=torch.float64).expand(2, 8, 8))
    rotary = torch.eye(8, dtype=torch.float64)  # as a rotary embedding turns the planes at some position
    for angle, (a, b) in zip((0.3, 1.1, 2.5), planes, strict=True):
        c, s = torch.tensor(angle).cos(), torch.tensor(angle).sin()
        rotary[a, a], rotary[b, b], rotary[a, b], rotary[b, a] = c, c, -s, s
    torch.testing.assert_close(r @ rotary, rotary @ r)
    assert bool((r.diagonal(dim1=-2, dim2=-1)[:, :6] <= 0.5 + 1e-9).all())  # 60 degrees and more


@pytest.mark.parametrize("n", [7, 512, 1300])
def test_a_rotation_of_any_size_keeps_inner_products_and_mixes_coordinates(n: int) -> None:
    turn = rotation(n, generator())
    x = torch.randn(5, n, dtype=torch.float64, generator=generator(1))
    torch.testing.assert_close(turn(x) @ turn(x).mT, x @ x.mT)
    one = torch.zeros(n, dtype=torch.float64)
    one[0] = 1
    assert int((turn(one).abs() > 1e-6).sum()) >= min(n, 200) - 1


def test_factors_are_negative_for_half_of_the_neurons_and_never_near_one() -> None:
    c = scales(100, generator())
    assert int((c < 0).sum()) == 50
    assert bool(((c.abs() - 1).abs() > 0.19).all())
    assert int((signs(7, generator()) < 0).sum()) == 4
