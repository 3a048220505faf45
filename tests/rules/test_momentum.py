"""Momentum, against the recursion by hand and against torch."""

from __future__ import annotations

import torch

from lit_symopt.rules import ema_, nesterov_
from tests.matrices import generator

BETA = 0.9


def gradients(steps: int, dtype: torch.dtype = torch.float32) -> list[list[torch.Tensor]]:
    source = generator(0)
    return [[torch.randn(3, 2, generator=source).to(dtype), torch.randn(4, generator=source).to(dtype)]
            for _ in range(steps)]  # fmt: skip


def test_ema_is_its_recursion_and_the_directions_are_the_buffers() -> None:
    buffers = [torch.zeros(3, 2), torch.zeros(4)]
    expected = [torch.zeros(3, 2), torch.zeros(4)]
    for step in gradients(4):
        directions = ema_(buffers, step, BETA)
        expected = [BETA * m + (1 - BETA) * g for m, g in zip(expected, step, strict=True)]
        torch.testing.assert_close(buffers, expected)
        assert all(d is b for d, b in zip(directions, buffers, strict=True))


def test_nesterov_is_the_direction_of_torch_sgd() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    sgd = torch.optim.SGD([parameter], lr=1.0, momentum=BETA, nesterov=True)
    buffer = torch.zeros(3, 2)
    for step in gradients(4):
        before = parameter.detach().clone()
        parameter.grad = step[0]
        sgd.step()
        (direction,) = nesterov_([buffer], step[:1], BETA)
        torch.testing.assert_close(before - direction, parameter.detach())


def test_nesterov_directions_are_fresh() -> None:
    buffers, step = [torch.zeros(3, 2)], gradients(1)[0][:1]
    (direction,) = nesterov_(buffers, step, BETA)
    direction.zero_()
    torch.testing.assert_close(buffers[0], step[0])


def test_gradients_are_not_written() -> None:
    step = gradients(1)[0]
    before = [g.clone() for g in step]
    for accumulate in (ema_, nesterov_):
        accumulate([torch.ones(3, 2), torch.ones(4)], step, BETA)
        assert all(torch.equal(g, b) for g, b in zip(step, before, strict=True))


def test_float32_buffers_take_bfloat16_gradients_without_rounding_to_them() -> None:
    buffers = [torch.ones(3, 2), torch.ones(4)]
    step = gradients(1, torch.bfloat16)[0]
    ema_(buffers, step, BETA)
    expected = [BETA + (1 - BETA) * g.float() for g in step]
    torch.testing.assert_close(buffers, expected)


def test_no_tensors_no_directions() -> None:
    assert ema_([], [], BETA) == []
    assert nesterov_([], [], BETA) == []
