"""Memory that a step borrows: kept from step to step, so that none of it is asked for twice.

A fresh tensor of some megabytes costs a page fault for every 4 KiB of it, several times what filling it costs, and
steps that ask for memory and return it let a process grow. An `Arena` keeps one block of memory on each device and
lends pieces of it one after the other; what `lend` has lent inside its `with` is free again after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

MIB = 1 << 20
ALIGNED = 256
"""Bytes: pieces begin at multiples of it, as those of torch's own allocators do."""


class Scratch:
    """Fresh memory, for whoever keeps none: every piece is a tensor of its own.

    >>> FRESH.empty((2, 3), dtype=torch.float32, device="cpu").shape
    torch.Size([2, 3])
    """

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """A contiguous tensor that holds anything; inside `lend` it is valid until its end."""
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    def like(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor of the shape and on the device of `x`."""
        return self.empty(x.shape, dtype=dtype or x.dtype, device=x.device)

    @contextmanager
    def lend(self) -> Iterator[None]:
        """Whatever `empty` gives inside is free again afterwards."""
        yield


FRESH = Scratch()
"""Memory of torch's allocator."""


class Arena(Scratch):
    """One block of memory on each device, of which pieces are lent; it grows to the most that was ever lent at once.

    >>> arena = Arena()
    >>> with arena.lend():
    ...     one = arena.empty((4,), dtype=torch.float64, device="cpu")
    ...     other = arena.empty((4,), dtype=torch.float64, device="cpu")
    >>> arena.bytes(torch.device("cpu"))
    512
    """

    def __init__(self) -> None:
        self._blocks: dict[torch.device, Tensor] = {}
        self._used: dict[torch.device, int] = {}
        self._wanted: dict[torch.device, int] = {}
        self._depth = 0

    def bytes(self, device: torch.device) -> int:
        """Kept on a device."""
        return max(self._wanted.get(device, 0), len(self._blocks.get(device, ())))

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """A piece of the block; fresh memory outside of `lend`, and until the block is large enough."""
        device = torch.device(device)
        size = prod(shape) * dtype.itemsize
        begin = self._used.get(device, 0)
        end = begin + -(-size // ALIGNED) * ALIGNED
        if not self._depth:
            return super().empty(shape, dtype=dtype, device=device)
        self._used[device] = end
        self._wanted[device] = max(self._wanted.get(device, 0), end)
        block = self._blocks.get(device)
        if block is None or end > len(block):
            # What is lent already stays where it is; the next `lend` finds a block that is large enough.
            return super().empty(shape, dtype=dtype, device=device)
        return block[begin : begin + size].view(dtype).view(tuple(shape))

    @contextmanager
    def lend(self) -> Iterator[None]:
        """Whatever `empty` gives inside is free again afterwards; may be nested."""
        if not self._depth:
            self._grow()
        before = dict(self._used)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            self._used = before

    def _grow(self) -> None:
        for device, wanted in self._wanted.items():
            if wanted > len(self._blocks.get(device, ())):
                self._blocks.pop(device, None)  # not both at once
                self._blocks[device] = torch.empty(wanted, dtype=torch.uint8, device=device)
