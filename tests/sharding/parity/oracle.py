"""The oracle: one process that accumulates the micro-batches of all ranks and steps on their mean gradient.

In half precision a whole run is no oracle: a master that differs in its last bit rounds to another bfloat16 sooner or
later, and training carries that on (two runs of one process end 1e-2 apart). So the links are compared one by one, each
to its own accuracy: `gradients_at` the weights that a run had, and `replayed` steps on the gradients that it had.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

import torch
from torch import Tensor, nn

from tests.sharding.parity.cases import Work
from tests.sharding.parity.models import batch, build, build_half, optimizer_for


@cache
def oracle(work: Work, *, nudge: float = 0.0) -> dict[str, Tensor]:
    """The weights after the steps, by name; computed once for all strategies.

    Args:
        work: what is trained, in fp32.
        nudge: relative size of a random change of the initial weights, for the question how far roundings grow.
    """
    torch.set_num_threads(1)
    module = build(work.family)
    if nudge:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.0 + nudge * torch.randn(parameter.shape, generator=generator))
    optimizer = optimizer_for(work, module)
    for step in range(work.steps):
        _step(work, module, optimizer, _mean_gradients(work, module, step))
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def gradients_at(weights: Mapping[str, Tensor], work: Work, step: int) -> dict[str, Tensor]:
    """The mean gradients of a step's micro-batches at bfloat16 weights, added up in fp32."""
    module = build_half(work.family)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])
    return _mean_gradients(work, module, step)


def replayed(gradients: Iterable[Mapping[str, Tensor]], work: Work) -> dict[str, Tensor]:
    """The fp32 masters of a model in bfloat16 after steps on the given gradients."""
    masters = build_half(work.family).float()
    optimizer = optimizer_for(work, masters)
    for given in gradients:
        _step(work, masters, optimizer, given)
    return {name: master.detach().clone() for name, master in masters.named_parameters()}


def _mean_gradients(work: Work, module: nn.Module, step: int) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    means = {
        name: torch.zeros_like(parameter, dtype=torch.float32)
        for name, parameter in zip(names, parameters, strict=True)
    }
    for micro_batch in range(work.micro_batches):
        gradients = torch.autograd.grad(module(batch(step, micro_batch)), parameters, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                means[name] += gradient.float() / work.micro_batches
    return means


def _step(work: Work, module: nn.Module, optimizer: torch.optim.Optimizer, gradients: Mapping[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        parameter.grad = gradients[name].clone()
    if work.clip:
        torch.nn.utils.clip_grad_norm_(module.parameters(), work.clip)
    optimizer.step()
