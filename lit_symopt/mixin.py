"""`SymOptMixin`: the symmetric optimizer for anybody's LightningModule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn

from lit_symopt.blocks import BlockTaxonomy, known_taxonomy
from lit_symopt.config import SymOptConfig
from lit_symopt.errors import TaxonomyError
from lit_symopt.optim import SymOpt
from lit_symopt.schedule import build_scheduler
from lit_symopt.table import print_table


class SymOptMixin:
    """Gives a LightningModule `configure_optimizers` from a `SymOptConfig`. Put it before `LightningModule`.

    Set `symopt` on the class, or in `__init__` from an argument that YAML can set. Override `block_taxonomy` to say
    what the parameters are; the known architectures need not, and for others it is inferred from one pass.

    It also brings `lit_symopt.wiring.AttachOptimizer`, the callback that makes the optimizer follow the Trainer's
    strategy: DDP, DeepSpeed or FSDP2. An override of `configure_callbacks` adds to `super().configure_callbacks()`.

    Example:
        >>> import lightning as L
        >>> from lit_symopt import Block, BlockTaxonomy, Role, SymOptConfig, SymOptMixin
        >>> class Classifier(SymOptMixin, L.LightningModule):
        ...     symopt = SymOptConfig(lr=3e-3)
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Linear(8, 4)
        ...     def block_taxonomy(self):
        ...         return BlockTaxonomy([Block("*.weight", role=Role.LINEAR), Block("*.bias", role=Role.VECTOR)])
        >>> _ = Classifier().configure_optimizers()  # prints the block table
        parameter   shape  role    symmetry     rule      centered  lr
        --------------------------------------------------------------
        net.weight  4×8    linear  O(m) × O(n)  spectral  no        0.003
        net.bias    4      vector  S_m × 1      adamw     no        0.012
    """

    symopt: SymOptConfig = SymOptConfig()
    _table_printed: bool = False
    _inferred: tuple[tuple[str, ...], BlockTaxonomy] | None = None

    def block_taxonomy(self) -> BlockTaxonomy:
        """The blocks of this module: those of a known architecture inside it, else inferred from one pass.

        The pass is a training step on the first samples of the training data, which are not moved by it, nor is any
        random state (`lit_symopt.infer.example`); without training data, a call with `example_input_array`.

        Under FSDP2 the pass is run before the parameters are sharded; where they are made sharded, in
        `configure_model` under DeepSpeed's ZeRO 3 or on the meta device, there is none.

        Raises:
            TaxonomyError: if there is no known architecture and nothing to run a pass with, or the pass does not
                decide the place of every parameter; override this method then.
        """
        module = self._module()
        try:
            return known_taxonomy(module)
        except TaxonomyError as error:
            return self._infer(module, error)

    def _infer(self, module: nn.Module, undeclared: TaxonomyError) -> BlockTaxonomy:
        trainable = tuple(name for name, parameter in module.named_parameters() if parameter.requires_grad)
        if self._inferred is None or self._inferred[0] != trainable:
            from lit_symopt.infer.lightning import infer_lightning

            _refuse_to_infer(module, undeclared)
            self._inferred = trainable, infer_lightning(module, undeclared)
        return self._inferred[1]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """One `SymOpt` over every trainable parameter, and its schedule, stepped with every optimizer step."""
        module, taxonomy = self._module(), self.block_taxonomy()
        optimizer = SymOpt.for_module(module, taxonomy, config=self.symopt)
        if not self._table_printed:
            self._table_printed = True
            if self._inferred is not None:
                rank_zero_only(print)(f"The blocks are {taxonomy.name}, from one pass:")
            rank_zero_only(print_table)(optimizer, taxonomy.frozen(module))
        scheduler = build_scheduler(optimizer, self.symopt.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1}}

    def configure_callbacks(self) -> Sequence[Callback]:
        """The callback that attaches the optimizer to the strategy, unless the Trainer has one."""
        from lit_symopt.wiring import AttachOptimizer

        inherited: Any = getattr(super(), "configure_callbacks", list)()
        callbacks = [inherited] if isinstance(inherited, Callback) else list(inherited)
        trainer: Any = getattr(self, "_trainer", None)
        known = [] if trainer is None else trainer.callbacks
        if not any(isinstance(callback, AttachOptimizer) for callback in [*callbacks, *known]):
            callbacks.append(AttachOptimizer())
        return callbacks

    def _module(self) -> nn.Module:
        if not isinstance(self, nn.Module):
            raise TypeError(f"{type(self).__name__} must derive from SymOptMixin and LightningModule, in this order")
        return self


def _refuse_to_infer(module: nn.Module, undeclared: TaxonomyError) -> None:
    """No pass can be followed through parameters that are elsewhere."""
    for name, parameter in module.named_parameters():
        sharded = hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_shape")
        if sharded or parameter.is_meta:
            raise TaxonomyError(
                f"{undeclared} The blocks cannot be inferred either: {name!r} is "
                f"{'sharded' if sharded else 'on the meta device'} already. A block_taxonomy() of your own may be "
                f"BlockTaxonomy.infer(a small instance of the same architecture, a batch)."
            )
