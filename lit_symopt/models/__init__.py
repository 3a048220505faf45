"""Language models, one family a file. Each declares its blocks next to the class; transformers builds the layers.

`LitCausalLM` trains any causal language model of transformers; `Qwen3` adds the architecture and its taxonomy.
Importing this package imports neither lightning nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_symopt.models.causal_lm import LitCausalLM
    from lit_symopt.models.qwen3 import Qwen3

__all__ = ["LitCausalLM", "Qwen3"]

_HOME = {"LitCausalLM": "causal_lm", "Qwen3": "qwen3"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
