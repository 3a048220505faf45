"""A batch of a LightningModule's training data, taken without anybody noticing.

Nothing is taken out of a loader: its dataset's first samples are put together by its own `collate_fn`, so that no
iterator, sampler or stateful loader moves; a dataset that can only be iterated is copied first. Random states (torch,
NumPy, Python) and the attributes of the module or data module that makes the loader are put back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import islice
from typing import TYPE_CHECKING, Any

from lit_symopt.errors import ConfigError

if TYPE_CHECKING:
    import lightning as L


def training_batch(module: L.LightningModule) -> Any:
    """The batch that the first samples of the training data make, on the module's device.

    Raises:
        ConfigError: if the module is not being fitted, or its training data cannot be looked at without disturbing
            them, with the way out.
    """
    from lightning.pytorch.utilities.seed import isolate_rng

    trainer: Any = getattr(module, "_trainer", None)
    source = getattr(getattr(trainer, "fit_loop", None), "_data_source", None)
    if source is None or source.instance is None or not source.is_defined():
        raise ConfigError(f"{type(module).__name__} has no training data to take an example batch from")
    with isolate_rng():
        if source.is_module():
            kept = {**source.instance.__dict__}
            try:
                loader = source.dataloader()
            finally:
                source.instance.__dict__.clear()
                source.instance.__dict__.update(kept)
        else:
            loader = source.dataloader()
        batch = _first(loader)
        return trainer.strategy.batch_to_device(batch, module.device, 0)


def _first(loader: Any) -> Any:
    """The first samples of a loader's dataset as a batch; of a collection of loaders, a collection of batches."""
    from lightning.pytorch.utilities.combined_loader import CombinedLoader
    from torch.utils.data import DataLoader

    if isinstance(loader, CombinedLoader):
        if loader._mode == "sequential":
            raise ConfigError("a CombinedLoader in mode 'sequential' has no batch that stands for all of its loaders")
        return _first(loader.iterables)
    if isinstance(loader, DataLoader):
        return _of_dataset(loader)
    if isinstance(loader, Mapping):
        return {key: _first(each) for key, each in loader.items()}
    if isinstance(loader, (list, tuple)):  # for Lightning, a collection of loaders
        return [_first(each) for each in loader]
    if isinstance(loader, Sequence) and loader:
        return loader[0]
    raise ConfigError(
        f"the training data are a {type(loader).__name__}, whose first batch cannot be taken without moving it"
    )


def _of_dataset(loader: Any) -> Any:
    from torch.utils.data import IterableDataset

    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if isinstance(loader.dataset, IterableDataset):
        try:
            samples = list(islice(iter(deepcopy(loader.dataset)), size or 1))
        except (TypeError, RuntimeError, AttributeError) as error:
            raise ConfigError(f"the dataset {type(loader.dataset).__name__} cannot be copied: {error}") from error
    else:
        samples = [loader.dataset[index] for index in range(min(size or 1, len(loader.dataset)))]
    if not samples:
        raise ConfigError(f"the dataset {type(loader.dataset).__name__} is empty")
    whole = loader.batch_size is None and loader.batch_sampler is None  # samples are batches
    return loader.collate_fn(samples[0] if whole else samples)
