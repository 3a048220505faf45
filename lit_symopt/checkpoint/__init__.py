"""Checkpoints that move: saved under any strategy and number of ranks, resumed under any other.

`consolidate` writes one ordinary file from what any strategy saved; `named_state` and `load_named` bring such a file
into whatever a strategy holds; `describe` says what a checkpoint is. Nothing here needs the strategy's package.
"""

from lit_symopt.checkpoint.consolidate import consolidate
from lit_symopt.checkpoint.describe import describe
from lit_symopt.checkpoint.folder import Folder
from lit_symopt.checkpoint.named import NamedState, keyed_by_name, load_named, named_state

__all__ = ["Folder", "NamedState", "consolidate", "describe", "keyed_by_name", "load_named", "named_state"]
