"""`torch.compile` with a bounded number of graphs: by the pattern of the shapes, not by the shapes.

A compiled function keeps a graph for every set of assumptions under which it was called, and above eight of them runs
uncompiled, with no more than a warning. Sizes are symbols here (`dynamic=True`), of which a graph assumes only what
`pattern` says: which sizes are one, which are equal, and how the tensors lie in memory. Every pattern has a function of
its own, compiled once; a second compilation that would still come to pass by the eighth time is an error.

A number that changes from step to step, such as a learning rate, must be a tensor, because a graph assumes the value of
every Python number.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import pairwise
from types import FunctionType
from typing import Any

import torch
from torch import Tensor


class Graphs:
    """A function of tensors (or `None`) that is compiled for every pattern of its arguments.

    Args:
        function: of positional arguments only; compiled as one graph.

    Example:
        >>> double = Graphs(lambda x: 2 * x)
        >>> double.compiled  # nothing before the first call
        0
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        assert isinstance(function, FunctionType)
        self._function = function
        self._compiled: dict[Hashable, Callable[..., Any]] = {}

    @property
    def compiled(self) -> int:
        """How many patterns have been met."""
        return len(self._compiled)

    def __call__(self, *tensors: Tensor | None) -> Any:
        """The function of the tensors; compiles it, which takes seconds, at the first call with their pattern."""
        key = pattern(*tensors)
        function = self._compiled.get(key)
        if function is None:
            function = self._compiled[key] = torch.compile(_copy(self._function), fullgraph=True, dynamic=True)
        return function(*tensors)


def pattern(*tensors: Tensor | None) -> Hashable:
    """What graphs with symbolic sizes assume of their arguments: equal patterns share a graph.

    >>> a, b, c = torch.empty(2, 3), torch.empty(5, 7), torch.empty(5, 5)
    >>> pattern(a) == pattern(b), pattern(a) == pattern(c)
    (True, False)
    """
    sizes: dict[int, int] = {}
    return tuple(None if tensor is None else _pattern_of(tensor, sizes) for tensor in tensors)


def _pattern_of(tensor: Tensor, sizes: dict[int, int]) -> Hashable:
    # Sizes by the order in which they are met; 0 and 1 are themselves.
    shape = tuple(size if size < 2 else sizes.setdefault(size, len(sizes) + 2) for size in tensor.shape)
    # Of strided views: which dimension goes first in memory, which strides are 0 or 1, and which have gaps.
    strides: Hashable = "contiguous"
    if not tensor.is_contiguous():
        order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        gaps = tuple(
            tensor.stride(outer) == tensor.stride(inner) * tensor.shape[inner] for outer, inner in pairwise(order)
        )
        strides = (tuple(order), tuple(min(stride, 2) for stride in tensor.stride()), gaps)
    return shape, strides, tensor.dtype, tensor.device, torch.is_inference(tensor)


def _copy(function: FunctionType) -> FunctionType:
    """The same function with a code object of its own: torch.compile keeps its graphs, and counts them, by that."""
    copy = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
