r"""Momentum: from gradients to the direction a rule is applied to.

    ema        M ← β M + (1-β) G,   direction M        (the default)
    nesterov   B ← β B + G,         direction G + β B

Both keep one number an element. The buffers are updated in place, a list of tensors at a time.

Source of the Nesterov form: Sutskever et al. 2013 as in `torch.optim.SGD(nesterov=True)`, used by Jordan et al. 2024
(Muon).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_(buffers: Sequence[Tensor], gradients: Sequence[Tensor], beta: float) -> list[Tensor]:
    """`buffers` ← β·`buffers` + (1-β)·`gradients`; the directions returned *are* the buffers, to be read only.

    Computed as B + (1-β) (G - B), which reads and writes memory once.

    >>> buffer = torch.tensor([1.0])
    >>> ema_([buffer], [torch.tensor([3.0])], 0.5)
    [tensor([2.])]
    """
    if buffers:  # the foreach operations refuse empty lists
        alike = [  # a linear interpolation takes one dtype
            gradient if gradient.dtype == buffer.dtype else gradient.to(buffer.dtype)
            for buffer, gradient in zip(buffers, gradients, strict=True)
        ]
        torch._foreach_lerp_(list(buffers), alike, 1 - beta)
    return list(buffers)


@torch.no_grad()
def nesterov_(
    buffers: Sequence[Tensor], gradients: Sequence[Tensor], beta: float, *, into: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """`buffers` ← β·`buffers` + `gradients`; the directions `gradients` + β·`buffers` are other tensors.

    Args:
        buffers: the state, one tensor a parameter.
        gradients: of the same shapes and dtype.
        beta: of the momentum.
        into: where to write the directions; may be the gradients themselves. Default: fresh tensors.

    >>> buffer = torch.tensor([1.0])
    >>> nesterov_([buffer], [torch.tensor([3.0])], 0.5), buffer
    ([tensor([4.7500])], tensor([3.5000]))
    """
    if not buffers:
        return []
    torch._foreach_mul_(list(buffers), beta)
    torch._foreach_add_(list(buffers), list(gradients))
    if into is None:
        return list(torch._foreach_add(list(gradients), list(buffers), alpha=beta))
    if into is not gradients:
        torch._foreach_copy_(list(into), list(gradients))
    torch._foreach_add_(list(into), list(buffers), alpha=beta)
    return list(into)
