"""A fixed probe set of held-out batches, and how to run a module on it without leaving a trace."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lit_symopt.callbacks.random_state import capture, restore
from lit_symopt.errors import ConfigError
from lit_symopt.metrics.passes import tensors_in
from lit_symopt.objective import Objective

_PROBING: ContextVar[bool] = ContextVar("probing", default=False)


def is_probing() -> bool:
    """Whether a probe set is being run: what watches training batches does not count such a pass."""
    return _PROBING.get()


def take_probe(trainer: L.Trainer, *, batches: int) -> list[Any]:
    """The first batches of the (first) validation loader on the device; empty if there is none.

    The global random generators, from which a loader that starts draws a seed, are as before.
    """
    kept = capture()
    try:
        if trainer.val_dataloaders is None and trainer.enable_validation:
            # The first validation may be some epochs away; this is how the Trainer itself prepares its loaders.
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            trainer.training = True
        loader: Any = trainer.val_dataloaders
        while isinstance(loader, (Mapping, list, tuple)):
            loader = next(iter(loader.values() if isinstance(loader, Mapping) else loader), None)
        found = [] if loader is None else list(islice(iter(loader), batches))
    finally:
        restore(kept)
    moved = (trainer.precision_plugin.convert_input(batch) for batch in found)
    return [trainer.strategy.batch_to_device(batch, dataloader_idx=0) for batch in moved]


def fingerprint(batches: Sequence[Any]) -> str:
    """A hash of the tensors of the batches: their values, dtypes and shapes."""
    digest = blake2b(digest_size=16)
    for tensor in tensors_in(batches):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def run_probe(trainer: L.Trainer, pl_module: L.LightningModule, batches: Sequence[Any]) -> None:
    """Runs the module's `forward` on the batches in eval mode, without gradients, in the Trainer's precision.

    The arguments of `forward` are taken from the batch: by name from a mapping, in order from a tuple or list, else
    the batch itself. A module whose `forward` cannot be called so runs its training step as `Objective` does, which
    leaves no trace; not with manual optimization, where the training step is what changes the weights.

    Raises:
        ConfigError: if there is no way to run it.
    """
    with _unnoticed(pl_module), torch.no_grad(), trainer.precision_plugin.forward_context():
        for batch in batches:
            call = _arguments(pl_module, batch)
            if call is not None:
                pl_module(*call[0], **call[1])
            elif pl_module.automatic_optimization:
                Objective(pl_module, batch).run()
            else:
                raise ConfigError(
                    f"RouterStability cannot run {type(pl_module).__name__} on a validation batch "
                    f"({type(batch).__name__}): give it a forward whose arguments are in the batch"
                )


@contextmanager
def _unnoticed(module: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards the mode of every module and the random state are as before."""
    kept, modes = capture(), [(child, child.training) for child in module.modules()]
    module.eval()
    token = _PROBING.set(True)
    try:
        yield
    finally:
        _PROBING.reset(token)
        for child, training in modes:
            child.training = training
        restore(kept)


def _arguments(pl_module: L.LightningModule, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """How to call `forward` with what is in a batch, or None."""
    if type(pl_module).forward is L.LightningModule.forward:
        return None
    parameters = inspect.signature(pl_module.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p.name for p in named if p.default is p.empty]
    if isinstance(batch, Mapping):
        if needed and all(name in batch for name in needed):
            return (), {p.name: batch[p.name] for p in named if p.name in batch and p.name != "labels"}
    elif isinstance(batch, (tuple, list)):
        if needed != ["batch"]:
            return (tuple(batch[: len(needed)]), {}) if 0 < len(needed) <= len(batch) else None
    elif isinstance(batch, Tensor) and len(needed) <= 1:
        return (batch,), {}
    return ((batch,), {}) if len(needed) == 1 else None
