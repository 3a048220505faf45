"""DDP, and whatever else keeps a copy of every parameter on each rank: the work of the updates is shared.

Every rank holds all of every block, with all of its momentum; who computes which update is for the plan to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from lit_symopt.blocks import shape_of
from lit_symopt.errors import ConfigError
from lit_symopt.sharding.holdings import Distribution, Holding, Placement, Segment

if TYPE_CHECKING:
    from lit_symopt.optim import SymOpt


def replicated(optimizer: SymOpt, process_group: dist.ProcessGroup) -> Distribution:
    """The distribution of an optimizer whose parameters, and their gradients at every step, are equal on all ranks.

    Args:
        optimizer: over the whole parameters.
        process_group: the ranks that hold copies: DDP's own (`ddp.process_group`).

    Raises:
        ConfigError: if this process is not one of the group, or a parameter is sharded or partitioned.
    """
    if dist.get_rank(process_group) < 0:
        raise ConfigError("this process is not in the process group that the optimizer is attached to; give its own")
    for group in optimizer.param_groups:
        shapes = [tuple(shape_of(parameter)) for parameter in group["params"]]
        if shapes != [tuple(shape) for shape in group["shapes"]]:
            raise ConfigError(
                f"group {group['name']!r} was built over {len(group['shapes'])} parameter(s) and holds tensors of "
                f"shapes {shapes[:3]} now, which are no copies of them: under DeepSpeed call attach(engine), with the "
                f"engine that deepspeed.initialize returned"
            )
    world = dist.get_world_size(process_group)
    return _Copies(
        process_group,
        [
            replicated_holding(name, parameter, world=world)
            for group in optimizer.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        ],
    )


def replicated_holding(name: str, parameter: Tensor, *, world: int) -> Holding:
    """A parameter of which each of `world` ranks has a copy.

    Raises:
        ConfigError: if the parameter is sharded.
    """
    if hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_shape"):
        kind = "a DTensor" if hasattr(parameter, "device_mesh") else "partitioned by DeepSpeed"
        raise ConfigError(
            f"{name!r} is {kind}, so no rank holds a copy of it: attach the optimizer without a process group "
            f"(FSDP2 is found by itself), or to the engine that deepspeed.initialize returned"
        )
    whole = (0, parameter.numel())
    placement = Placement(name=name, shape=shape_of(parameter), held=(whole,) * world)
    segment = Segment(name=name, start=0, stop=parameter.numel(), offset=0)
    return Holding(key=name, tensor=parameter, segments=(segment,), placements=(placement,))


class _Copies(Distribution):
    """Parameters of which every rank has a copy."""

    strategy = "DDP"

    def __init__(self, process_group: dist.ProcessGroup, holdings: Sequence[Holding]) -> None:
        self.process_group, self.holdings = process_group, holdings

    def finite(self) -> None:
        """Nobody has looked at the gradients."""
        return
