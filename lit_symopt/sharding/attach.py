"""Which strategy has distributed an optimizer's parameters: found once, and checked to be the same on every rank."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from lit_symopt.errors import ConfigError

if TYPE_CHECKING:
    from lit_symopt.optim import SymOpt
    from lit_symopt.sharding.holdings import Distribution

SHOWN = 4


def distribution_for(optimizer: SymOpt, to: object = None) -> Distribution | None:
    """Who holds what of an optimizer's blocks; `None` if this process holds everything and shares no work.

    A collective call of the ranks concerned.

    Args:
        optimizer: any `SymOpt`.
        to: a `DeepSpeedEngine`; a `ProcessGroup` whose ranks hold copies (DDP); `None` to look for DTensors (FSDP2).

    Raises:
        ConfigError: for anything else and for what is not supported, by name; on every rank, if the ranks' blocks or
            groups differ.
    """
    distribution = _adapted(optimizer, to)
    if distribution is not None and distribution.world > 1:
        _refuse_unequal(optimizer, distribution)
    return distribution


def _adapted(optimizer: SymOpt, to: object) -> Distribution | None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # FSDP1's parameters, whole or as slices of a flat one, carry this mark.
    if any(getattr(parameter, "_fsdp_flattened", False) for parameter in parameters):
        raise ConfigError(
            "the parameters are flattened by FullyShardedDataParallel (FSDP1), which is not supported; use FSDP2 "
            "(torch.distributed.fsdp.fully_shard, or Lightning's ModelParallelStrategy), or DeepSpeed"
        )
    if to is None:
        if any(hasattr(parameter, "device_mesh") for parameter in parameters):
            from lit_symopt.sharding.dtensor import sharded

            return sharded(optimizer)
        return None
    if dist.is_available() and isinstance(to, dist.ProcessGroup):
        from lit_symopt.sharding.replicated import replicated

        return replicated(optimizer, to) if dist.get_world_size(to) > 1 else None
    # Whoever has an engine has imported deepspeed.
    engine = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None)
    if engine is not None and isinstance(to, engine):
        from lit_symopt.sharding.deepspeed import partitioned

        return partitioned(optimizer, to)
    raise ConfigError(
        f"attach({_called(to)}): give the engine that deepspeed.initialize returned, the process group of DDP "
        f"(ddp.process_group), or nothing for FSDP2"
    )


def _called(to: object) -> str:
    kind = type(to)
    return f"{kind.__module__}.{kind.__qualname__}"


def _refuse_unequal(optimizer: SymOpt, distribution: Distribution) -> None:
    """Collectives must be the same on every rank, and shared work must give everybody the same update."""
    ranks: list[Any] = [None] * distribution.world
    dist.all_gather_object(ranks, _description(optimizer, distribution), group=distribution.process_group)
    differences = [
        difference for rank, other in enumerate(ranks) for difference in _differences(ranks[0], other, rank=rank)
    ]
    if differences:
        more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise ConfigError(
            f"the ranks' optimizers differ under {distribution.strategy}: {'; '.join(differences[:SHOWN])}{more}. "
            f"Build the same model and the same optimizer on every rank, with the same configuration."
        )


def _description(optimizer: SymOpt, distribution: Distribution) -> dict[str, dict[str, Any]]:
    """What must be equal: of every holding a digest, of every group its options as text."""
    return {
        "holdings": {holding.key: _digest(holding.placements) for holding in distribution.holdings},
        "groups": {
            str(group["name"]): {
                option: _text(value) for option, value in group.items() if option not in ("params", "initial_lr")
            }
            for group in optimizer.param_groups
        },
    }


def _text(value: Any) -> str:
    text = str(value.tolist() if isinstance(value, Tensor) else value)
    return text if len(text) < 80 else f"{text[:60]}... ({_digest(text)[:8]})"  # the names of a hundred layers


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _differences(first: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]], *, rank: int) -> list[str]:
    found = []
    for what in ("groups", "holdings"):
        noun = "group" if what == "groups" else "block"
        here, there = first[what], other[what]
        found += [f"{noun} {name!r} is on rank 0 and not on rank {rank}" for name in here if name not in there]
        found += [f"{noun} {name!r} is on rank {rank} and not on rank 0" for name in there if name not in here]
        if set(here) == set(there) and list(here) != list(there):
            found.append(f"the {noun}s of rank {rank} are in another order than those of rank 0")
    for name, options in first["groups"].items():
        theirs = other["groups"].get(name, options)
        found += [
            f"group {name!r}: {option} is {options.get(option)!r} on rank 0 and {theirs.get(option)!r} on rank {rank}"
            for option in dict.fromkeys([*options, *theirs])
            if options.get(option) != theirs.get(option)
        ]
    found += _misplaced(first["holdings"], other["holdings"], rank)
    return found


def _misplaced(here: dict[str, str], there: dict[str, str], rank: int) -> Sequence[str]:
    return [
        f"{key!r} has another shape, or is cut at other places, on rank {rank} than on rank 0"
        for key in here
        if key in there and here[key] != there[key]
    ]
