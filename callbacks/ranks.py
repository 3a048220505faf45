"""What a checkpoint of rank 0 keeps of every rank."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch.distributed


def gathered(trainer: L.Trainer, own: object) -> list[Any]:
    """`own` of every rank, in their order: plain Python types and tensors. Every rank must call it."""
    states: list[Any] = [own]
    if trainer.world_size > 1:
        states = [None] * trainer.world_size
        torch.distributed.all_gather_object(states, own)
    return states
