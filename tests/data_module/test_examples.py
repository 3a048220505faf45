from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = [
    "base",
    "cache",
    "commands",
    "corpus",
    "modules",
    "order",
    "prepare",
    "shards",
    "sources",
    "tokenizer",
    "windows",
]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_documentation_run(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"lit_symopt.data.{name}"))
    assert results.failed == 0
