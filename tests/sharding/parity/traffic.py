"""What this process really sends inside `optimizer.step()`, counted below `torch.distributed`'s functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import getattr_static
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Methods of a process group through which tensors leave a rank.
_SENDING = (
    "_allgather_base",
    "_reduce_scatter_base",
    "all_gather_single",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
)


class Traffic:
    """Bytes that leave this rank while a watched optimizer steps, by method of the process group.

    Every method of every process group is intercepted, so that nothing moves unseen. An all-to-all counts what goes to
    other ranks; an all-reduce of b bytes the 2b(W − 1)/W that each rank of a ring sends; anything else, which an
    exchange is not meant to use, the whole tensor.
    """

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._stepping = False

    def reset(self) -> None:
        """Count from zero."""
        self.bytes.clear()
        self.calls.clear()

    @contextmanager
    def watching(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Count in the steps of this optimizer."""
        step = optimizer.step
        kind = dist.ProcessGroup
        # What the class has in store, not what it hands out: only that binds to a group when it is put back.
        stored = {name: getattr_static(kind, name) for name in _SENDING if hasattr(kind, name)}

        def counted(*args: Any, **options: Any) -> Any:
            self._stepping = True
            try:
                return step(*args, **options)
            finally:
                self._stepping = False

        optimizer.step = counted  # type: ignore[method-assign]
        for name in stored:
            setattr(kind, name, self._intercepted(name, getattr(kind, name)))
        try:
            yield
        finally:
            for name, original in stored.items():
                setattr(kind, name, original)
            optimizer.step = step  # type: ignore[method-assign]

    def _intercepted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: dist.ProcessGroup, *args: Any, **options: Any) -> Any:
            if self._stepping:
                self.calls[name] += 1
                self.bytes[name] += _sent(name, group, args)
            return original(group, *args, **options)

        return call


def _sent(name: str, group: dist.ProcessGroup, args: tuple[Any, ...]) -> int:
    if name in ("all_to_all_single", "alltoall_base"):
        _, sent, _, split = args[:4]
        elements = sent.numel() - split[group.rank()] if split else sent.numel() * (group.size() - 1) // group.size()
        return int(elements * sent.element_size())
    if name == "allreduce":
        return round(2 * _bytes(args[0]) * (group.size() - 1) / group.size())
    return _bytes(args)


def _bytes(found: Any) -> int:
    """Bytes of all tensors in nested lists."""
    if isinstance(found, Tensor):
        return found.numel() * found.element_size()
    return sum(map(_bytes, found)) if isinstance(found, list | tuple) else 0
