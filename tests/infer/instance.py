"""A module with its example batch, made anew by every call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Instance:
    """A module and a batch for it, both made anew by every call and always the same.

    Attributes:
        build: the module, with the weights that its own initialization gives it.
        batch: what its forward, `training_loss` or `training_step` takes.
        ours: plain torch of ours, whose arithmetic is float64 throughout when its weights are.
        declares: its own `block_taxonomy()` is the answer.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    ours: bool = False
    declares: bool = False

    def module(self) -> nn.Module:
        """The module as it might be after some training: no weight is constant, no signal vanishes."""
        torch.manual_seed(0)
        module = self.build()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if name.endswith("A_log") or parameter.dim() < 2:
                    parameter.add_(0.2 * noise)
                else:
                    parameter.copy_(noise * _narrow(parameter) ** -0.5 * _volume(name))
        return module


def _volume(name: str) -> float:
    """What would hardly be heard is made louder: one expert of several, T5's logits, which it divides by √d, scores."""
    louder = {".experts.": 2.0, "shared.weight": 4.0, ".self.query.": 3.0, "in_proj_weight": 2.0}
    return next((volume for part, volume in louder.items() if part in name), 1.0)


def _narrow(matrix: Tensor) -> int:
    """The narrower side of a matrix, or of the kernel of a convolution seen as one."""
    kernel = matrix.flatten(1) if matrix.dim() > 3 or matrix.shape[1] == 1 else matrix
    return min(kernel.shape[-2:])
