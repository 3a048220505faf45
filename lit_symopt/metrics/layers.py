"""Layers in tags: what a layer is called, and what one number says of all of them.

Shape legend:  L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Over = Literal["mean", "max", "sum", "rms"]


def labels(paths: Sequence[str]) -> list[str]:
    """A short name for each module path: `layer_3` where the only number in each path tells them apart, else the path.

    Example:
        >>> labels(["model.layers.0.mlp.gate", "model.layers.10.mlp.gate"])
        ['layer_0', 'layer_10']
        >>> labels(["encoder.router", "decoder.router"])
        ['encoder.router', 'decoder.router']
    """
    numbers = [[part for part in path.split(".") if part.isdigit()] for path in paths]
    if all(len(found) == 1 for found in numbers) and len({found[0] for found in numbers}) == len(paths):
        return [f"layer_{found[0]}" for found in numbers]
    return list(paths)


def above(path: str) -> list[str]:
    """The paths of the modules around one, the nearest first.

    Example:
        >>> above("a.b.c")
        ['a.b', 'a', '']
    """
    parts = path.split(".") if path else []
    return [".".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1)]


def over_layers(values: Tensor, over: Over) -> Tensor:
    """One number for the L values of all layers: their mean, largest, sum or root mean square.

    Example:
        >>> over_layers(torch.tensor([3.0, 4.0]), "max").item()
        4.0
    """
    values = values.to(torch.float64)
    if over == "mean":
        return values.mean()
    if over == "max":
        return values.max()
    return values.sum() if over == "sum" else values.square().mean().sqrt()
