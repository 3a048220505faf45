"""Calls of C++ as operators of torch, `torch.ops.lit_symopt`, by the names of which profilers know them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def _fragment() -> torch.library.Library:
    """Kept, because operators go with it."""
    return torch.library.Library("lit_symopt", "FRAGMENT")


def operator(schema: str, function: Callable[..., None]) -> Any:
    """Define an operator for CPUs; once a process.

    Args:
        schema: with a `!` at all that is written.
        function: what it does.
    """
    name = schema.partition("(")[0]
    _fragment().define(schema)
    _fragment().impl(name, function, "CPU")
    return getattr(torch.ops.lit_symopt, name)
