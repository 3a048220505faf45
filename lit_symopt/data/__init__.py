"""Corpora and token shards as Lightning data modules.

- `StdlibCorpus`: the Python standard library's source, found on the machine
- `TextCorpus`: text, JSON lines or parquet of your own
- `TokenShards`: ready token shards

The modules behind them: `corpus` and `sources` (where text comes from), `tokenizer`, `shards` (the file format),
`cache` and `prepare` (text becomes shards, once), `windows` (training examples), `order` (which comes when, and
resume), `base` and `modules` (the data modules), `commands` (`lit-symopt data`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_symopt.data.modules import StdlibCorpus, TextCorpus, TokenShards

__all__ = ["StdlibCorpus", "TextCorpus", "TokenShards"]


def __getattr__(name: str) -> Any:
    """Import a data module when it is asked for: the shard format alone needs no Lightning."""
    if name in __all__:
        from lit_symopt.data import modules

        return getattr(modules, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
