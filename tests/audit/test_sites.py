"""Blocks are put together by where they are, not by what they are called."""

from __future__ import annotations

import pytest

from lit_symopt import Block, Layout, Role
from lit_symopt.audit.heads import Heads
from lit_symopt.audit.sites import Site, anatomy
from lit_symopt.errors import TaxonomyError


def block(name: str, role: Role, *shape: int, **more: object) -> Block:
    return Block(name, role=role, shape=shape, **more)  # type: ignore[arg-type]


def test_an_attention_is_the_smallest_module_around_output_and_values() -> None:
    # As BERT nests them: the output projection has a module of its own.
    names = {
        "self.query": Role.QUERY,
        "self.key": Role.KEY,
        "self.value": Role.VALUE,
        "output.dense": Role.ATTENTION_OUT,
    }
    blocks = [block(f"layer.{i}.attention.{name}.weight", role, 8, 8) for i in range(2) for name, role in names.items()]
    sites = anatomy(blocks).sites
    assert [(site.kind, site.where, len(site.blocks)) for site in sites] == [
        ("attention", "layer.0.attention", 4),
        ("attention", "layer.1.attention", 4),
    ]


def test_a_shared_expert_is_an_mlp_beside_the_listed_experts_of_the_mixture() -> None:
    experts = [f"mlp.experts.{i}" for i in (0, 2, 1)]
    blocks = [block("mlp.gate.weight", Role.ROUTER, 3, 8)]
    for where in [*experts, "mlp.shared"]:
        blocks += [
            block(f"{where}.up.weight", Role.UP, 6, 8),
            block(f"{where}.down.weight", Role.DOWN, 8, 6, layout=Layout.transposed()),
        ]
    *mlps, mixture = anatomy(blocks).sites
    assert {site.where for site in mlps} == {*experts, "mlp.shared"}
    assert [expert.where for expert in mixture.experts] == ["mlp.experts.0", "mlp.experts.1", "mlp.experts.2"]


def test_two_down_projections_in_one_module_are_a_problem_that_names_them() -> None:
    blocks = [block("a.up", Role.UP, 6, 8), block("a.one", Role.DOWN, 8, 6), block("a.two", Role.DOWN, 8, 6)]
    assert all("'a.one' and 'a.two'" in str(site.problem) for site in anatomy(blocks).sites)


@pytest.mark.parametrize(
    ("weight", "vector"),
    [
        ("q.weight", "q.bias"),
        ("attn.in_proj_weight", "attn.in_proj_bias"),
        ("experts.gate_up_proj", "experts.gate_up_proj_bias"),
    ],
)
def test_a_bias_is_found_by_the_name_of_its_weight(weight: str, vector: str) -> None:
    (found,) = anatomy([block(weight, Role.QUERY, 8, 8), block(vector, Role.VECTOR, 8)]).vectors
    assert found.along == "query"
    assert found.weight is not None
    assert found.weight.name == weight


def test_what_a_vector_declares_wins_over_its_name() -> None:
    blocks = [block("v.weight", Role.VALUE, 8, 8), block("v.bias", Role.VECTOR, 8, along="query")]
    (found,) = anatomy(blocks).vectors
    assert (found.along, found.weight) == ("query", None)


def test_the_bias_of_a_tied_head_is_found_by_the_name_of_the_head() -> None:
    tied = block("embed.weight", Role.TIED_EMBEDDING, 9, 8, aliases=("head.weight",))
    (found,) = anatomy([tied, block("head.bias", Role.VECTOR, 9)]).vectors
    assert found.weight is not None
    assert found.weight.name == "embed.weight"


def test_a_gain_belongs_to_the_attention_around_it() -> None:
    blocks = [
        block("layers.0.attn.v", Role.VALUE, 8, 8),
        block("layers.0.attn.o", Role.ATTENTION_OUT, 8, 8),
        block("layers.0.attn.norm.weight", Role.VECTOR, 8, along="query"),
        block("layers.0.norm.weight", Role.VECTOR, 8, along="residual"),
    ]
    (site,) = anatomy(blocks).sites
    assert [vector.block.name for vector in site.vectors] == ["layers.0.attn.norm.weight"]


@pytest.mark.parametrize("order", ["stacked", "per_head", "per_group"])
def test_fused_projections_have_heads_in_every_order(order: str) -> None:
    fused = block("qkv", Role.QKV, 24, 8, layout=Layout.qkv(2, 2, 4, order=order))  # type: ignore[arg-type]
    out = block("out", Role.ATTENTION_OUT, 8, 8, layout=Layout.heads(2, dim="columns"))
    heads = Heads(Site(kind="attention", where="", blocks=(fused, out)))
    assert (heads.queries, heads.keys, heads.widths["v"]) == (2, 2, 4)


def test_heads_that_do_not_fit_are_an_error_that_names_both_blocks() -> None:
    value = block("value", Role.VALUE, 8, 8, layout=Layout.heads(2))
    out = block("out", Role.ATTENTION_OUT, 8, 8, layout=Layout.heads(1, dim="columns"))
    with pytest.raises(TaxonomyError, match=r"'value'.*'out'"):
        Heads(Site(kind="attention", where="", blocks=(value, out)))
