"""FSDP2 for transformers' decoders: every layer is sharded by itself, what is left with the root."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_symopt.errors import ConfigError

if TYPE_CHECKING:
    import lightning as L
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


def data_parallel_mesh(module: L.LightningModule) -> DeviceMesh | None:
    """The mesh over which a module that is being fitted is to be sharded; `None` unless by `ModelParallelStrategy`.

    Raises:
        ConfigError: for tensor parallelism.
    """
    from lightning.pytorch.strategies import ModelParallelStrategy

    trainer: Any = getattr(module, "_trainer", None)
    if trainer is None or not isinstance(trainer.strategy, ModelParallelStrategy):
        return None
    mesh = trainer.strategy.device_mesh
    size = mesh["tensor_parallel"].size()
    if size > 1:
        raise ConfigError(
            f"tensor_parallel_size={size} is not supported, and is what ModelParallelStrategy does by default on "
            f"{mesh.size()} devices; give it data_parallel_size={mesh.size()} and tensor_parallel_size=1"
        )
    return mesh["data_parallel"]


def shard_decoder(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """`fully_shard` every decoder layer, then the model; nothing if it is sharded already.

    Parameters keep their dtype; what is computed in a lower one is for the Trainer's precision plugin to say.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(model, FSDPModule):
        return
    layers = set(model._no_split_modules or ())  # transformers' names of the classes that stay together on a device
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
