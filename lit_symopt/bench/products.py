"""The matrix products of a step, alone: the same ones, in a loop of `torch.bmm` on buffers that are ready.

One step is watched for its products (`mm`, `bmm`, `addmm`, `baddbmm` and those with `out`): batch, shapes, strides and
dtype of each. The loop repeats them in their order, each into a buffer of its own kind. It is what a step would cost of
which nothing is left but the products it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Geometry = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape `[batch, rows, columns]`, strides and dtype."""


class Watched(TorchDispatchMode):
    """Remembers the factors of every matrix product.

    Attributes:
        found: of each product, the geometry of both factors.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[Geometry, Geometry]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self._add(args[0], args[1])
        elif name in ("addmm", "baddbmm", "addmm_", "baddbmm_"):
            self._add(args[1], args[2])
        return func(*args, **(kwargs or {}))

    def _add(self, a: Tensor, b: Tensor) -> None:
        if a.numel() and b.numel():
            self.found.append((_geometry(a), _geometry(b)))


def products_of(step: Callable[[], object]) -> list[tuple[Geometry, Geometry]]:
    """The products of a step, in their order.

    Example:
        >>> x = torch.ones(4, 3)
        >>> products_of(lambda: x.mT @ x)
        [(((1, 3, 4), (3, 1, 3), torch.float32), ((1, 4, 3), (12, 3, 1), torch.float32))]
    """
    watched = Watched()
    with watched:
        step()
    return watched.found


def replay(found: list[tuple[Geometry, Geometry]], device: torch.device) -> Callable[[], None]:
    """A loop over the same products on buffers that are ready; equal ones share theirs."""
    buffers: dict[tuple[int, Geometry], Tensor] = {}
    generator = torch.Generator(device).manual_seed(0)

    def buffer(slot: int, geometry: Geometry) -> Tensor:
        shape, strides, dtype = geometry
        if (slot, geometry) not in buffers:
            made = torch.empty_strided(shape, strides, dtype=dtype, device=device)
            buffers[slot, geometry] = made.copy_(torch.randn(shape, generator=generator, device=device))
        return buffers[slot, geometry]

    calls = []
    for a, b in found:
        shape = (a[0][0], a[0][1], b[0][2])
        out = buffer(2, (shape, (shape[1] * shape[2], shape[2], 1), a[2]))
        calls.append((buffer(0, a), buffer(1, b), out))

    def run() -> None:
        for a, b, out in calls:
            torch.bmm(a, b, out=out)

    return run


def _geometry(x: Tensor) -> Geometry:
    x = x if x.ndim == 3 else x.unsqueeze(0)
    return tuple(x.shape), tuple(x.stride()), x.dtype
