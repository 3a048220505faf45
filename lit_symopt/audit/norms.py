"""What a norm does, seen by calling it: whether it subtracts the mean, and which of its vectors are gains.

Shape legend:  d width of what is normalized.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """What is known of the vector of a norm.

    Attributes:
        gain: it multiplies; otherwise it is added.
        subtracts_mean: the module does not see a constant added to its input.
        constant: all entries are equal.
    """

    gain: bool
    subtracts_mean: bool
    constant: bool


def probe(module: nn.Module, name: str) -> Vectors | None:
    """What the module that owns a parameter does with it; None if that cannot be seen by calling it.

    Args:
        module: the whole module.
        name: of a parameter of one dimension.

    Example:
        >>> norms = nn.ModuleDict({"layer": nn.LayerNorm(4), "rms": nn.RMSNorm(4)})
        >>> probe(norms, "layer.weight").subtracts_mean, probe(norms, "rms.weight").subtracts_mean
        (True, False)
        >>> probe(norms, "layer.bias").gain
        False
    """
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    vector: Tensor = getattr(owner, leaf)
    if vector.dim() != 1 or any(True for _ in owner.children()):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, len(vector), generator=generator).to(vector)
    step = torch.rand(len(vector), generator=generator).to(vector) + 0.5
    with torch.no_grad():
        before = _called(owner, x)
        shifted = _called(owner, x + 3)
        data = vector.data
        try:
            vector.data = data + step
            moved = _called(owner, x)
        finally:
            vector.data = data
    if before is None or shifted is None or moved is None:
        return None
    difference = moved - before
    return Vectors(
        gain=not torch.allclose(difference, difference[:1].expand_as(difference), rtol=1e-3, atol=1e-4),
        subtracts_mean=torch.allclose(before, shifted, rtol=1e-3, atol=1e-4),
        constant=bool((vector == vector[0]).all()),
    )


def _called(owner: nn.Module, x: Tensor) -> Tensor | None:
    try:
        y = owner(x)
    except (TypeError, RuntimeError, ValueError, IndexError, AttributeError, NotImplementedError):
        return None  # not a map of one tensor: the caller says that nothing is known
    return y if isinstance(y, Tensor) and y.shape == x.shape else None
