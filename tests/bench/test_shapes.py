"""Lists of shapes: those of models, without a model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lit_symopt.bench.shape_file import parse_layout, read_shapes
from lit_symopt.bench.shapes import ShapeList, known_lists, shape_list
from lit_symopt.bench.tensors import matrix_shapes
from lit_symopt.blocks import Role
from lit_symopt.errors import ConfigError
from lit_symopt.layout import Layout
from tests.cli.test_recipes import CONFIGS, build, parse


def by_role(shapes: ShapeList) -> dict[str, set[tuple[int, ...] | None]]:
    found: dict[str, set[tuple[int, ...] | None]] = {}
    for block in shapes.blocks:
        found.setdefault(str(block.role), set()).add(block.shape)
    return found


def test_the_scaled_lists_are_those_of_the_question() -> None:
    qwen3, olmoe = shape_list("qwen3_scaled"), shape_list("olmoe_scaled")
    assert (qwen3.layers, olmoe.layers) == (20, 12)
    assert by_role(qwen3)["query"] == {(256, 256)}
    assert by_role(olmoe)["expert_gate_up"] == {(32, 2 * 128, 256)}
    assert by_role(olmoe)["expert_down"] == {(32, 256, 128)}
    assert sum(block.role is Role.EXPERT_DOWN for block in olmoe.blocks) == 12
    assert matrix_shapes(olmoe) == [(256, 256), (128, 256), (256, 128)]


@pytest.mark.parametrize("name", ["qwen3_tiny", "gemma3_tiny", "olmoe_tiny", "gpt_oss_tiny", "olmoe_1b_7b"])
def test_the_list_of_a_recipe_is_the_parameters_of_its_model(name: str) -> None:
    model = build(parse(CONFIGS / f"{name}.yaml"))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shapes = shape_list(name)
    assert {block.name: block.shape for block in shapes.blocks} == expected
    assert shapes.elements == sum(parameter.numel() for parameter in model.parameters())
    assert name in known_lists()


def test_fewer_layers_are_a_part_of_all() -> None:
    some, whole = shape_list("gpt_oss", layers=2), shape_list("gpt_oss_small")
    assert {block.name for block in some.blocks} < {block.name for block in whole.blocks}
    assert (some.layers, whole.layers) == (2, 12)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"--shapes qwen4: no list.*qwen3_scaled.*qwen3_0p6b.*file"):
        shape_list("qwen4")
    with pytest.raises(ConfigError, match="at least one layer"):
        shape_list("qwen3_scaled", layers=0)


# -- files ---------------------------------------------------------------------------------------------------------

ENTRIES: list[dict[str, Any]] = [
    {"name": "embedding.weight", "shape": [64, 8], "role": "embedding"},
    {"name": "layers.{}.q", "shape": [8, 8], "role": "query", "layout": "heads(2, dim='rows')", "count": 3},
    {"name": "experts", "shape": [4, 12, 8], "role": "expert_gate_up", "layout": "experts(gate_up('stacked'))"},
    {"name": "norm", "shape": [8], "role": "vector"},
]


@pytest.mark.parametrize("indent", [None, 2, "\t"], ids=["one line", "spaces", "tabs"])
def test_json_and_yaml_say_the_same(tmp_path: Path, indent: Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"shapes": ENTRIES}, indent=indent))
    lines = ["shapes:", *(f"  - {json.dumps(entry)}" for entry in ENTRIES)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    found = read_shapes(tmp_path / "a.json")
    assert found == read_shapes(tmp_path / "a.yaml") == shape_list(str(tmp_path / "a.yaml"))
    assert [block.name for block in found.blocks][1:4] == ["layers.0.q", "layers.1.q", "layers.2.q"]
    assert found.blocks[1].layout == Layout.heads(2, dim="rows")
    assert found.blocks[4].layout == Layout.experts(Layout.gate_up("stacked"))
    assert found.elements == 64 * 8 + 3 * 64 + 4 * 12 * 8 + 8


@pytest.mark.parametrize(
    ("name", "text", "line", "why"),
    [
        ("a.yaml", "shapes:\n  - {name: a, shape: [2, 2\n", 3, "no YAML"),
        ("a.yaml", "shapes:\n\t- a", 2, "no YAML"),
        ("a.json", '{"shapes": [\n{"name": "a",\n}]}', 3, "no JSON"),
        ("a.yaml", "", 1, "sequence under the key `shapes`"),
        ("a.yaml", "- {name: a}", 1, "sequence under the key `shapes`"),
        ("a.yaml", "shapes: []", 1, "sequence under the key `shapes`"),
        ("a.yaml", "shapes:\n  - {name: a, shape: [2, 2]}", 2, "no role"),
        ("a.yaml", "shapes:\n  - 3", 2, "3 is no entry"),
        ("a.yaml", "shapes:\n  - {name: a, shape: [2, 2], role: query, rule: muon}", 2, "unknown key 'rule'"),
        ("a.yaml", "shapes:\n  - name: a\n    shape: [2, 0]\n    role: query", 2, r"shape \[2, 0\] of 'a'"),
        ("a.yaml", "shapes:\n  - {name: a, shape: 3, role: query}", 2, "shape 3 of 'a'"),
        ("a.yaml", "shapes:\n  - {name: a, shape: [2, 2], role: attention}", 2, "role 'attention' of 'a' is unknown"),
        ("a.yaml", "shapes:\n  - {name: a, shape: [2, 2, 2], role: query}", 2, "does not fit"),
        ("a.yaml", "shapes:\n  - {name: a, shape: [2, 2], role: query, count: 0}", 2, "count 0"),
        ("a.yaml", "shapes:\n\n  - {name: a, shape: [2, 2], role: query, count: 2}", 3, "two parameters 'a'"),
        (
            "a.yaml",
            "shapes:\n  - {name: a, shape: [2, 2], role: query, layout: heads(}",
            2,
            "layout 'heads\\(' is none",
        ),
        ("a.yaml", "shapes:\n  - {name: a, shape: [2, 2], role: query, layout: print(1)}", 2, "there is no print"),
        ("a.yaml", "shapes:\n  - {name: a, shape: [2, 2], role: query, layout: '3'}", 2, "it is a int"),
    ],
)
def test_a_file_that_does_not_parse_is_refused_with_its_line(
    tmp_path: Path, name: str, text: str, line: int, why: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))}, line {line}: .*{why}"):
        read_shapes(path)


def test_a_file_has_no_layers_and_must_be_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="line 1: this cannot be read"):
        shape_list(str(path))
    with pytest.raises(ConfigError, match="has no layers to be fewer of"):
        shape_list(str(path), layers=2)


@pytest.mark.parametrize(
    "layout",
    [
        Layout.matrix(stored="in_out"),
        Layout.transposed(),
        Layout.column(),
        Layout.row(),
        Layout.heads(3, dim="columns"),
        Layout.gate_up("interleaved", pairs=True, stored="in_out"),
        Layout.qkv(4, 2, 8, order="per_group"),
        Layout.split([3, 5], inner=[Layout.matrix(), Layout.heads(5)]),
        Layout.flatten(),
        Layout.experts(Layout.gate_up("stacked")),
    ],
    ids=str,
)
def test_a_layout_is_read_as_it_is_printed(layout: Layout) -> None:
    assert str(parse_layout(str(layout))) == str(layout)
