"""Symmetry-compatible optimizers for PyTorch Lightning, with hardware profiling."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lit_symopt.blocks import Block, BlockTaxonomy, Role, Symmetry
from lit_symopt.config import RoleConfig, ScheduleConfig, SymOptConfig
from lit_symopt.errors import SymOptError
from lit_symopt.layout import Layout
from lit_symopt.linalg import polar
from lit_symopt.optim import SymOpt

if TYPE_CHECKING:
    from lit_symopt.mixin import SymOptMixin
    from lit_symopt.wiring import AttachOptimizer

__version__ = "0.1.0"

__all__ = [
    "AttachOptimizer",
    "Block",
    "BlockTaxonomy",
    "Layout",
    "Role",
    "RoleConfig",
    "ScheduleConfig",
    "SymOpt",
    "SymOptConfig",
    "SymOptError",
    "SymOptMixin",
    "Symmetry",
    "polar",
]


def __getattr__(name: str) -> Any:
    # These need lightning, which takes seconds to import: only those who use them pay.
    if name == "SymOptMixin":
        return import_module("lit_symopt.mixin").SymOptMixin
    if name == "AttachOptimizer":
        return import_module("lit_symopt.wiring").AttachOptimizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
