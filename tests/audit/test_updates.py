"""The audit of the updates: which blocks of which stack commute, on gradients that are easy and that are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_symopt import Block, BlockTaxonomy, Layout, Role, RoleConfig, SymOptConfig
from lit_symopt.audit import AuditReport, UpdateFinding, audit
from lit_symopt.errors import ConfigError
from tests.audit.decoder import batch, decoder, taxonomy


def report(config: SymOptConfig, **options: Any) -> AuditReport:
    model = decoder(**options)
    return audit(model, batch(), taxonomy=taxonomy(model), config=config, elements=1)


def named(found: AuditReport) -> set[str]:
    """The blocks whose updates do not commute."""
    return {name for row in found.updates if row.verdict == "FAIL" for name in row.blocks}


MATRICES = {
    "tokens.weight",
    "attention.q.weight",
    "attention.k.weight",
    "attention.v.weight",
    "attention.o.weight",
    "mlp.fused.weight",
    "mlp.down.weight",
    "mixture.router.weight",
    "mixture.gate_up",
    "mixture.down",
    "head.weight",
}


def test_every_update_of_the_symmetric_stack_commutes() -> None:
    found = report(SymOptConfig())
    assert found.passed, str(found)
    assert {name for row in found.updates for name in row.blocks} > MATRICES
    assert all(row.error is None or row.error <= 1e-3 for row in found.updates)


def test_with_muon_the_updates_of_vocabulary_and_router_do_not_commute() -> None:
    found = report(SymOptConfig(stack="muon"))
    assert named(found) == {"tokens.weight", "head.weight", "mixture.router.weight"}
    assert not found.passed


def test_with_adamw_no_update_of_a_matrix_commutes_and_that_of_every_vector_does() -> None:
    found = report(SymOptConfig(stack="adamw"))
    assert named(found) == MATRICES
    assert {row.verdict for row in found.updates if row.role == "vector"} == {"pass"}


def test_only_the_loss_is_audited_if_asked_for() -> None:
    model = decoder()
    found = audit(
        model, batch(), taxonomy=taxonomy(model), config=SymOptConfig(stack="adamw"), loss_only=True, elements=1
    )
    assert found.passed
    assert found.updates == ()


@pytest.mark.parametrize("rule", ["row_norm", "row_then_spectral"])
def test_row_rules_commute_on_neurons_and_not_on_the_dimensions_of_a_head(rule: str) -> None:
    roles = {name: RoleConfig(rule=rule) for name in ("gate_up", "down", "query")}
    assert named(report(SymOptConfig(roles=roles))) == {"attention.q.weight"}


def test_rows_of_a_wide_polar_factor_have_norm_one_already() -> None:
    roles = {name: RoleConfig(rule="spectral_then_row") for name in ("gate_up", "down", "query")}
    assert named(report(SymOptConfig(roles=roles))) == set()


def test_pairs_of_gate_and_up_are_one_neuron_for_a_row_rule() -> None:
    roles = {"expert_gate_up": RoleConfig(rule="row_norm", pairs=True)}
    assert named(report(SymOptConfig(roles=roles))) == set()


def test_a_centered_tied_head_is_an_error_that_says_why() -> None:
    config = SymOptConfig(roles={"tied_embedding": RoleConfig(centered=True)})
    with pytest.raises(ConfigError, match=r"the loss sees the shift 1aᵀ of 'tokens.weight'"):
        report(config, tied=True)


class Fixed(nn.Module):
    """One matrix, whose gradient is the given one."""

    def __init__(self, gradient: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("gradient", gradient)
        self.gradient: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * self.gradient).sum() + 1.0 + 0 * x.sum()


def updates(gradient: Tensor, rule: str, role: Role = Role.LINEAR) -> UpdateFinding:
    config = SymOptConfig(roles={str(role): RoleConfig(rule=rule)})
    blocks = BlockTaxonomy([Block("weight", role=role, layout=Layout.matrix())])
    (row,) = audit(Fixed(gradient), torch.ones(1), taxonomy=blocks, config=config).updates
    return row


def spectrum(*sigma: float) -> Tensor:
    u, v = (torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(s))).Q for s in (1, 2))
    values = torch.zeros(24)
    values[: len(sigma)] = torch.tensor(sigma)
    matrix: Tensor = (u * values) @ v
    return matrix


SPECTRA = {
    "full rank": spectrum(*(2.0 ** -(i / 4) for i in range(24))),
    "rank three": spectrum(1.0, 0.5, 0.1),
    "over seven decades": spectrum(*(10 ** -(i / 3) for i in range(24))),
    "on the edge of what is kept": spectrum(1.0, 3e-6, 2.9e-6, 3.1e-6),
    "tiny": 1e-20 * spectrum(1.0, 0.5),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rule", ["spectral", "left_spectral", "right_spectral"])
def test_ill_conditioned_gradients_raise_no_false_alarm(name: str, rule: str) -> None:
    row = updates(SPECTRA[name], rule)
    assert row.verdict == "pass", row
    assert ("condition number" in row.reason) == (name == "on the edge of what is kept")


@pytest.mark.parametrize("name", SPECTRA)
def test_and_hide_no_violation(name: str) -> None:
    assert updates(SPECTRA[name], "row_norm").verdict == "FAIL"
    if name != "tiny":  # far below its ε, AdamW is linear
        assert updates(SPECTRA[name], "adamw").verdict == "FAIL"


def test_a_block_without_a_gradient_is_said_to_have_none() -> None:
    row = updates(torch.zeros(24, 24), "spectral")
    assert row.verdict == "does not apply"
    assert "no gradient" in row.reason


def test_rows_that_are_never_seen_are_no_violation() -> None:
    gradient = torch.randn(24, 24, generator=torch.Generator().manual_seed(3))
    gradient[5:] = 0
    for rule in ("row_norm", "row_then_spectral", "spectral_then_row"):
        assert updates(gradient, rule, Role.ROUTER).verdict == "pass"
