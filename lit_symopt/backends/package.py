"""The polar factor by the package `gram-newton-schulz` (Zhang, Amsel, Chen and Dao 2026).

It iterates on the Gram matrix in float16, with one restart after two of five steps of Polar Express, and multiplies
symmetric matrices by CuTe kernels on Hopper and newer GPUs, by torch's products on a CPU, where that is slow and serves
for checks alone. Not yet measured on a GPU.

Source: https://github.com/Dao-AILab/gram-newton-schulz.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

RESTARTS = (2,)
"""Steps before which the Gram matrix is computed anew: what the package uses by default, stated here to stay so."""


@torch.no_grad()
def polar(x: Tensor) -> Tensor:
    """The polar factor of each matrix of `x` [..., m, n]: same shape and dtype, contiguous; `x` is not written.

    Each matrix is first divided by its largest entry: the package takes the Frobenius norm in float32, whose squares
    would over- or underflow. What is not finite makes its matrix NaN. Call `require_backend` before.

    Args:
        x: real matrices, none of them empty.
    """
    work = x.reshape(-1, *x.shape[-2:]).float()
    peak = torch.maximum(work.amax(dim=(-2, -1), keepdim=True), -work.amin(dim=(-2, -1), keepdim=True))
    work = work / torch.where(peak > 0, peak, 1)
    return _iteration(x.is_cuda)(work).to(x.dtype).reshape(x.shape)


@cache
def _iteration(kernels: bool) -> Callable[[Tensor], Tensor]:
    # Not compiled: it would make a graph of every shape, and with CUDA graphs, its default, a result is overwritten by
    # the next call.
    kind = import_module("gram_newton_schulz").GramNewtonSchulz
    return kind(  # type: ignore[no-any-return]
        ns_use_kernels=kernels, gram_newton_schulz_reset_iterations=list(RESTARTS), compile_kwargs=None
    )
