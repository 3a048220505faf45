"""Weights in full precision: those that a half-precision run keeps beside its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_symopt.checkpoint.named import prefix_between


def in_full_precision(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint whose weights are the fp32 masters among the optimizer's state, where there are any.

    The masters stay in the state too: a run in half precision continues from them, one in full precision from the
    weights.

    Args:
        checkpoint: whose optimizer states are keyed by parameter name; it is not changed.
    """
    weights = dict(checkpoint["state_dict"])
    for optimizer in checkpoint.get("optimizer_states", ()):
        masters = {name: state["master"] for name, state in optimizer["state"].items() if "master" in state}
        prefix = prefix_between(list(masters), weights)
        own = {prefix + name for name in masters}
        for name, master in masters.items():
            half = weights[prefix + name]
            if half.dtype == master.dtype:
                continue
            # A tied parameter is saved under each of its names, and loading takes the last one.
            tied = [other for other, weight in weights.items() if other not in own and _same(weight, half)]
            weights.update(dict.fromkeys([prefix + name, *tied], master))
    return {**checkpoint, "state_dict": weights}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
