"""Parameters that took no part in the pass, such as those of an expert that no token chose."""

from __future__ import annotations

import re
from dataclasses import replace

from lit_symopt.blocks import Block
from lit_symopt.infer.deciding import Deciding


def decide_siblings(deciding: Deciding) -> None:
    """Give a parameter that took no part the block of those that differ from it in one number of the name only.

    The numbers are positions in lists of modules. Siblings must have the same shape and agree with each other.
    """
    ran = {name: block for name, block in deciding.blocks.items() if deciding.facts.seen(name)}
    by_pattern: dict[str, list[Block]] = {}
    for name, block in ran.items():
        for pattern in _patterns(name):
            by_pattern.setdefault(pattern, []).append(block)
    for name, shape in deciding.shapes.items():
        if deciding.facts.seen(name):
            continue
        for pattern in reversed(_patterns(name)):  # the innermost list first
            same = [block for block in by_pattern.get(pattern, []) if deciding.shapes[block.name] == shape]
            meanings = {replace(block, name="") for block in same}
            if len(meanings) == 1:
                deciding.reasons.pop(name, None)
                deciding.blocks[name] = replace(same[0], name=name)
                break


def _patterns(name: str) -> list[str]:
    """The name with one of its numbers left open, for each number: the lists of modules that it is in.

    >>> _patterns("layers.0.experts.3.weight")
    ['layers.#.experts.3.weight', 'layers.0.experts.#.weight']
    """
    pieces = name.split(".")
    return [
        ".".join(["#" if i == position else piece for i, piece in enumerate(pieces)])
        for position, piece in enumerate(pieces)
        if re.fullmatch(r"\d+", piece)
    ]
