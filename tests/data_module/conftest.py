"""What the data tests share: a cache of their own, and small shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lit_symopt.data.shards import write_shard


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, empty."""
    folder = tmp_path / "cache_home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def make_shard(tmp_path: Path) -> Callable[..., Path]:
    """Write random tokens as a shard."""

    def make(name: str = "train.bin", *, tokens: int = 1000, vocab_size: int = 100) -> Path:
        write_shard(tmp_path / name, np.random.default_rng(0).integers(vocab_size, size=tokens), vocab_size=vocab_size)
        return tmp_path / name

    return make
