"""Two losses that routers are trained with besides the language model's: balanced loads and small logits.

Both take the router logits of every layer and are means over the layers.

Shape legend:  N tokens of a batch, E experts, k experts a token selects, L layers with experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_symopt.errors import ConfigError


def load_balancing_loss(logits: Sequence[Tensor], *, top_k: int) -> Tensor:
    """How unequally tokens and probability are spread over the experts.

        1/L Σ_layers E Σ_e f_e P_e,   f_e = 1/(N·k) Σ_n [e is among the k selected of n],   P_e = 1/N Σ_n softmax(x_n)_e

    where x_n are the E logits of token n. Both f and P sum to one, so that equal loads give 1 and one expert for all
    tokens and all probability gives E (k = 1). Only P has a gradient. A shift `x + c` does not change it.

    transformers' `load_balancing_loss_func` takes f and P over the tokens of all layers together, so that one layer's
    load may make up for another's, and does not divide f by k: for a single layer it is k times this one.

    Args:
        logits: `[N, E]` of each layer; summed up in float32, or float64 if they are.
        top_k: k.

    Returns:
        A scalar without a unit, at least 0.

    Source: Fedus, Zoph & Shazeer 2022, arXiv:2101.03961, equations 4 to 6 for k = 1; divided by k and averaged over
    layers as in Lau & Su 2026, arXiv:2605.18106.

    Raises:
        ConfigError: if there is no layer, or k is more than E.

    Example:
        >>> load_balancing_loss([torch.tensor([[9.0, 0.0], [0.0, 9.0]])], top_k=1)
        tensor(1.)
    """
    layers = []
    for layer in _checked(logits):
        experts = layer.shape[-1]
        if not 1 <= top_k <= experts:
            raise ConfigError(f"top_k={top_k} must be between 1 and the number of experts, {experts}")
        probabilities = torch.softmax(layer, dim=-1)
        selected = torch.topk(layer, top_k, dim=-1).indices.flatten()
        counts = layer.new_zeros(experts).index_add_(0, selected, layer.new_ones(len(selected)))
        layers.append(experts * torch.sum(counts / len(selected) * probabilities.mean(dim=0)))
    return torch.stack(layers).mean()


def router_z_loss(logits: Sequence[Tensor]) -> Tensor:
    """How far the logits' scale has moved from that of normalized log-probabilities.

        1/L Σ_layers 1/N Σ_n (log Σ_e exp x_ne)²

    The only one of the losses that sees a shift `x + c`, hence a router under it is not centered by default.

    Args:
        logits: `[N, E]` of each layer; summed up in float32, or float64 if they are.

    Returns:
        A scalar in nats squared, at least 0.

    Source: Zoph et al. 2022, arXiv:2202.08906, equation 5, averaged over layers.

    Raises:
        ConfigError: if there is no layer.

    Example:
        >>> router_z_loss([torch.zeros(3, 2)])  # (log 2)²
        tensor(0.4805)
    """
    return torch.stack([torch.logsumexp(layer, dim=-1).square().mean() for layer in _checked(logits)]).mean()


def _checked(logits: Sequence[Tensor]) -> list[Tensor]:
    """The logits `[N, E]` of each layer in at least float32."""
    if not logits:
        raise ConfigError("the model returned no router logits: it has no layer with experts")
    flat = [layer.flatten(0, -2) for layer in logits]
    return [layer if layer.dtype == torch.float64 else layer.float() for layer in flat]
