"""How much a batch of token sequences holds, for Lightning's `ThroughputMonitor`.

Shape legend:  B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def sequences(batch: Mapping[str, Tensor]) -> int:
    """Sequences of a batch: B of its `input_ids [B, T]`.

    Example:
        >>> import torch
        >>> sequences({"input_ids": torch.zeros(4, 16)})
        4
    """
    return batch["input_ids"].shape[0]


def tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch, padding included: B · T of its `input_ids [B, T]`.

    Example:
        >>> import torch
        >>> tokens({"input_ids": torch.zeros(4, 16)})
        64
    """
    return batch["input_ids"].numel()
