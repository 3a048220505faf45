"""Arguments of an operation by their names in its schema."""

from __future__ import annotations

from typing import Any

from lit_symopt.trace import Node


def named(node: Node, name: str, default: Any = None) -> Any:
    """An argument by its name in the operation's schema."""
    if name in node.kwargs:
        return node.kwargs[name]
    for position, argument in enumerate(node.call._schema.arguments):
        if argument.name == name:
            return node.args[position] if position < len(node.args) else default
    return default
