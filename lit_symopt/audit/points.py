"""The weights at which symmetries are tried: the module's own, and generic ones of a size at which every block counts.

A freshly initialized model hardly uses its layers: its loss is near log V whatever they do, biases are zero and gains
are one. A symmetry holds at all weights, so it is also tried where breaking it cannot go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Generator, Tensor, nn

from lit_symopt.audit.sites import Anatomy
from lit_symopt.blocks import Block, Role

Values = Mapping[str, Tensor]
Gradients = Callable[[Values], tuple[float, Mapping[str, Tensor]]]

_DEVIATIONS = {Role.EMBEDDING: 0.7, Role.POSITION: 0.5}
"""Standard deviations of what is looked up in a table."""

_SIZES = {
    **dict.fromkeys((Role.TIED_EMBEDDING, Role.LM_HEAD), 2.0),
    **dict.fromkeys((Role.QUERY, Role.KEY), 2.5),  # so that heads look at few tokens
    Role.QKV: 2.0,
    **dict.fromkeys((Role.EXPERT_GATE_UP, Role.EXPERT_DOWN), 3.0),  # a router weights them down
    **dict.fromkeys((Role.GATE, Role.UP, Role.GATE_UP, Role.DOWN), 2.0),
    **dict.fromkeys((Role.LINEAR, Role.CONV), 1.0),
}
"""Size of the outputs of a matrix for inputs of size one; other roles have `_SIZE`."""

_SIZE = 1.5
_PERTURBATION = 0.25
_SHARPER = 1.5
_STEPS, _STEP, _FALLEN = 40, 0.05, 0.3


def given(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module as they are."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def sharpened(values: Values, model: Anatomy) -> dict[str, Tensor]:
    """The values with larger gains of the norms of queries and keys, so that heads look at different tokens.

    The same number is added to all gains, so that those that are equal stay so.
    """
    gains = [v.block.name for v in model.vectors if v.weight is None and v.along in (str(Role.QUERY), str(Role.KEY))]
    return {**values, **{name: values[name].float() + _SHARPER for name in gains}}


def generic(
    values: Values, model: Anatomy, generator: Generator, *, routing: frozenset[str] = frozenset()
) -> dict[str, Tensor]:
    """Random weights in place of those of the blocks, in float32.

    Matrices are normal with variance size²/fan_in, tables normal, vectors what they were and a quarter of their own
    size of noise (of one where they are zero).

    Args:
        values: what `given` returned.
        model: the blocks.
        generator: random numbers.
        routing: buffers that take part in routing, treated as vectors.
    """
    drawn = dict(values)
    for block in model.blocks:
        drawn[block.name] = _matrix(block, values[block.name], generator)
    for name in [vector.block.name for vector in model.vectors] + sorted(routing):
        old = values[name].float()
        size = old.square().mean().sqrt()
        noise = torch.randn(old.shape, generator=generator).to(old.device)
        drawn[name] = old + _PERTURBATION * torch.where(size > 0, size, 1) * noise
    return drawn


def fitted(values: Values, model: Anatomy, gradients: Gradients) -> dict[str, Tensor]:
    """The values after steps downhill, W ← W - η rms(W) G / rms(G), until little of the loss is left.

    At random weights a broken block raises the loss of some tokens and lowers that of others, and their mean hardly
    moves. Where the loss has been lowered, every block has a part in it.

    Args:
        values: weights, float32.
        model: the blocks.
        gradients: the loss and its gradients, at weights.
    """
    fit = dict(values)
    names = {block.name for block in model.blocks} | {vector.block.name for vector in model.vectors}
    start: float | None = None
    for _ in range(_STEPS):
        loss, found = gradients(fit)
        start = loss if start is None else start
        if not loss > _FALLEN * start:
            break
        for name, gradient in found.items():
            size, length = fit[name].float().square().mean().sqrt(), gradient.float().square().mean().sqrt()
            if name in names and bool(length > 0) and bool(length.isfinite()):
                fit[name] = fit[name].float() - _STEP * size * gradient.float() / length
    return fit


def _matrix(block: Block, like: Tensor, generator: Generator) -> Tensor:
    assert block.layout is not None
    matrices = []
    for part in block.parts:
        deviation = _DEVIATIONS.get(block.role, _SIZES.get(block.role, _SIZE) / part.fan_in**0.5)
        matrices.append(deviation * torch.randn(*part.batch, part.m, part.n, generator=generator))
    return block.layout.from_matrices(matrices, like.shape).to(like.device).contiguous()
