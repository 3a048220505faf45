"""The mode that finds what would let the host wait for a device finds it, and nothing else; nothing in a step does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_symopt import SymOpt
from lit_symopt.rules import RULES
from tests.synchronizations import NoSynchronization, Recording, Synchronizes, synchronizations

X = torch.tensor([[2.0, 1.0], [1.0, 3.0]])


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.isfinite().all()),
        lambda x: float(x[0, 0]),
        lambda x: x.tolist(),
        lambda x: torch.add(x, x, alpha=x[0, 0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        torch.linalg.eigh,
        torch.linalg.svd,
        torch.linalg.cholesky,
        lambda x: x.unique(),
        lambda x: torch.empty(2, 2, device="meta").copy_(x),
    ],
)
def test_what_waits_is_found(wait: Callable[[Tensor], object]) -> None:
    with NoSynchronization(), pytest.raises(Synchronizes):
        wait(X)
    assert synchronizations(lambda: wait(X))


@pytest.mark.parametrize(
    "run",
    [
        lambda x: torch.where(x.isfinite().all(), x, 0) @ x,
        torch.linalg.cholesky_ex,
        lambda x: x.clone().mul_(torch.full((), 0.5)),
        lambda x: torch._foreach_mul([x, x], x[0, 0]),
        torch.linalg.matrix_norm,
        lambda x: x.clone().fill_diagonal_(1.0),
        lambda x: x.double().to(torch.bfloat16),
    ],
)
def test_what_does_not_wait_is_let_through(run: Callable[[Tensor], object]) -> None:
    with NoSynchronization():
        run(X)


def test_what_lies_on_the_host_may_be_read() -> None:
    step = torch.tensor(3.0)
    assert synchronizations(step.item, host=[step]) == []
    assert len(synchronizations(lambda: (step.item(), X[0, 0].item()), host=[step])) == 1


def test_a_recording_repeats_operations_on_what_tensors_hold_now() -> None:
    x, total, factor = torch.ones(2, 3), torch.zeros(3), torch.tensor(2.0)

    def run(number: float) -> Tensor:
        parts = list((factor * x).unbind())
        torch._foreach_mul_(parts, number)
        total.add_(parts[0]).add_(parts[1])
        parts.clear()
        return total.square()

    recording = Recording()
    with recording:
        result = run(3.0)
    assert total.tolist() == [12.0] * 3
    x.fill_(2.0)
    factor.fill_(0.5)
    recording.replay()
    assert total.tolist() == [12.0 + 2 * 3.0] * 3
    assert result.tolist() == [18.0**2] * 3


class NotYet:
    """The event of a copy that has not arrived."""

    def query(self) -> bool:
        return False


def stepped(device: str, *, lr: float | Tensor, **options: Any) -> SymOpt:
    """After one step, which makes the state, and with gradients for the next."""
    dtype = options.pop("dtype", torch.float32)
    parameters = [torch.nn.Parameter(torch.ones(6, 4, device=device, dtype=dtype)) for _ in range(3)]
    optimizer = SymOpt(parameters, lr=1e-2, weight_decay=0.1, **options)
    for group in optimizer.param_groups:
        group["lr"] = lr
        if isinstance(lr, Tensor):
            group["weight_decay"] = 2 * lr
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("options", [{}, {"centered": True}, {"momentum_kind": "nesterov"}, {"dtype": torch.bfloat16}])
@pytest.mark.parametrize("rule", [name for name in RULES if name != "adamw"])
@pytest.mark.parametrize("lr", [1e-2, torch.full((), 1e-2, device="meta")], ids=["number", "tensor"])
def test_a_step_on_an_accelerator_asks_nothing_of_it(
    rule: str, options: dict[str, Any], lr: float | Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, where code goes the ways of an accelerator; torch's own AdamW there is not the fused one."""
    monkeypatch.setattr("lit_symopt.finite._copy_to_host", lambda flags: (flags, NotYet()))
    optimizer = stepped("meta", lr=lr, rule=rule, precision="bf16", **options)
    assert synchronizations(optimizer.step) == []


def test_decompositions_are_seen_to_wait() -> None:
    optimizer = stepped("cpu", lr=1e-2, rule="spectral", precision="exact")
    assert any("linalg_svd" in what for what in synchronizations(optimizer.step))
