"""Where kernels in C++ can be tested."""

from __future__ import annotations

from shutil import which

import pytest

NEEDS_COMPILER = pytest.mark.skipif(which("g++") is None, reason="kernels in C++ need a compiler")


def _multiplies_bfloat16() -> bool:
    from lit_symopt.cpp.polar import supported

    return which("g++") is not None and supported()


MULTIPLIES_BF16 = _multiplies_bfloat16()
NEEDS_BF16 = pytest.mark.skipif(not MULTIPLIES_BF16, reason="needs a compiler and a CPU with AVX-512 BF16")
