"""Inference for a LightningModule that is being fitted, or that brings an example of what its forward takes."""

from __future__ import annotations

from typing import Any

from torch import nn

from lit_symopt.blocks import BlockTaxonomy
from lit_symopt.errors import ConfigError, TaxonomyError
from lit_symopt.infer.example import training_batch
from lit_symopt.infer.run import infer


def infer_lightning(module: Any, undeclared: TaxonomyError) -> BlockTaxonomy:
    """The inferred taxonomy: of a training step if there are training data, else of forward on `example_input_array`.

    A training step comes first because it shows the loss, and with it which map is the head.

    Args:
        module: the LightningModule.
        undeclared: why it has no declared taxonomy, for the error if nothing can be run.

    Raises:
        TaxonomyError: if there is neither, or what `infer` raises.
    """
    try:
        batch = training_batch(module)
    except ConfigError as error:
        example = getattr(module, "example_input_array", None)
        if example is None:
            raise TaxonomyError(
                f"{undeclared} The blocks could also be inferred from one pass, but {error}: set example_input_array "
                "(what forward takes), or fit with a DataLoader."
            ) from error
        return infer(module, example, loss=_forward)
    return infer(module, batch)


def _forward(module: nn.Module, example: Any) -> Any:
    """`forward` with an example as Lightning takes it: one argument, a tuple of them, or a mapping."""
    if isinstance(example, dict):
        return module(**example)
    return module(*example) if isinstance(example, tuple) else module(example)
