"""The polar factor in bfloat16, or what stands for it, by a backend other than eager."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_symopt.backends.choice import chosen, require_backend
from lit_symopt.linalg.execution import Execution
from lit_symopt.linalg.forms import choose_form
from lit_symopt.linalg.low_precision import QUINTICS, STEPS, polar_by_quintics
from lit_symopt.linalg.newton_schulz import PYTORCH, Products


def polar_by_backend(x: Tensor, how: Execution) -> Tensor:
    """The polar factor of each matrix of `x` [..., m, n]: same shape and dtype; `x` is not written.

    Args:
        x: real matrices, none of them empty, of any floating dtype.
        how: the backend. `eager`, `cpp` and `triton` borrow from its scratch memory, where the result may lie too; what
            `compile` and `gram-newton-schulz` return, and need in between, is memory of torch's allocator.

    Raises:
        ConfigError: if the backend does not run on the device of `x`.
    """
    backend = chosen(how.backend)
    require_backend(backend, x.device)
    if backend == "cpp":
        from lit_symopt.cpp import polar as cpp

        if cpp.supported():
            return cpp.polar(x, scratch=how.scratch)
    if backend == "compile":
        from lit_symopt.backends import compiled

        return compiled.polar(x, QUINTICS, form=choose_form(*x.shape[-2:], steps=STEPS))
    if backend == "gram-newton-schulz":
        from lit_symopt.backends import package

        return package.polar(x)
    products: Products = PYTORCH
    if backend == "triton":
        from lit_symopt.backends.kernels import TRITON

        products = TRITON
    if x.dtype == torch.bfloat16:
        return polar_by_quintics(x, products=products, scratch=how.scratch)
    result = how.scratch.like(x)
    with how.scratch.lend():
        return result.copy_(polar_by_quintics(x, products=products, scratch=how.scratch))
