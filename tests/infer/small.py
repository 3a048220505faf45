"""Small parts for the tests of inference, and what they compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_symopt import Block
from lit_symopt.infer import infer


def roles(module: nn.Module, batch: Any) -> dict[str, str]:
    return {block.name: str(block.role) for block in infer(module, batch).blocks}


def blocks(module: nn.Module, batch: Any) -> dict[str, Block]:
    return {block.name: block for block in infer(module, batch).blocks}


def tokens(*shape: int) -> Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """`x + f(x)`."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.function(self, x)
        return out
