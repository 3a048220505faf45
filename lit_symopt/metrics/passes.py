"""Forward passes as hooks see them.

Hooks run for every call of a module, also for those that activation checkpointing repeats during backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def in_backward() -> bool:
    """Whether this runs inside a backward pass, where checkpointing repeats forward passes."""
    return bool(torch._C._current_graph_task_id() != -1)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings, in order.

    Example:
        >>> [tuple(tensor.shape) for tensor in tensors_in((torch.ones(2), {"a": [torch.ones(3), None]}))]
        [(2,), (3,)]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)
