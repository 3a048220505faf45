"""Example batches: 3 sequences of 11 tokens out of 53, and what else a model asks for."""

from __future__ import annotations

import torch
from torch import Tensor

SEQUENCES, TOKENS = 3, 11


def ids(vocabulary: int = 53) -> Tensor:
    """Token ids `[3, 11]`."""
    return torch.randint(vocabulary, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(2))


def tokens() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def square() -> dict[str, Tensor]:
    return {"input_ids": ids(24)}


def images() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "pixel_values": torch.randn(5, 2, 12, 12, generator=generator),
        "labels": torch.randint(7, (5,), generator=generator),
    }


def sentences() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    segments = torch.zeros(SEQUENCES, TOKENS, dtype=torch.long)
    segments[:, 6:] = 1
    return {"input_ids": ids(), "token_type_ids": segments, "labels": torch.randint(7, (3,), generator=generator)}


def masked() -> dict[str, Tensor]:
    labels = ids().clone()
    labels[:, ::2] = -100
    return {"input_ids": ids().roll(1, 0), "labels": labels}


def pairs() -> dict[str, Tensor]:
    answers = torch.randint(53, (SEQUENCES, 8), generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids(), "decoder_input_ids": answers[:, :-1], "labels": answers[:, 1:].contiguous()}


def translation() -> tuple[Tensor, Tensor]:
    return torch.randint(61, (SEQUENCES, 8), generator=torch.Generator().manual_seed(6)), ids()


def labeled() -> tuple[Tensor, Tensor]:
    return ids(), torch.randint(7, (SEQUENCES,), generator=torch.Generator().manual_seed(3))
