"""Where Triton kernels are checked; the fixtures `interpreter` and `on` of `tests/conftest.py` run a check there."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import pytest

Run = Callable[..., Any]
"""Calls a function with its arguments, and with `device`, where kernels run."""

NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="needs `pip install lit-symopt[triton]`")
OLD = find_spec("triton") is not None and tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
INTERPRETED = pytest.mark.skipif(OLD, reason="the interpreter of Triton before 3.7 fails with NumPy 2.4")
PLACES = [pytest.param("interpreter", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
"""Triton settles when it is imported whether it interprets: on a CPU, what is checked runs in a process of its own."""
