"""A network of two hundred weights, three rules on it, and what they must do: computed in float64, by definition.

Legend: V = 13 tokens, D = 6 features, H = 9 neurons, E = 2 experts, F = 5 features of an expert. Every matrix has odd
sides, so flat partitions cut through its rows, and an expert's boundary is none of a partition's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_symopt import Layout

MOMENTUM = 0.9
BETAS = (0.9, 0.95)
RATES = {"spectral": 0.02, "experts": 0.03, "rows": 0.05, "vectors": 0.01}

Gradients = dict[str, Tensor]
Direction = Callable[[Tensor], Tensor]


class Network(nn.Module):
    """Tokens to logits of tokens; called, it is the loss times `loudness`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.mix = nn.Linear(6, 9)
        self.experts = nn.Parameter(torch.empty(2, 9, 5))
        self.head = nn.Linear(5, 13, bias=False)
        self.loudness = 1.0

    def forward(self, tokens: Tensor) -> Tensor:
        """Cross-entropy of tokens `[B, T]` that each follows its predecessor."""
        wide = torch.tanh(self.mix(self.embed(tokens[:, :-1])))
        first, second = torch.tanh(torch.einsum("bth,ehf->ebtf", wide, self.experts))
        logits = self.head(first + 0.5 * second)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        return loss * self.loudness


def initial_weights() -> dict[str, Tensor]:
    """By parameter name; exact in bfloat16, so that half precision starts from the same."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: (torch.randn(parameter.shape, generator=generator) * 0.5).bfloat16().float()
        for name, parameter in Network().named_parameters()
    }


def network() -> Network:
    """The network with its initial weights."""
    module = Network()
    module.load_state_dict(initial_weights())
    return module


def micro_batch(step: int, index: int) -> Tensor:
    """Tokens `[8, 9]` of the `index`-th micro-batch of a step, over all ranks."""
    return torch.randint(13, (8, 9), generator=torch.Generator().manual_seed(100 * step + index))


def groups_of(module: nn.Module, **changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One group a rule, each with a rate of its own.

    Args:
        module: a `Network`, sharded or not.
        changes: keys of groups to set otherwise, by the group's name.
    """
    named = dict(module.named_parameters())
    options: dict[str, dict[str, Any]] = {
        "spectral": {"rule": "spectral", "precision": "exact"},
        "experts": {"rule": "spectral", "precision": "exact", "layout": Layout.experts()},
        "rows": {"rule": "row_norm"},
        "vectors": {"rule": "adamw", "betas": BETAS},
    }
    members = {
        "spectral": ["mix.weight", "head.weight"],
        "experts": ["experts"],
        "rows": ["embed.weight"],
        "vectors": ["mix.bias"],
    }
    return [
        {
            "name": name,
            "params": [(member, named[member]) for member in members[name]],
            "lr": RATES[name],
            "momentum": MOMENTUM,
            "weight_decay": 0.0,
            **options[name],
            **changes.get(name, {}),
        }
        for name in options
    ]


# -- the definition ----------------------------------------------------------------------------------------------


def polar(matrices: Tensor) -> Tensor:
    """U Vᵀ of a singular value decomposition, of each matrix of a stack."""
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    product: Tensor = u @ vh
    return product


def unit_rows(matrix: Tensor) -> Tensor:
    """Each row over its norm; rows of zeros stay."""
    norms = matrix.norm(dim=-1, keepdim=True)
    return torch.where(norms > 0, matrix / norms, 0.0)


RULES: dict[str, Direction] = {
    "mix.weight": polar,
    "head.weight": polar,
    "experts": polar,
    "embed.weight": unit_rows,
}
GROUP = {
    "mix.weight": "spectral",
    "head.weight": "spectral",
    "experts": "experts",
    "embed.weight": "rows",
    "mix.bias": "vectors",
}


def trained(
    steps: int,
    *,
    micro_batches: int = 2,
    rules: Mapping[str, Direction] | None = None,
    each_micro_batch: bool = False,
    rates: Callable[[int, str], float] | None = None,
    loudness: float = 1.0,
    change: Callable[[Gradients], Gradients] = lambda gradients: gradients,
) -> dict[str, Tensor]:
    """Weights after some steps on the mean gradient of a step's micro-batches, in float64.

    Args:
        steps: number of steps.
        micro_batches: of a step.
        rules: in place of those of the definition, by parameter: for updates that are wrong on purpose.
        each_micro_batch: apply the rule to the momentum of every micro-batch: wrong on purpose too.
        rates: learning rate by step and group; default: `RATES`.
        loudness: factor of the loss.
        change: what happens to the mean gradients before they are used.
    """
    module = network().double()
    module.loudness = loudness
    rules = {**RULES, **(rules or {})}
    momentum = {name: torch.zeros_like(weight) for name, weight in module.named_parameters()}
    vectors = torch.optim.AdamW([module.mix.bias], betas=BETAS, weight_decay=0.0)
    for step in range(steps):
        batches = [[micro_batch(step, index)] for index in range(micro_batches)]
        for together in batches if each_micro_batch else [[one for alone in batches for one in alone]]:
            gradients = change(_mean_gradients(module, together))
            share = 1 / micro_batches if each_micro_batch else 1.0
            for name, weight in module.named_parameters():
                rate = RATES[GROUP[name]] if rates is None else rates(step, GROUP[name])
                if name == "mix.bias":
                    vectors.param_groups[0]["lr"], weight.grad = rate, gradients[name]
                    vectors.step()
                    continue
                momentum[name] = MOMENTUM * momentum[name] + (1 - MOMENTUM) * gradients[name]
                with torch.no_grad():
                    weight.sub_(share * rate * rules[name](momentum[name]))
    return {name: weight.detach() for name, weight in module.named_parameters()}


def _mean_gradients(module: Network, batches: list[Tensor]) -> Gradients:
    total: Gradients = {}
    for tokens in batches:
        found = torch.autograd.grad(module(tokens), list(module.parameters()))
        for (name, _), gradient in zip(module.named_parameters(), found, strict=True):
            total[name] = total.get(name, 0.0) + gradient / len(batches)
    return total


# -- comparing ---------------------------------------------------------------------------------------------------


def errors(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """‖ΔW − ΔW*‖/‖ΔW*‖ of every parameter, Δ from the initial weights: a step not taken is an error of 1."""
    assert set(weights) == set(expected) == set(initial_weights())
    found = {}
    for name, start in initial_weights().items():
        moved, due = weights[name].detach().double() - start, expected[name].double() - start
        assert due.norm() > 0
        found[name] = float((moved - due).norm() / due.norm())
    return found


def assert_change_is(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-4) -> None:
    """Every parameter has moved as expected."""
    off = {name: error for name, error in errors(weights, expected).items() if not error <= tolerance}
    assert not off, f"relative errors of the change: {off}"


def assert_directions_are_unit(weights: Mapping[str, Tensor]) -> None:
    """The first step's updates are what their rules make: polar factors, with no singular value but one, and unit rows.

    Whatever half precision does to the gradients; a zero update, a gradient's or that of a part would not pass.
    """
    for name, start in initial_weights().items():
        update = (start - weights[name].detach()).double() / RATES[GROUP[name]]
        if name == "embed.weight":
            sizes = update.norm(dim=-1)
        elif name in RULES:
            sizes = torch.linalg.svdvals(update)
        else:
            continue
        assert (sizes - 1).abs().max() < 1e-4, f"{name}: {sizes}"
