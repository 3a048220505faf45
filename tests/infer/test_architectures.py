"""Inference against answers written by hand from each architecture's source, parameter by parameter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from lit_symopt.blocks import ACTIONS, Action, Block, BlockTaxonomy, Layout, Role
from tests.infer.answers.table import ANSWERS, answer
from tests.infer.modules import INSTANCES

Facts = dict[str, Any]


def stated(block: Block, blocks: Mapping[str, Block]) -> Facts:
    """What a block says, with its defaults spelled out: two blocks that mean the same say the same."""
    return {
        "role": str(block.role),
        "layout": _canonical(str(block.layout)),
        "shift_invariant": block.symmetry.shift_invariant,
        "action": str(_action(block, blocks)),
        "rotary_dim": block.rotary_dim,
        "along": _along(block, blocks),
    }


def _canonical(layout: str) -> str:
    """A group order that is another one too gets the simplest name: one group is a stack, groups of one are heads."""
    found = re.fullmatch(r"qkv\((\d+), (\d+), (\d+), order='(\w+)'(.*)\)", layout)
    if found is None:
        return layout
    q, kv, head_dim, order, rest = found.groups()
    order = "stacked" if kv == "1" and (order == "per_group" or q == "1") else order
    order = "per_head" if q == kv and order == "per_group" else order
    return f"qkv({q}, {kv}, {head_dim}, order='{order}'{rest})"


def _action(block: Block, blocks: Mapping[str, Block]) -> Action:
    """Without a gate beside it, an MLP's default is what its activation leaves: permutations."""
    if block.action is not None or block.role not in (Role.UP, Role.DOWN):
        return block.acts
    gates = (Role.GATE, Role.GATE_UP)
    gated = any(other.role in gates and _layer(other) == _layer(block) for other in blocks.values())
    return ACTIONS[block.role] if gated else Action.PERMUTATION


def _layer(block: Block) -> str:
    found = re.match(r".*\.\d+\.", block.name)
    return found.group() if found else ""


def _along(block: Block, blocks: Mapping[str, Block]) -> str | None:
    """By default a bias lies along the outputs of the weight beside it."""
    if block.role is not Role.VECTOR or block.along is not None:
        return block.along
    weight = blocks.get(re.sub(r"bias$", "weight", block.name))
    return str(weight.role) if block.name.endswith("bias") and weight is not None else None


def by_name(taxonomy: BlockTaxonomy, module: Any) -> dict[str, Block]:
    return {block.name: block for block in taxonomy.assign(module)}


def differences(got: BlockTaxonomy, right: BlockTaxonomy, module: Any) -> list[str]:
    """One line for each fact in which two taxonomies of a module differ."""
    ours, theirs = by_name(got, module), by_name(right, module)
    lines = []
    for name, block in theirs.items():
        said, meant = stated(ours[name], ours), stated(block, theirs)
        lines += [
            f"{name} {block.shape}: {key} is {said[key]}, not {meant[key]}" for key in meant if said[key] != meant[key]
        ]
    return lines


@pytest.mark.parametrize(
    ("pattern", "change"),
    [
        ("model.layers.0.self_attn.q_proj.weight", {"role": Role.KEY}),
        ("model.layers.0.self_attn.q_proj.weight", {"layout": Layout.heads(2)}),
        ("model.layers.0.self_attn.q_proj.weight", {"action": Action.ROTARY_NEIGHBORS}),
        ("model.layers.0.self_attn.q_proj.weight", {"rotary_dim": 4}),
        ("model.layers.1.mlp.up_proj.weight", {"action": Action.PERMUTATION}),
        ("model.norm.weight", {"along": "query"}),
        ("lm_head.weight", {"shift_invariant": False}),
    ],
)
def test_a_difference_in_any_fact_is_told(pattern: str, change: dict[str, Any]) -> None:
    module = INSTANCES["llama"].module()
    right = ANSWERS["llama"].assign(module)
    wrong = [replace(block, **change) if block.name == pattern else block for block in right]
    (line,) = differences(BlockTaxonomy(wrong), ANSWERS["llama"], module)
    assert line.startswith(f"{pattern} ")


def test_every_instance_has_an_answer_and_every_answer_an_instance() -> None:
    assert sorted(ANSWERS) == sorted(name for name in INSTANCES if not INSTANCES[name].declares)


@pytest.mark.parametrize("name", INSTANCES)
def test_an_answer_is_total_and_disjoint_and_its_layouts_fit(name: str) -> None:
    module = INSTANCES[name].module()
    assert len(answer(name, module).assign(module)) == len(list(module.parameters()))


@pytest.mark.parametrize("name", INSTANCES)
def test_inference_equals_the_hand_written_answer(name: str) -> None:
    instance = INSTANCES[name]
    module = instance.module()
    inferred = BlockTaxonomy.infer(module, instance.batch())
    assert differences(inferred, answer(name, module), module) == []
