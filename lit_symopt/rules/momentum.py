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

    >>> buffer = torch.tensor([1.0])
    >>> ema_([buffer], [torch.tensor([3.0])], 0.5)
    [tensor([2.])]
    """
    _accumulate_(buffers, gradients, beta, weight=1 - beta)
    return list(buffers)


@torch.no_grad()
def nesterov_(buffers: Sequence[Tensor], gradients: Sequence[Tensor], beta: float) -> list[Tensor]:
    """`buffers` ← β·`buffers` + `gradients`; the directions `gradients` + β·`buffers` are fresh tensors.

    >>> buffer = torch.tensor([1.0])
    >>> nesterov_([buffer], [torch.tensor([3.0])], 0.5), buffer
    ([tensor([4.7500])], tensor([3.5000]))
    """
    _accumulate_(buffers, gradients, beta, weight=1.0)
    if not buffers:
        return []
    directions = torch._foreach_mul(list(buffers), beta)
    torch._foreach_add_(directions, list(gradients))
    return list(directions)


def _accumulate_(buffers: Sequence[Tensor], gradients: Sequence[Tensor], beta: float, *, weight: float) -> None:
    if not buffers:  # the foreach operations refuse empty lists
        return
    torch._foreach_mul_(list(buffers), beta)
    torch._foreach_add_(list(buffers), list(gradients), alpha=weight)
