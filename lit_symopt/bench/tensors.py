"""Random parameters and gradients of a list of shapes: as a model has them, or cut as another optimizer wants them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lit_symopt.bench.shapes import ShapeList, shape_of_block
from lit_symopt.blocks import Block
from lit_symopt.rules.rows import POLAR
from lit_symopt.stacks import get_stack

WEIGHT = 0.02
GRADIENT = 1e-3


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Where random numbers lie, and which.

    Attributes:
        device, dtype: of parameters and gradients.
        seed: the same gives the same numbers to every contestant of the same cut.
        lr: of every optimizer; small, so that thousands of steps leave ordinary numbers.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    seed: int = 0
    lr: float = 1e-6

    def parameter(self, shape: tuple[int, ...], generator: torch.Generator) -> nn.Parameter:
        """A parameter with a gradient."""
        made = nn.Parameter(self._normal(shape, WEIGHT, generator))
        made.grad = self._normal(shape, GRADIENT, generator)
        return made

    def generator(self) -> torch.Generator:
        """A fresh one."""
        return torch.Generator(self.device).manual_seed(self.seed)

    def _normal(self, shape: tuple[int, ...], scale: float, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(shape, device=self.device, generator=generator)
        return drawn.mul_(scale).to(self.dtype)


def as_module(shapes: ShapeList, numbers: Numbers) -> nn.Module:
    """A module that has the parameters of a list by name, and computes nothing."""
    root, generator = nn.Module(), numbers.generator()
    for block in shapes.blocks:
        *path, last = block.name.split(".")
        module = root
        for name in path:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        module.register_parameter(last, numbers.parameter(shape_of_block(block), generator))
    return root


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Parameters cut for a method that knows matrices and everything else.

    Attributes:
        matrices: hidden matrices `[fan_out, fan_in]`, or stacks of them.
        others: all else, as the model has it.
    """

    matrices: list[nn.Parameter]
    others: list[nn.Parameter]


def is_hidden(block: Block) -> bool:
    """Whether Muon's table gives a block a matrix update: a hidden matrix, and no embedding, head, router or vector."""
    return get_stack("muon").table[block.role].rule in POLAR


def cut(shapes: ShapeList, numbers: Numbers, *, stacks: bool) -> Pieces:
    """The parameters as hidden matrices and the rest; as many numbers as in the list, in matrices of the same shapes.

    Gate and up of a fused parameter are matrices of their own, heads are not, as in Muon's table.

    Args:
        shapes: of all parameters.
        numbers: to fill them with.
        stacks: leave experts together as `[E, fan_out, fan_in]`; else every matrix is a parameter.
    """
    generator = numbers.generator()
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for block in shapes.blocks:
        if not is_hidden(block):
            others.append(numbers.parameter(shape_of_block(block), generator))
            continue
        matrices += [numbers.parameter(shape, generator) for shape in _cut_shapes(block, stacks=stacks)]
    return Pieces(matrices=matrices, others=others)


def _cut_shapes(block: Block, *, stacks: bool) -> Iterator[tuple[int, ...]]:
    assert block.layout is not None
    for part in block.layout.whole().parts(shape_of_block(block)):
        matrix = (part.fan_out, part.fan_in)
        if stacks and part.count > 1:
            yield (part.count, *matrix)
        else:
            yield from [matrix] * part.count


def matrix_shapes(shapes: ShapeList) -> list[tuple[int, int]]:
    """The different shapes of hidden matrices, `(fan_out, fan_in)`, in the order of the list."""
    found = [shape for block in shapes.blocks if is_hidden(block) for shape in _cut_shapes(block, stacks=False)]
    return [(shape[0], shape[1]) for shape in dict.fromkeys(found)]
