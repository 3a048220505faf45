"""What only some models have is acted on too, or said not to apply; and a wrong word about it is caught."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lit_symopt import Block, BlockTaxonomy, Layout, Role
from lit_symopt.audit import AuditReport, Limits, LossFinding, audit
from tests.audit.decoder import HEAD, D, V, batch, decoder, taxonomy
from tests.audit.variants import FrozenBias, NormedNeurons, OnlyFloat32, Speller, Ungated, tower

EXACT = Limits(float64=1e-10)


def report(model: nn.Module, given: object, blocks: BlockTaxonomy) -> AuditReport:
    return audit(model, given, taxonomy=blocks, loss_only=True, limits=EXACT)


def row(found: AuditReport, symmetry: str) -> LossFinding:
    (one,) = (row for row in found.loss if row.symmetry.startswith(symmetry) and row.verdict != "does not apply")
    return one


@pytest.mark.parametrize("rows", [1, HEAD])
def test_the_rows_of_a_gate_and_a_table_above_all_attentions_change_places_with_the_heads(rows: int) -> None:
    model, blocks = tower(rows)
    found = report(model, batch(), blocks)
    assert found.passed, str(found)
    assert row(found, "heads").verdict == "pass"
    assert row(found, "heads").sites == 2


@pytest.mark.parametrize("rows", [1, HEAD])
def test_a_gate_that_does_not_say_so_fails(rows: int) -> None:
    model, blocks = tower(rows, gate=None)
    assert row(report(model, batch(), blocks), "heads").verdict == "FAIL"


def test_a_gate_without_an_attention_is_a_failure_that_names_it() -> None:
    blocks = [
        Block("up.weight", role=Role.LINEAR, along="heads"),
        Block("down.weight", role=Role.LINEAR),
        Block("*.bias", role=Role.VECTOR),
        Block("norm.weight", role=Role.VECTOR),
    ]
    (failure,) = report(NormedNeurons(), torch.randn(5, 6), BlockTaxonomy(blocks)).failures
    assert "'up.weight' declares rows for each head" in failure.reason


def test_a_frozen_bias_of_the_selection_is_permuted_with_the_experts() -> None:
    model = decoder()
    model.mixture = FrozenBias()
    found = report(model, batch(), taxonomy(model))
    assert found.passed, str(found)
    assert row(found, "experts").verdict == "pass"


def test_a_frozen_parameter_that_says_where_it_lies_is_not_taken_for_one() -> None:
    model = decoder()
    model.mixture = FrozenBias()
    along = Block("mixture.selection", role=Role.VECTOR, along="residual")
    found = report(model, batch(), BlockTaxonomy([*taxonomy(model).blocks, along]))
    assert row(found, "experts").verdict == "FAIL"


def normed(along: str) -> BlockTaxonomy:
    return BlockTaxonomy(
        [
            Block("up.weight", role=Role.UP),
            Block("down.weight", role=Role.DOWN, layout=Layout.transposed()),
            Block("*.bias", role=Role.VECTOR),
            Block("norm.weight", role=Role.VECTOR, along=along),
        ]
    )


def test_the_gains_of_a_norm_of_neurons_are_permuted_with_them() -> None:
    data = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = NormedNeurons()
    assert row(report(model, data, normed("up")), "neurons").verdict == "pass"
    assert row(report(model, data, normed("query")), "neurons").verdict == "FAIL"


def ungated(down: Layout) -> BlockTaxonomy:
    return BlockTaxonomy(
        [
            Block("router.weight", role=Role.ROUTER),
            Block("up", role=Role.EXPERT_GATE_UP, layout=Layout.experts(Layout.matrix())),
            Block("up_bias", role=Role.VECTOR),
            Block("down", role=Role.EXPERT_DOWN, layout=Layout.experts(down)),
        ]
    )


def test_experts_without_a_gate_are_permuted_and_not_rescaled() -> None:
    data = torch.randn(40, D, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = Ungated()
    found = report(model, data, ungated(Layout.transposed()))
    assert found.passed, str(found)
    assert row(found, "neurons").symmetry == "neurons: permutation"
    assert row(found, "experts").verdict == "pass"
    assert row(report(model, data, ungated(Layout.matrix())), "neurons").verdict == "FAIL"


def test_gated_experts_are_not_taken_for_experts_without_a_gate() -> None:
    model = decoder()
    found = report(model, batch(), taxonomy(model, mixture_gate_up={"layout": Layout.experts(Layout.matrix())}))
    assert any(row.symmetry == "neurons" and row.verdict == "FAIL" for row in found.loss)


def spelled(**head: Any) -> BlockTaxonomy:
    return BlockTaxonomy(
        [
            Block("tokens.weight", role=Role.EMBEDDING),
            Block("places.weight", role=Role.POSITION),
            Block("up.weight", role=Role.UP),
            Block("down.weight", role=Role.DOWN, layout=Layout.transposed()),
            Block("head.weight", role=Role.LM_HEAD),
            Block("head.bias", role=Role.VECTOR, **head),
            Block("up.bias", role=Role.VECTOR),
            Block("down.bias", role=Role.VECTOR),
        ]
    )


SPELLERS: dict[str, tuple[dict[str, Any], str]] = {
    "padding": ({"padding": 0}, "the module tells padding apart: [0] stay"),
    "a head of fewer rows": ({"rows": V + 5}, "the head scores"),
    "an id of its own": ({"rows": V + 5, "prompt": V + 2}, "the module uses ids that the batch does not hold"),
    "padding and fewer rows": (
        {"rows": V + 5, "padding": 0},
        "the module tells padding apart: [0] stay; the head scores",
    ),
}


@pytest.mark.parametrize("case", SPELLERS)
def test_ids_that_can_change_places_do_and_the_report_says_which_cannot(case: str) -> None:
    options, reason = SPELLERS[case]
    torch.manual_seed(0)
    model = Speller(**options)
    found = row(report(model, batch(), spelled()), "vocabulary")
    assert found.verdict == "pass", found
    assert reason in found.reason


@pytest.mark.parametrize("case", SPELLERS)
def test_a_bias_that_is_not_permuted_with_its_head_still_fails(case: str) -> None:
    torch.manual_seed(0)
    model = Speller(**SPELLERS[case][0])
    wrong = report(model, batch(), spelled(along="up"))
    assert any(row.symmetry == "vocabulary" and row.verdict == "FAIL" for row in wrong.loss), str(wrong)


def test_where_all_ids_can_change_places_they_do() -> None:
    torch.manual_seed(0)
    assert row(report(Speller(), batch(), spelled()), "vocabulary").reason == ""


def test_a_module_that_does_not_run_in_float64_is_audited_in_fp32_and_the_report_says_so() -> None:
    data = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = OnlyFloat32()
    found = report(model, data, fp32(Layout.transposed()))
    assert found.passed, str(found)
    assert "fp32 alone: the module does not run in float64" in str(found)
    assert row(found, "neurons").float64 is None
    assert not report(model, data, fp32(Layout.matrix())).passed


def fp32(down: Layout) -> BlockTaxonomy:
    return BlockTaxonomy(
        [
            Block("up.weight", role=Role.UP),
            Block("down.weight", role=Role.DOWN, layout=down),
            Block("*.bias", role=Role.VECTOR),
        ]
    )
