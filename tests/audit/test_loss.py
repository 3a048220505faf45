"""The audit of the loss, on a module whose symmetries are known because it is a page of plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_symopt import Block, BlockTaxonomy, Layout, Role
from lit_symopt.audit import AuditReport, Limits, LossFinding, audit
from lit_symopt.blocks import Action
from lit_symopt.errors import ConfigError
from tests.audit.decoder import NEURONS, D, Decoder, E, V, batch, decoder, taxonomy

EXACT = Limits(float64=1e-10)


def report(model: Decoder, **changes: dict[str, Any]) -> AuditReport:
    return audit(model, batch(), taxonomy=taxonomy(model, **changes), loss_only=True, limits=EXACT, elements=1)


def rows(found: AuditReport) -> dict[tuple[str, str], LossFinding]:
    assert len({(row.symmetry, row.site) for row in found.loss}) == len(found.loss)
    return {(row.symmetry, row.site): row for row in found.loss}


EVERYTHING = {
    ("vocabulary", "vocabulary"),
    ("neurons: monomial", "mlp"),
    ("neurons: monomial", "experts"),
    ("heads", "attention"),
    ("values: GL(h)", "attention"),
    ("queries and keys: planes", "attention"),
    ("shared shift", "lm_head"),
    ("residual stream: signed permutations", "residual"),
    ("residual stream: rotations", "residual"),
}


def test_every_symmetry_of_a_plain_decoder_holds_to_1e_10_and_every_control_moves_the_loss() -> None:
    model = decoder()
    blocks = taxonomy(model, mixture_router_weight={"shift_invariant": False})
    found = audit(model, batch(), taxonomy=blocks, loss_only=True, limits=EXACT, elements=2)
    assert found.passed, str(found)
    passed = {key: row for key, row in rows(found).items() if row.verdict == "pass"}
    assert set(passed) == EVERYTHING | {("experts", "experts")}
    for row in passed.values():
        assert row.fp32 is not None
        assert row.float64 is not None
        assert row.control is not None
        assert row.fp32 <= 1e-5
        assert row.float64 <= 1e-12
        assert row.control > 1e-3
        assert row.tried == 2


def test_a_shift_of_logits_to_which_something_is_added_after_the_softmax_alone_still_holds() -> None:
    # softmax(logits) + selection: the softmax comes first, so the shift is invisible.
    assert rows(report(decoder()))["shared shift", "router"].verdict == "pass"


def test_a_router_bias_is_shifted_with_its_router_or_alone() -> None:
    model = decoder()
    both = report(model, mixture_router_bias={"shift_invariant": True})
    alone = report(
        model, mixture_router_bias={"shift_invariant": True}, mixture_router_weight={"shift_invariant": False}
    )
    assert rows(both)["shared shift", "router"].verdict == "pass"
    assert rows(alone)["shared shift", "vector"].verdict == "pass"


def test_a_tied_head_has_no_shift_and_a_vocabulary_of_one_block() -> None:
    found = report(decoder(tied=True))
    assert found.passed, str(found)
    assert ("shared shift", "lm_head") not in rows(found)
    assert rows(found)["vocabulary", "vocabulary"].verdict == "pass"


def test_with_norms_of_queries_and_keys_heads_change_places_and_planes_turn_while_gains_are_equal() -> None:
    model = decoder(norms=True)
    found = rows(report(model))
    assert found["heads", "attention"].verdict == "pass"
    assert found["queries and keys: planes", "attention"].verdict == "pass"
    with torch.no_grad():
        model.get_parameter("attention.norms.q.weight")[0] = 2.0
    refused = rows(report(model))["queries and keys", "attention"]
    assert refused.verdict == "does not apply"
    assert "'attention.norms.q.weight' has learned gains that differ within a plane" in refused.reason


def test_rotations_of_the_stream_do_not_apply_once_gains_differ_but_signed_permutations_do() -> None:
    model = decoder()
    with torch.no_grad():
        model.get_parameter("norm.2.weight")[3] = 1.5
    found = rows(report(model))
    assert found["residual stream: signed permutations", "residual"].verdict == "pass"
    row = found["residual stream: rotations", "residual"]
    assert row.verdict == "does not apply"
    assert "the gains of 'norm.2.weight' are not constant" in row.reason


WRONG: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]], str]] = {
    "a tied head is shift-invariant": ({"tied": True}, {"tokens_weight": {"shift_invariant": True}}, "shared shift"),
    "a capped head is shift-invariant": (
        {"cap": 30.0},
        {"head_weight": {"shift_invariant": True}, "head_bias": {"shift_invariant": True}},
        "shared shift",
    ),
    "a weakly capped head is shift-invariant": (
        {"cap": 3000.0},
        {"head_weight": {"shift_invariant": True}, "head_bias": {"shift_invariant": True}},
        "shared shift",
    ),
    "stacked for by turns": ({}, {"mlp_fused_weight": {"layout": Layout.gate_up("stacked")}}, "neurons: monomial"),
    "by turns for stacked": (
        {},
        {"mixture_gate_up": {"layout": Layout.experts(Layout.gate_up("interleaved"))}},
        "neurons: monomial",
    ),
    "down by its other side": ({}, {"mlp_down_weight": {"layout": Layout.matrix()}}, "neurons"),
    "the planes of neighbors": (
        {},
        {name: {"action": Action.ROTARY_NEIGHBORS} for name in ("attention_q_weight", "attention_k_weight")},
        "queries and keys: planes",
    ),
    "planes of all dimensions": (
        {},
        {name: {"rotary_dim": None} for name in ("attention_q_weight", "attention_k_weight")},
        "queries and keys: planes",
    ),
    "no rotary embedding": (
        {},
        {name: {"action": Action.GENERAL_LINEAR} for name in ("attention_q_weight", "attention_k_weight")},
        "queries and keys: GL(h)",
    ),
    "queries turn in other planes than keys": ({}, {"attention_q_weight": {"rotary_dim": 2}}, "queries and keys"),
    "one key head": (
        {},
        {name: {"layout": Layout.heads(1)} for name in ("attention_k_weight", "attention_v_weight")},
        "heads",
    ),
    "sinks along the stream": ({}, {"attention_sinks": {"along": "residual"}}, "residual stream"),
    "the experts' bias along neurons": ({}, {"mixture_down_bias": {"along": "expert_gate_up"}}, "residual stream"),
    "norms along queries": ({}, {"norm_all_weight": {"along": "query"}}, "heads"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_block_fails_in_the_row_it_is_wrong_about(case: str) -> None:
    options, changes, symmetry = WRONG[case]
    found = report(decoder(**options), **changes)
    assert not found.passed, str(found)
    assert any(row.verdict == "FAIL" and row.symmetry.startswith(symmetry) for row in found.loss), str(found)


def test_blocks_that_disagree_in_shape_are_a_failure_that_names_both() -> None:
    found = report(decoder(), mlp_down_weight={"layout": Layout.transposed(stored="in_out")})
    assert any("'mlp.down.weight'" in failure.reason for failure in found.failures)
    found = report(decoder(), attention_v_weight={"layout": Layout.heads(H_WRONG)})
    reasons = [failure.reason for failure in found.failures]
    assert any("'attention.k.weight'" in reason and "'attention.v.weight'" in reason for reason in reasons)


H_WRONG = 4


class Unused(nn.Module):
    """Two matrices, one of which the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x[:, :3] + 0 * self.down(self.up(x).relu())
        return y


PLAIN = BlockTaxonomy(
    [
        Block("*up.weight", role=Role.UP),
        Block("*down.weight", role=Role.DOWN, layout=Layout.transposed()),
        Block("*.bias", role=Role.VECTOR),
    ]
)


def test_a_control_that_does_not_move_the_loss_leaves_the_row_open() -> None:
    found = audit(Unused(), torch.randn(5, 6), taxonomy=PLAIN, loss_only=True)
    (row,) = (row for row in found.loss if row.symmetry.startswith("neurons"))
    assert row.verdict == "inconclusive"
    assert "proves nothing" in row.reason
    assert not found.passed


def test_what_needs_a_partner_and_has_none_is_a_failure() -> None:
    lonely = nn.ModuleDict({"up": nn.Linear(6, 8)})
    model = Wrapped(lonely["up"])
    taxonomy = BlockTaxonomy([Block("*.weight", role=Role.VALUE), Block("*.bias", role=Role.VECTOR)])
    (failure,) = audit(model, torch.randn(5, 6), taxonomy=taxonomy, loss_only=True).failures
    assert "role value acts jointly with attention_out" in failure.reason


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


def test_the_module_its_gradients_its_mode_and_the_random_state_are_left_as_they_are() -> None:
    model = decoder()
    model.training_loss(batch()).backward()
    model.mlp.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    copies = {name: None if g is None else g.clone() for name, g in gradients.items()}
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    assert audit(model, batch(), taxonomy=taxonomy(model)).passed
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name]
        copy = copies[name]
        assert copy is None or (parameter.grad is not None and torch.equal(parameter.grad, copy))
    assert model.training
    assert not model.mlp.training


def test_the_same_seed_gives_the_same_report() -> None:
    model = decoder()
    assert str(report(model)) == str(report(model))


def test_a_batch_of_one_token_is_an_error_that_says_what_is_missing() -> None:
    model = decoder()
    with pytest.raises(ConfigError, match="two tokens or more"):
        audit(model, batch()[:, :1], taxonomy=taxonomy(model))


LINEAR = BlockTaxonomy([Block("weight", role=Role.LINEAR), Block("bias", role=Role.VECTOR)])


def test_a_batch_that_lacks_an_argument_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigError, match="input"):
        audit(nn.Linear(3, 2), {"x": torch.ones(1, 3)}, taxonomy=LINEAR)


def test_near_ties_between_experts_are_decided_in_float64_and_said() -> None:
    model = decoder()
    with torch.no_grad():  # two experts that differ by one rounding in one weight of the router
        model.mixture.router.weight[1:] = model.mixture.router.weight[0]
        model.mixture.router.bias.zero_()
        for expert in range(1, E):
            entry = model.mixture.router.weight[expert, expert]
            entry.copy_(torch.nextafter(entry, torch.tensor(torch.inf)))
    found = audit(model, batch(), taxonomy=taxonomy(model), loss_only=True, limits=EXACT)
    rotations = rows(found)["residual stream: rotations", "residual"]
    assert rotations.verdict == "pass", str(found)
    assert "ties within fp32" in rotations.reason


def test_a_frozen_block_takes_part_and_what_no_block_claims_is_named() -> None:
    model = decoder()
    model.mlp.down.weight.requires_grad_(False)
    assert report(model).passed
    model.register_parameter("extra", nn.Parameter(torch.zeros(3), requires_grad=False))
    row = rows(report(model))["residual stream: signed permutations", "residual"]
    assert row.verdict == "does not apply"
    assert "'extra' is frozen" in row.reason


def test_sizes_are_those_of_the_module() -> None:
    model = decoder()
    assert model.tokens.weight.shape == (V, D)
    assert model.mixture.gate_up.shape == (E, 2 * NEURONS, D)
