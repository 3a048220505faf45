"""Language models, one family a file. Each declares its blocks next to the class; transformers builds the layers.

`LitCausalLM` trains any causal language model of transformers, `LitMoECausalLM` any with a mixture of experts, with the
losses of its routers; `Qwen3`, `Gemma3`, `OLMoE` and `GptOss` add the architecture and its taxonomy.
Importing this package imports neither lightning nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_symopt.models.causal_lm import LitCausalLM
    from lit_symopt.models.gemma3 import Gemma3
    from lit_symopt.models.gpt_oss import GptOss
    from lit_symopt.models.moe import LitMoECausalLM
    from lit_symopt.models.olmoe import OLMoE
    from lit_symopt.models.qwen3 import Qwen3

__all__ = ["Gemma3", "GptOss", "LitCausalLM", "LitMoECausalLM", "OLMoE", "Qwen3"]

_HOME = {
    "Gemma3": "gemma3",
    "GptOss": "gpt_oss",
    "LitCausalLM": "causal_lm",
    "LitMoECausalLM": "moe",
    "OLMoE": "olmoe",
    "Qwen3": "qwen3",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
