"""The loss of a language model: the cross-entropy of each next token.

Shape legend:  B sequences of a batch, T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from lit_symopt.errors import ConfigError

_NO_TARGET = -100


def next_token_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    """The mean cross-entropy of each next token, in nats.

        -1/(B·(T-1)) Σ_b Σ_{t<T} log softmax(logits[b, t])[input_ids[b, t+1]]

    Args:
        logits: `[B, T, V]`. Float64 ones are taken as they are, all others in float32.
        input_ids: `[B, T]`, the tokens that gave the logits.

    Raises:
        ConfigError: if a sequence has no next token.

    Example:
        >>> next_token_loss(torch.zeros(1, 3, 2), torch.tensor([[0, 1, 1]]))  # log 2
        tensor(0.6931)
    """
    refuse_without_targets(input_ids)
    # Every position keeps its logits and the last one gets no target: slicing the logits would copy them.
    targets = pad(input_ids, (0, 1), value=_NO_TARGET)[:, 1:]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_NO_TARGET)


def refuse_without_targets(input_ids: Tensor) -> None:
    """Checks that the sequences of a batch `[B, T]` have a next token.

    Raises:
        ConfigError: if T is less than 2.
    """
    if input_ids.shape[-1] < 2:
        raise ConfigError(
            f"a batch of shape {tuple(input_ids.shape)} has sequences of {input_ids.shape[-1]} token(s), which have no "
            "next token to predict; give sequences of 2 tokens or more (sequence_length of the data)"
        )
