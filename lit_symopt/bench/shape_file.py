"""A list of shapes in a file, YAML or JSON: a sequence under the key `shapes`, whose entries have these keys.

    name    of the parameter; `{}` in it counts from 0
    shape   its dimensions
    role    one of `lit_symopt.blocks.Role`
    layout  as the block table and `Layout` print it: `experts(gate_up('stacked'))`; default: that of the role
    count   how many there are of it; default 1

Example:
    shapes:
      - {name: embedding.weight, shape: [8192, 256], role: embedding}
      - {name: "layers.{}.q.weight", shape: [256, 256], role: query, layout: "heads(4, dim='rows')", count: 12}
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_symopt.bench.shapes import ShapeList
from lit_symopt.blocks import Block, Role
from lit_symopt.errors import ConfigError, SymOptError
from lit_symopt.layout import Layout

if TYPE_CHECKING:
    from yaml.nodes import Node

KEYS = ("name", "shape", "role", "layout", "count")
LAYOUTS = (
    "matrix",
    "transposed",
    "column",
    "row",
    "heads",
    "gate_up",
    "qkv",
    "split",
    "flatten",
    "experts",
)


def read_shapes(path: Path) -> ShapeList:
    """The shapes in a file.

    Raises:
        ConfigError: if it does not parse, or an entry is none, naming the file and the line.
    """
    blocks: dict[str, Block] = {}
    for line, entry in _entries(path):
        try:
            for block in _blocks(entry):
                if block.name in blocks:
                    raise ConfigError(f"there are two parameters {block.name!r}; give count and a {{}} in the name")
                blocks[block.name] = block
        except SymOptError as error:
            raise ConfigError(f"{path}, line {line}: {error}") from error
    return ShapeList(name=path.stem, blocks=tuple(blocks.values()))


def parse_layout(text: str) -> Layout:
    """A layout from what its `str` says.

    Raises:
        ConfigError: for what is no layout.

    Example:
        >>> print(parse_layout("experts(gate_up('stacked'))"))
        experts(gate_up('stacked'))
    """
    try:
        layout = _layout(ast.parse(text.strip(), mode="eval").body)
        if not isinstance(layout, Layout):
            raise TypeError(f"it is a {type(layout).__name__}")
        found: Layout = layout
        return found
    except (SyntaxError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, SymOptError):
            raise
        raise ConfigError(
            f"layout {text!r} is none ({error}); write one as Layout prints it, such as \"heads(4, dim='rows')\"; "
            f"known: {', '.join(LAYOUTS)}"
        ) from error


def _layout(node: ast.expr) -> Any:
    """A call of a constructor of `Layout`, with such calls or plain values as arguments."""
    if isinstance(node, ast.Name) and node.id in LAYOUTS:
        return getattr(Layout, node.id)()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id not in LAYOUTS:
            raise ValueError(f"there is no {node.func.id}")
        options = {keyword.arg: _layout(keyword.value) for keyword in node.keywords if keyword.arg}
        return getattr(Layout, node.func.id)(*map(_layout, node.args), **options)
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(map(_layout, node.elts))
    return ast.literal_eval(node)


def _entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The entries with the lines on which they begin."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            json.loads(text)  # for its own complaint; what passes is YAML too, but for tabs
            text = text.expandtabs()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: this is no JSON: {error.msg}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}, line {line}: this is no YAML: {error.problem or error.context}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}, line 1: this cannot be read: {error}") from error
    found = _sequence(root)
    if not found:
        line = root.start_mark.line + 1 if root is not None else 1
        raise ConfigError(
            f"{path}, line {line}: a list of shapes is a sequence under the key `shapes`, of entries such as "
            "{name: embedding.weight, shape: [8192, 256], role: embedding}"
        )
    loader = yaml.SafeLoader("")
    try:
        for node in found:
            yield node.start_mark.line + 1, loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _sequence(root: Node | None) -> list[Node]:
    from yaml.nodes import MappingNode, SequenceNode

    if not isinstance(root, MappingNode):
        return []
    for key, value in root.value:
        if key.value == "shapes" and isinstance(value, SequenceNode):
            return list(value.value)
    return []


def _blocks(entry: Any) -> Iterator[Block]:
    if not isinstance(entry, dict):
        raise ConfigError(f"{entry!r} is no entry; it needs name, shape and role")
    unknown, missing = sorted(set(map(str, entry)) - set(KEYS)), [key for key in KEYS[:3] if key not in entry]
    if unknown or missing:
        what = f"unknown key {unknown[0]!r}" if unknown else f"no {missing[0]}"
        raise ConfigError(f"{what}; an entry has {', '.join(KEYS[:3])}, and may have {' and '.join(KEYS[3:])}")
    name, shape, count = str(entry["name"]), entry["shape"], entry.get("count", 1)
    if not isinstance(shape, list) or not shape or not all(type(size) is int and size > 0 for size in shape):
        raise ConfigError(f"shape {shape!r} of {name!r} must be a list of positive whole numbers")
    if type(count) is not int or count < 1:
        raise ConfigError(f"count {count!r} of {name!r} must be a positive whole number")
    if str(entry["role"]) not in list(map(str, Role)):
        raise ConfigError(f"role {entry['role']!r} of {name!r} is unknown; known: {', '.join(map(str, Role))}")
    layout = None if entry.get("layout") is None else parse_layout(str(entry["layout"]))
    for index in range(count):
        own = name.replace("{}", str(index))
        block = Block(own, role=Role(str(entry["role"])), layout=layout, shape=tuple(shape))
        assert block.layout is not None
        block.layout.parts(tuple(shape))  # raises where it does not fit
        yield block
