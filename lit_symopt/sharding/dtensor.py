"""FSDP2 (`torch.distributed.fsdp.fully_shard`): parameters that are `DTensor`s.

A block sharded along a dimension d is cut as `torch.chunk` cuts: W ranks hold ⌈n/W⌉ of its n slices each, the last of
them fewer or none. With d moved to the front every rank holds one stretch of the flattened block. Under HSDP, a mesh
(replicate, shard), ranks of one column hold copies.

Every trainable parameter must be a DTensor: FSDP2 does not average the gradients of others (`ignored_params`, or
modules outside every `fully_shard`), so that the ranks' copies of them would drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from lit_symopt.errors import ConfigError
from lit_symopt.sharding.holdings import Distribution, Holding, Placement, Segment
from lit_symopt.sharding.replicated import replicated_holding

if TYPE_CHECKING:
    from lit_symopt.optim import SymOpt

# Names that mesh dimensions have where parts of one model, not samples of one batch, are distributed over them.
MODEL_PARALLEL = {
    "tp": "tensor",
    "tensor_parallel": "tensor",
    "sp": "sequence",
    "cp": "context",
    "context_parallel": "context",
    "ep": "expert",
    "expert_parallel": "expert",
    "pp": "pipeline",
    "pipeline_parallel": "pipeline",
}
_WAY_OUT = (
    "Only data parallelism is supported: fully_shard over a one-dimensional mesh, or over a mesh (replicate, shard); "
    "with Lightning ModelParallelStrategy(data_parallel_size=<all ranks>, tensor_parallel_size=1)."
)


def sharded(optimizer: SymOpt) -> Distribution:
    """The distribution of an optimizer over DTensors: one holding a parameter, found by its name.

    Raises:
        ConfigError: for tensor and other model parallelism, several meshes, and parameters that are not sharded among
            others that are, each by name.
    """
    named = [
        (name, parameter)
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    ]
    name, mesh = next((name, tensor.device_mesh) for name, tensor in named if isinstance(tensor, DTensor))
    _refuse_model_parallel(name, mesh)
    group = _group(mesh)
    others = [other for other, tensor in named if isinstance(tensor, DTensor) and tensor.device_mesh != mesh]
    if others:
        raise ConfigError(
            f"{name!r} and {others[0]!r} are distributed over different device meshes, as under expert or pipeline "
            f"parallelism. {_WAY_OUT}"
        )
    holdings = [_holding(name, tensor, mesh=mesh, group=group) for name, tensor in named]
    return _Shards(_called(mesh), group, holdings)


def _refuse_model_parallel(name: str, mesh: DeviceMesh) -> None:
    for dimension, size in zip(mesh.mesh_dim_names or (), mesh.shape, strict=False):
        if size > 1 and dimension.lower() in MODEL_PARALLEL:
            kind = MODEL_PARALLEL[dimension.lower()]
            raise ConfigError(
                f"{name!r} is distributed over a device mesh {_shape(mesh)}, whose dimension {dimension!r} is "
                f"{kind} parallelism, which is not supported. {_WAY_OUT}"
            )


def _holding(name: str, tensor: Tensor, *, mesh: DeviceMesh, group: dist.ProcessGroup) -> Holding:
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if not isinstance(tensor, DTensor):
        if world == 1:
            return replicated_holding(name, tensor, world=1)
        raise ConfigError(
            f"{name!r} is a plain tensor among sharded parameters: FSDP2 does not average its gradient over the ranks, "
            f"which would drift apart. Apply fully_shard to the module that holds it (the root last, without "
            f"ignored_params), or freeze it."
        )
    dim, axis = _sharded_dimension(name, tensor)
    shape = tuple(tensor.shape)
    slices, each = (shape[dim], prod(shape) // max(shape[dim], 1)) if shape else (1, 1)
    parts = 1 if axis is None else mesh.shape[axis]
    size = -(-slices // parts)
    held = []
    for other in range(world):
        part = 0 if axis is None else _coordinate(mesh, dist.get_global_rank(group, other))[axis]
        first, last = (min(edge * size, slices) for edge in (part, part + 1))
        held.append((first * each, last * each))
    start, stop = held[rank]
    if tensor.to_local().numel() != stop - start:
        raise ConfigError(
            f"{name!r} {shape} is distributed by {tensor.placements} over a device mesh {_shape(mesh)}, and this rank "
            f"holds {tensor.to_local().numel()} elements of it, not the {stop - start} that torch.chunk would give it; "
            f"use fully_shard or distribute_tensor"
        )
    segments = (Segment(name=name, start=start, stop=stop, offset=0),) if start < stop else ()
    placement = Placement(name=name, shape=shape, held=tuple(held), dim=dim)
    return Holding(key=name, tensor=tensor, segments=segments, placements=(placement,))


def _sharded_dimension(name: str, tensor: DTensor) -> tuple[int, int | None]:
    """The dimension that is sharded, and the mesh's over which it is; 0 and `None` for copies."""
    # Over a mesh dimension of one rank every placement is the same.
    placements = [
        (axis, placement) for axis, placement in enumerate(tensor.placements) if tensor.device_mesh.shape[axis] > 1
    ]
    unknown = [placement for _, placement in placements if type(placement) not in (Shard, Replicate)]
    shards = [(placement.dim, axis) for axis, placement in placements if isinstance(placement, Shard)]
    if unknown or len(shards) > 1:
        raise ConfigError(
            f"{name!r} is distributed by {tensor.placements} over a device mesh {_shape(tensor.device_mesh)}, as under "
            f"tensor parallelism, which is not supported. {_WAY_OUT}"
        )
    if not shards:
        return 0, None
    dim, axis = shards[0]
    return dim % tensor.ndim, axis


def _group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """All ranks of the mesh."""
    long = [axis for axis, size in enumerate(mesh.shape) if size > 1]
    if len(long) < 2:
        return mesh.get_group(long[0] if long else 0)
    ranks = sorted(mesh.mesh.flatten().tolist())
    world = dist.group.WORLD
    assert world is not None  # a mesh exists
    if ranks == list(range(dist.get_world_size())):
        return world
    group = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)  # this rank is one of them
    return group


def _coordinate(mesh: DeviceMesh, global_rank: int) -> list[int]:
    (found,) = (mesh.mesh == global_rank).nonzero().tolist()
    return [int(index) for index in found]


def _shape(mesh: DeviceMesh) -> str:
    names = mesh.mesh_dim_names or [f"dim {axis}" for axis in range(mesh.ndim)]
    return "(" + ", ".join(f"{name}={size}" for name, size in zip(names, mesh.shape, strict=True)) + ")"


def _called(mesh: DeviceMesh) -> str:
    long = [size for size in mesh.shape if size > 1]
    return "FSDP2" if len(long) < 2 else f"FSDP2 (HSDP {'×'.join(map(str, long))})"


class _Shards(Distribution):
    """Parameters that are DTensors."""

    def __init__(self, strategy: str, process_group: dist.ProcessGroup, holdings: Sequence[Holding]) -> None:
        self.strategy, self.process_group, self.holdings = strategy, process_group, holdings

    def finite(self) -> None:
        """FSDP2 does not look at gradients."""
        return
