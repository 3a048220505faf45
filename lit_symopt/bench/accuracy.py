"""Whether contestants do the same work: where their orthogonalization puts singular values.

A gradient with Gaussian entries, weights of zero, one step: `-ΔW` is `lr · scale · U`. For singular directions with
σ above 0.01 ‖G‖_F, `vᵢᵀ U wᵢ` must lie in [0.7, 1.2]. Fewer iterations, or coarser arithmetic, would be faster, and
fail.

The scale of an opponent is taken out by what it says of it (`Opponent.scale`), ours is put to `none` for the check. The
shapes are those of the list, with the smaller side cut to 512 where it is larger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_symopt.bench.opponents import Opponent
from lit_symopt.bench.ours import symopt
from lit_symopt.bench.shapes import ShapeList
from lit_symopt.bench.tensors import Numbers, matrix_shapes
from lit_symopt.blocks import Block, Role
from lit_symopt.config import RoleConfig
from lit_symopt.errors import ConfigError

LOW, HIGH = 0.7, 1.2
SHARE = 0.01
"""Of the Frobenius norm: singular values below are not asked about."""

SHAPES = 3
SIDE = 512


@dataclass(frozen=True, kw_only=True)
class Range:
    """Where singular values came to lie.

    Attributes:
        lowest, highest: over all shapes.
        shapes: that were tried, `(fan_out, fan_in)`.
    """

    lowest: float
    highest: float
    shapes: tuple[tuple[int, int], ...]

    @property
    def within(self) -> bool:
        """Whether all lie where they should."""
        return self.lowest >= LOW and self.highest <= HIGH

    def __str__(self) -> str:
        return f"[{self.lowest:.2f}, {self.highest:.2f}]"


def checked_shapes(shapes: ShapeList) -> tuple[tuple[int, int], ...]:
    """Up to three different shapes of hidden matrices: the cheapest ones, none with a smaller side above 512."""
    found = []
    for rows, columns in matrix_shapes(shapes):
        over = max(1, min(rows, columns) / SIDE)
        found.append((round(rows / over), round(columns / over)))
    return tuple(sorted(dict.fromkeys(found), key=lambda shape: shape[0] * shape[1] * min(shape))[:SHAPES])


def range_of(update: Callable[[Tensor], Tensor], shapes: Sequence[tuple[int, int]], numbers: Numbers) -> Range:
    """Where a method puts singular values.

    Args:
        update: gradient → U.
        shapes: of the gradients.
        numbers: dtype, device and seed of them.

    Example:
        >>> def exact(x):
        ...     u, _, vh = torch.linalg.svd(x, full_matrices=False)
        ...     return u @ vh
        >>> print(range_of(exact, [(8, 12)], Numbers()))
        [1.00, 1.00]
    """
    lowest, highest = float("inf"), float("-inf")
    generator = numbers.generator()
    for shape in shapes:
        drawn = torch.randn(shape, device=numbers.device, generator=generator).to(numbers.dtype)
        done = update(drawn.clone()).double().cpu()
        u, sigma, vh = torch.linalg.svd(drawn.double().cpu(), full_matrices=False)
        values = torch.einsum("ik,ij,kj->k", u, done, vh)[sigma > SHARE * sigma.square().sum().sqrt()]
        lowest, highest = min(lowest, values.min().item()), max(highest, values.max().item())
    return Range(lowest=lowest, highest=highest, shapes=tuple(shapes))


def range_of_opponent(opponent: Opponent, shapes: Sequence[tuple[int, int]], numbers: Numbers) -> Range:
    """Of an opponent, from what its step does to a weight of zeros."""

    def update(gradient: Tensor) -> Tensor:
        weight = _weight(gradient)
        for optimizer in opponent.build([weight], [], 1.0):
            optimizer.step()
        return -weight.detach() / opponent.scale(*gradient.shape)

    return range_of(update, shapes, numbers)


def range_of_ours(shapes: Sequence[tuple[int, int]], numbers: Numbers, *, stack: str, **options: Any) -> Range | None:
    """Of one of our stacks; `None` for one without a polar factor on hidden matrices.

    Raises:
        ConfigError: if singular values are not where they should be: a comparison would not be fair.
    """
    from lit_symopt.rules.rows import POLAR
    from lit_symopt.stacks import get_stack

    entry = get_stack(stack).table[Role.LINEAR]
    if entry.rule not in POLAR:
        return None
    plain = {"linear": RoleConfig(scale="none", radius=1.0, lr=1.0)}

    def update(gradient: Tensor) -> Tensor:
        block = Block("weight", role=Role.LINEAR, shape=tuple(gradient.shape))
        one = ShapeList(name="one", blocks=(block,))
        optimizer = symopt(one, replace(numbers, lr=1.0), stack=stack, roles=plain, **options)
        (weight,) = optimizer.param_groups[0]["params"]
        with torch.no_grad():
            weight.zero_()
        weight.grad = gradient
        optimizer.step()
        done: Tensor = -weight.detach()
        return done

    found = range_of(update, shapes, numbers)
    if not found.within:
        how = ", ".join(f"{name} {value!r}" for name, value in options.items() if value is not None)
        raise ConfigError(
            f"symopt:{stack} with {how} puts singular values above {SHARE} ‖M‖_F in {found}, not in "
            f"[{LOW}, {HIGH}]: it does not do the work that it would be timed for; choose another precision"
        )
    return found


def _weight(gradient: Tensor) -> nn.Parameter:
    weight = nn.Parameter(torch.zeros_like(gradient))
    weight.grad = gradient
    return weight
