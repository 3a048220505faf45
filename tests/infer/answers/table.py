"""Every hand-written answer, by the name of its instance in `tests/infer/modules.py`."""

from __future__ import annotations

from typing import Any

from lit_symopt.blocks import BlockTaxonomy
from tests.infer.answers import encoders, fused, gpt2, llama, mixtures, others, plain, state_space

ANSWERS: dict[str, BlockTaxonomy] = {
    name: BlockTaxonomy(blocks, name=f"the answer for {name}")
    for file in (llama, mixtures, gpt2, fused, state_space, encoders, others, plain)
    for name, blocks in file.ANSWERS.items()
}


def answer(name: str, module: Any) -> BlockTaxonomy:
    """The answer for an instance: written here, or declared by the module."""
    declared: BlockTaxonomy = ANSWERS[name] if name in ANSWERS else module.block_taxonomy()
    return declared
