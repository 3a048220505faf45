"""Initial weights of a module that no process holds whole: made on rank 0, handed out one tensor at a time.

Under DeepSpeed's `zero.Init`, and for a module sharded by `fully_shard` on the meta device, what a module's own
initialization writes is lost or differs from what the same seed gives elsewhere. `fill_from_rank_zero` gives any such
module the weights of one that rank 0 has built as usual: bit for bit those of one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_symopt.blocks import shape_of
from lit_symopt.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def fill_from_rank_zero(
    module: nn.Module, build: Callable[[], nn.Module], *, process_group: dist.ProcessGroup | None = None
) -> None:
    """Copy every parameter and buffer, non-persistent ones too, from a whole module that only rank 0 builds.

    A collective call. Rank 0 needs host memory for the whole module, every rank that of the largest tensor besides its
    own part. The random state of rank 0 is left as it was; `build` sets the one that it wants.

    Args:
        module: with storage for its own part: plain, partitioned by `zero.Init`, or of `DTensor`s (FSDP2).
        build: makes the same module as in one process, on the CPU. Called on rank 0, and outside `zero.Init`.
        process_group: the ranks that hold the module; default: all. Without torch.distributed there is one.

    Raises:
        ConfigError: on every rank, if a tensor is on the meta device or the two modules are not the same; on the other
            ranks, if rank 0 could not build its own.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> module, whole = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> fill_from_rank_zero(module, lambda: whole)
        >>> torch.equal(module.weight, whole.weight)
        True
    """
    group = process_group or (dist.group.WORLD if dist.is_available() and dist.is_initialized() else None)
    targets = _tensors(module)
    for name, target in targets.items():
        if target.is_meta:
            raise ConfigError(f"{name!r} is on the meta device and has no storage to fill; use module.to_empty() first")
    source: dict[str, Tensor] | None = None
    trouble, error = "", None
    if group is None or dist.get_rank(group) == 0:
        try:
            with outside_zero_init(), torch.random.fork_rng(devices=[]):
                whole = build()
            source = {**dict(whole.named_parameters(remove_duplicate=False)), **dict(whole.named_buffers())}
            trouble = _mismatch(targets, source, {*dict(module.named_parameters(remove_duplicate=False)), *targets})
        except Exception as raised:  # noqa: BLE001  the other ranks wait, and must hear of it before it is raised here
            trouble, error = f"rank 0 could not build it ({type(raised).__name__}: {raised})", raised
    if group is not None:
        said = [trouble]
        dist.broadcast_object_list(said, group=group, group_src=0)
        trouble = said[0]
    if error is not None:
        raise error
    if trouble:
        raise ConfigError(f"{type(module).__name__} cannot be filled: {trouble}")
    with torch.no_grad(), outside_zero_init():  # inside, torch.empty has a dtype of its own
        for name, target in targets.items():
            _fill(target, None if source is None else source.pop(name).detach(), group)


def give_storage(module: nn.Module) -> None:
    """Put uninitialized tensors in the place of those on the meta device: sharded where the module or `zero.Init` is.

    Modules stay the objects they are, and tied parameters tied. DTensors get storage on the device of their mesh,
    everything else on torch's default device; inside `zero.Init` parameters are partitioned as DeepSpeed does it.
    """
    if any(hasattr(parameter, "device_mesh") for parameter in module.parameters()):
        tied = _names(module)
        # What to_empty does; fully_shard's modules take up their new shards in it.
        module._apply(_empty_shard)
        for first, *others in tied:
            for other in others:
                _set(module, other, module.get_parameter(first))
    else:
        context = active_zero_init()
        made: dict[int, nn.Parameter] = {}
        for child in module.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None and (parameter.is_meta or id(parameter) in made):
                    if id(parameter) not in made:
                        dtype = None if context is None or not parameter.is_floating_point() else context.dtype
                        empty = torch.empty_like(parameter, device=torch.get_default_device(), dtype=dtype)
                        made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                    child._parameters[name] = made[id(parameter)]
            if context is not None:
                context._post_init_method(child)  # what it does with a module that is built inside it
    _give_buffers_storage(module)


def adopt(module: nn.Module, source: nn.Module) -> None:
    """Put the tensors of the same module, built whole, in the place of those on the meta device."""
    parameters: dict[str, nn.Parameter] = dict(source.named_parameters(remove_duplicate=False))
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if parameter.is_meta:
            parameters[name].requires_grad_(parameter.requires_grad)
            _set(module, name, parameters[name])
    _give_buffers_storage(module)
    buffers = dict(source.named_buffers())
    for name, buffer in module.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])


def active_zero_init() -> Any:
    """The `deepspeed.zero.Init` that modules are being built in, or `None`; deepspeed is not imported for it."""
    return getattr(sys.modules.get("deepspeed.runtime.zero.partition_parameters"), "top_level_context", None)


@contextmanager
def outside_zero_init() -> Iterator[None]:
    """Modules are built whole inside this, whatever `zero.Init` is around it."""
    if active_zero_init() is None:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _names(module: nn.Module) -> list[list[str]]:
    """The names of every parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _mismatch(targets: dict[str, Tensor], source: dict[str, Tensor], known: set[str]) -> str:
    missing, more = sorted(set(targets) - set(source)), sorted(set(source) - known)
    if missing or more:
        return f"the whole module on rank 0 lacks {missing[:4]}, and has {more[:4]} that are not here"
    for name, target in targets.items():
        if shape_of(target) != tuple(source[name].shape):
            return (
                f"{name!r} has shape {shape_of(target)}, and {tuple(source[name].shape)} in the whole module on rank 0"
            )
    return ""


def _fill(target: Tensor, value: Tensor | None, group: dist.ProcessGroup | None) -> None:
    """One tensor; the value is there on rank 0."""
    if hasattr(target, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([target], modifier_rank=0):  # which sends what rank 0 has written
            if value is not None:
                target.data.copy_(value)
    elif group is None:
        assert value is not None  # this is rank 0
        target.copy_(value)
    elif hasattr(target, "device_mesh"):
        _fill_shard(target, _sent(target, value, group))  # type: ignore[arg-type]
    else:
        target.copy_(_sent(target, value, group))


def _sent(target: Tensor, value: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    """The whole tensor, on the device that the process group works with."""
    from lit_symopt.sharding.transport import Transport

    device = Transport(group).device
    if value is None:
        whole = torch.empty(shape_of(target), dtype=target.dtype, device=device)
    else:
        whole = value.to(device=device, dtype=target.dtype).contiguous()
    dist.broadcast(whole, group=group, group_src=0)
    return whole


def _fill_shard(target: DTensor, whole: Tensor) -> None:
    from torch.distributed.tensor import distribute_tensor

    # Without a source rank every rank cuts its own shard, and nothing is sent.
    shard = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    target.to_local().copy_(shard.to_local())


def _empty_shard(tensor: Tensor) -> Tensor:
    if not tensor.is_meta or not hasattr(tensor, "device_mesh"):
        return tensor
    return torch.empty_like(tensor, device=tensor.device_mesh.device_type)


def _give_buffers_storage(module: nn.Module) -> None:
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.is_meta:
                child._buffers[name] = torch.empty_like(buffer, device=torch.get_default_device())


def _set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    module.get_submodule(path)._parameters[last] = parameter
