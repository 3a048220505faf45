"""The routers of a module, found from the blocks that its taxonomy declares.

Shape legend:  N tokens, E experts, K experts a token is sent to, d features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lit_symopt.blocks import Block, BlockTaxonomy, Role
from lit_symopt.metrics.layers import above, labels
from lit_symopt.metrics.logits import shift_of

# What modules call the number of experts a token is sent to.
_TOP_K = ("top_k", "topk", "num_experts_per_tok", "num_experts_per_token", "n_activated_experts", "moe_top_k")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_EXPERTS = (Role.EXPERT_GATE_UP, Role.EXPERT_DOWN)


@dataclass(frozen=True, kw_only=True, eq=False)
class Router:
    """One router: the module that scores the experts of a layer, and what its block says of it.

    Attributes:
        name: full name of its weight.
        label: short name of its layer, for tags: `layer_3`.
        block: its block, with the shape.
        module: the module that owns the weight; its input is what the weight is applied to.
        parent: the module it is called in, or None for a router that is the whole module.
        holders: the modules beside it that own the stacks of experts.
        experts: E.
        top_k: K as the module or one around it declares it, or None.
        bias: whether the module's `bias` is added to the logits.
    """

    name: str
    label: str
    block: Block
    module: nn.Module
    parent: nn.Module | None
    holders: tuple[nn.Module, ...]
    experts: int
    top_k: int | None
    bias: bool

    @property
    def scores(self) -> Literal["softmax", "sigmoid"]:
        """How logits become probabilities: by softmax where only differences of logits count, but for a z-loss."""
        softmax = self.block.symmetry.shift_invariant or self.block.z_loss
        return "softmax" if softmax else "sigmoid"

    def weight(self) -> Tensor:
        """The weight as one matrix `[E, d]`, whichever way it is stored."""
        assert self.block.layout is not None
        stored: Tensor = getattr(self.module, self.name.rpartition(".")[2])
        return self.block.layout.to_matrices(stored.detach())[0]

    def logits(self, inputs: Tensor) -> Tensor:
        """`x Wᵀ + b` of inputs `[..., d]`: `[N, E]` in float32 (float64 for a float64 router), without autocast."""
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            weight = self.weight()
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            bias: Tensor | None = self.module.bias.detach().to(dtype) if self.bias else None  # type: ignore[operator]
            rows = inputs.detach().reshape(-1, weight.shape[1]).to(dtype)
            return functional.linear(rows, weight.to(dtype), bias)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities `[N, E]`: softmax of the logits, or their sigmoids divided by the token's sum of them."""
        if self.scores == "softmax":
            return logits.softmax(-1)
        scores = logits.sigmoid()
        return scores / scores.sum(-1, keepdim=True)

    def shift(self) -> Tensor:
        """`‖1ᵀW‖/√E`, a float64 number."""
        return shift_of(self.weight())


def find_routers(module: nn.Module, taxonomy: BlockTaxonomy | None = None, *, top_k: int | None = None) -> list[Router]:
    """The routers of a module, frozen ones included, in the order of its parameters; empty if it has none.

    Args:
        module: any module.
        taxonomy: its blocks; default: what the module declares, or that of a known architecture inside it.
        top_k: K of every router, in place of what the modules declare.

    Raises:
        TaxonomyError: if there is no taxonomy.

    Example:
        >>> moe = nn.ModuleDict({"router": nn.Linear(8, 4), "experts": nn.Linear(8, 8)})
        >>> [router] = find_routers(moe, BlockTaxonomy([Block("router.weight", role=Role.ROUTER)]))
        >>> router.experts, router.logits(torch.ones(3, 8)).shape
        (4, torch.Size([3, 4]))
    """
    taxonomy = taxonomy or BlockTaxonomy.of(module)
    found = []
    for name, parameter in module.named_parameters():
        block = _block(taxonomy, name, parameter)
        if block is not None and block.role is Role.ROUTER:
            found.append((name, block))
    shown = labels([name.rpartition(".")[0] for name, _ in found])
    return [_router(module, taxonomy, *entry, label, top_k) for entry, label in zip(found, shown, strict=True)]


def _router(
    module: nn.Module, taxonomy: BlockTaxonomy, name: str, block: Block, label: str, top_k: int | None
) -> Router:
    path = name.rpartition(".")[0]
    own = module.get_submodule(path)
    around = {place: module.get_submodule(place) for place in above(path)}  # the nearest first, the whole module last
    # A container is never called: the router runs in what is around it.
    parent = next((place for place, child in around.items() if not isinstance(child, _CONTAINERS)), None)
    [part] = block.parts
    declared = next((k for place in (own, *around.values()) if (k := _declared(place, part.m))), None)
    return Router(
        name=name,
        label=label,
        block=block,
        module=own,
        parent=None if parent is None else around[parent],
        holders=() if parent is None else _holders(around[parent], taxonomy, parent, own),
        experts=part.m,
        top_k=declared if top_k is None else min(top_k, part.m),
        bias=_has_bias(own, taxonomy, path, part.m),
    )


def _block(taxonomy: BlockTaxonomy, name: str, parameter: nn.Parameter) -> Block | None:
    """The block of a parameter, frozen or not."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    return next((replace(b, name=name, shape=shape) for b in taxonomy.blocks if b.matches([name])), None)


def _declared(place: nn.Module, experts: int) -> int | None:
    for holder in (place, getattr(place, "config", None)):
        for name in _TOP_K:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= experts:
                return value
    return None


def _holders(parent: nn.Module, taxonomy: BlockTaxonomy, prefix: str, router: nn.Module) -> tuple[nn.Module, ...]:
    """The modules below the parent, other than itself, that own a stack of experts."""
    found = []
    for path, child in parent.named_modules(prefix=prefix):
        if child in (parent, router):
            continue
        blocks = (
            _block(taxonomy, f"{path}.{name}", parameter) for name, parameter in child.named_parameters(recurse=False)
        )
        if any(block is not None and block.role in _EXPERTS for block in blocks):
            found.append(child)
    return tuple(found)


def _has_bias(module: nn.Module, taxonomy: BlockTaxonomy, path: str, experts: int) -> bool:
    """Whether `bias` is one of the logits and not only of the choice of experts, as some routers have."""
    bias = getattr(module, "bias", None)
    if not isinstance(bias, nn.Parameter):
        return False
    if isinstance(module, nn.Linear):
        return True
    block = _block(taxonomy, f"{path}.bias" if path else "bias", bias)
    return block is not None and (block.along == str(Role.ROUTER) or block.symmetry.shift_invariant or block.z_loss)
