"""Each stack is the method it is named after. Oracle: the published equation, in exact arithmetic, by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_symopt import Block, BlockTaxonomy, Layout, Role, RoleConfig, SymOpt, SymOptConfig, polar
from lit_symopt.errors import ConfigError
from lit_symopt.stacks import STACKS, settings_for


def step_once(role: Role, gradients: Tensor, *, layout: Layout | None = None, **config: Any) -> tuple[Tensor, Tensor]:
    """A parameter before and after steps with the given gradients, alone in a module under the given role."""
    torch.manual_seed(0)
    module = nn.ParameterDict({"w": nn.Parameter(torch.randn(gradients.shape[1:]))})
    before = module["w"].detach().clone()
    taxonomy = BlockTaxonomy([Block("w", role=role, layout=layout)])
    optimizer = SymOpt.for_module(module, taxonomy, config=SymOptConfig(precision="exact", **config))
    for gradient in gradients:
        module["w"].grad = gradient.clone()
        optimizer.step()
    return before, module["w"].detach()


def exact(matrix: Tensor) -> Tensor:
    return polar(matrix, precision="exact")


@pytest.fixture
def gradients() -> Tensor:
    return torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(1))


def test_muon_is_nesterov_then_the_polar_factor_of_the_whole_matrix(gradients: Tensor) -> None:
    """Jordan et al. 2024: B ← μB + G, O = polar(G + μB), W ← (1 − ηλ)W − η √max(1, m/n) O."""
    before, after = step_once(Role.QUERY, gradients, layout=Layout.heads(2), stack="muon", lr=0.02, weight_decay=0.1)
    buffer, weight = torch.zeros(8, 4), before
    for gradient in gradients:
        buffer = 0.95 * buffer + gradient
        weight = (1 - 0.02 * 0.1) * weight - 0.02 * (8 / 4) ** 0.5 * exact(gradient + 0.95 * buffer)
    torch.testing.assert_close(after, weight, rtol=1e-5, atol=1e-6)


def test_polargrad_scales_the_polar_factor_by_the_nuclear_norm(gradients: Tensor) -> None:
    """Lau, Long & Su 2025, arXiv:2505.21799: M ← βM + (1−β)G, W ← (1 − ηλ)W − η ‖M‖_* polar(M)."""
    before, after = step_once(Role.UP, gradients, stack="polargrad", lr=0.02, weight_decay=0.0)
    momentum, weight = torch.zeros(8, 4), before
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
        weight = weight - 0.02 * torch.linalg.matrix_norm(momentum, "nuc") * exact(momentum)
    torch.testing.assert_close(after, weight, rtol=1e-5, atol=1e-6)


def test_stochastic_spectral_descent_has_no_momentum(gradients: Tensor) -> None:
    """Carlson et al. 2015: W ← W − η ‖G‖_* polar(G), on every matrix, the embedding included."""
    for role in (Role.UP, Role.EMBEDDING):
        before, after = step_once(role, gradients, stack="ssd", lr=0.02)
        weight = before
        for gradient in gradients:
            weight = weight - 0.02 * torch.linalg.matrix_norm(gradient, "nuc") * exact(gradient)
        torch.testing.assert_close(after, weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 1.0])
@pytest.mark.parametrize(
    ("role", "direction"),
    [
        (Role.UP, lambda m: 50.0 * (8 / 4) ** 0.5 * exact(m)),
        (Role.LM_HEAD, lambda m: 3000.0 / 4 * m.sign()),
        (Role.EMBEDDING, lambda m: 50.0 * 4**0.5 * m / m.norm(dim=1, keepdim=True)),
    ],
)
def test_scion_moves_along_the_linear_minimization_oracle(
    gradients: Tensor, role: Role, direction: Any, weight_decay: float
) -> None:
    """Pethick et al. 2025, arXiv:2502.07529: unconstrained W ← W − γρU, constrained W ← (1 − γ)W − γρU."""
    before, after = step_once(role, gradients, stack="scion", lr=4e-4, weight_decay=weight_decay)
    momentum, weight = torch.zeros(8, 4), before
    for gradient in gradients:
        momentum = 0.9 * momentum + 0.1 * gradient
        weight = (1 - 4e-4 * weight_decay) * weight - 4e-4 * direction(momentum)
    torch.testing.assert_close(after, weight, rtol=1e-5, atol=1e-6)


def test_scion_gives_vectors_a_step_of_root_mean_square_radius() -> None:
    before, after = step_once(Role.VECTOR, torch.tensor([[3.0, 0.0, 4.0, 0.0]]), stack="scion", lr=1e-2)
    assert (after - before).square().mean().sqrt().item() == pytest.approx(1e-2 * 50.0, rel=1e-5)


def test_adamw_is_torch_adamw_on_every_role(gradients: Tensor) -> None:
    before, after = step_once(Role.ROUTER, gradients, stack="adamw", lr=1e-2)
    reference = nn.Parameter(before.clone())
    optimizer = torch.optim.AdamW([reference], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for gradient in gradients:
        reference.grad = gradient.clone()
        optimizer.step()
    assert torch.equal(after, reference.detach())


def test_symmetric_updates_each_head_by_itself(gradients: Tensor) -> None:
    before, after = step_once(
        Role.QUERY, gradients[:1], layout=Layout.heads(2), stack="symmetric", lr=0.1, weight_decay=0.0
    )
    momentum = (0.05 * gradients[0]).view(2, 4, 4)
    torch.testing.assert_close(before - after, 0.1 * 0.2 * 4**0.5 * exact(momentum).view(8, 4), rtol=1e-4, atol=1e-6)


def test_the_symmetric_head_and_router_never_move_along_the_shift(gradients: Tensor) -> None:
    for role in (Role.LM_HEAD, Role.ROUTER):
        before, after = step_once(role, gradients, stack="symmetric", weight_decay=0.0)
        assert (after - before).sum(dim=0).abs().max() < 1e-6
    bias = BlockTaxonomy([Block("w", role=Role.VECTOR, shift_invariant=True)])
    module = nn.ParameterDict({"w": nn.Parameter(torch.zeros(5))})
    optimizer = SymOpt.for_module(module, bias)
    module["w"].grad = torch.tensor([1.0, 2.0, -3.0, 4.0, 5.0])
    optimizer.step()
    assert module["w"].abs().max() > 0
    assert module["w"].sum().abs().item() < 1e-8


@pytest.mark.parametrize("name", STACKS)
def test_every_stack_is_total_and_makes_valid_groups(name: Any) -> None:
    stack = STACKS[name]
    assert set(stack.table) == set(Role)
    assert stack.source
    for role in Role:
        shape = (3,) if role is Role.VECTOR else (4, 4)
        block = Block("w", role=role, shape=shape)
        SymOpt([{**settings_for(block, SymOptConfig(stack=name)), "params": [nn.Parameter(torch.ones(shape))]}])


def test_weight_decay_defaults_spare_vectors() -> None:
    for name in ("symmetric", "muon", "polargrad", "adamw"):
        decays = {str(role): entry.weight_decay for role, entry in STACKS[name].table.items()}
        assert decays.pop("vector") == 0.0
        assert set(decays.values()) == {0.1}
    config = SymOptConfig(weight_decay=0.3)
    assert settings_for(Block("w", role=Role.UP), config)["weight_decay"] == 0.3
    assert settings_for(Block("b", role=Role.VECTOR), config)["weight_decay"] == 0.0


def test_rates_are_base_times_multiplier_or_absolute() -> None:
    up, vector = Block("w", role=Role.UP), Block("b", role=Role.VECTOR)
    roles = {"up": RoleConfig(lr_multiplier=3.0), "vector": RoleConfig(lr=7e-4)}
    config = SymOptConfig(stack="muon", lr=0.1, roles=roles)
    assert settings_for(up, config)["lr"] == pytest.approx(0.3)
    assert settings_for(vector, config)["lr"] == 7e-4
    assert settings_for(vector, SymOptConfig(stack="muon"))["lr"] == pytest.approx(3e-3)
    assert settings_for(vector, SymOptConfig(stack="muon", lr=0.1))["lr"] == pytest.approx(0.015)
    with pytest.raises(ConfigError, match="keep one"):
        RoleConfig(lr=1.0, lr_multiplier=2.0)


def test_another_rule_comes_with_its_usual_settings() -> None:
    config = SymOptConfig(stack="muon", roles={"embedding": RoleConfig(rule="row_norm")})
    settings = settings_for(Block("w", role=Role.EMBEDDING), config)
    assert (settings["rule"], settings["scale"], settings["momentum"]) == ("row_norm", "rms", 0.95)
    config = SymOptConfig(roles={"up": RoleConfig(scale="nuclear")})
    assert settings_for(Block("w", role=Role.UP), config)["alpha"] == 1.0
    config = SymOptConfig(roles={"up": RoleConfig(rule="adamw")})
    assert settings_for(Block("w", role=Role.UP), config)["scale"] == "none"


def test_heads_can_be_merged_and_pairs_joined_by_role() -> None:
    heads = Block("w", role=Role.QUERY, layout=Layout.heads(4))
    fused = Block("w", role=Role.GATE_UP, layout=Layout.gate_up("stacked"))
    config = SymOptConfig(roles={"query": RoleConfig(heads="whole"), "gate_up": RoleConfig(pairs=True)})
    assert settings_for(heads, config)["layout"] == Layout.matrix()
    assert settings_for(fused, config)["layout"] == Layout.gate_up("stacked", pairs=True)
    assert settings_for(heads, SymOptConfig())["layout"] == heads.layout


@pytest.mark.parametrize("role", [Role.TIED_EMBEDDING, Role.EMBEDDING, Role.UP])
def test_centering_what_the_loss_sees_is_refused_with_the_reason(role: Role) -> None:
    config = SymOptConfig(roles={str(role): RoleConfig(centered=True)})
    with pytest.raises(ConfigError, match=r"the loss sees the shift 1aᵀ of 'w'"):
        settings_for(Block("w", role=role), config)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stack": "lion"}, "unknown stack 'lion'; known: symmetric, muon, polargrad, ssd, scion, adamw"),
        ({"roles": {"heads": RoleConfig()}}, "unknown role.*'heads'.*known: embedding"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"lr": -1.0}, "lr=-1.0"),
    ],
)
def test_unknown_names_list_the_known_ones(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SymOptConfig(**options)
    with pytest.raises(ConfigError, match=r"unknown scale 'huge'; known: none"):
        RoleConfig(scale="huge")
    with pytest.raises(ConfigError, match="shampoo"):
        RoleConfig(rule="shampoo")


def test_an_override_for_a_role_that_is_absent_is_refused() -> None:
    module = nn.ParameterDict({"w": nn.Parameter(torch.eye(2))})
    config = SymOptConfig(roles={"router": RoleConfig(lr=1.0)})
    with pytest.raises(ConfigError, match=r"roles.router is set, but no block has this role; the roles here are up"):
        SymOpt.for_module(module, BlockTaxonomy([Block("w", role=Role.UP)]), config=config)


def test_a_router_with_a_z_loss_is_centered_only_on_request_and_then_with_a_warning() -> None:
    router = Block("router", role=Role.ROUTER, z_loss=True, shape=(4, 8))
    assert settings_for(router, SymOptConfig())["centered"] is False
    module = nn.ParameterDict({"router": nn.Parameter(torch.randn(4, 8))})
    optimizer = SymOpt.for_module(module, BlockTaxonomy([replace(router, shape=None)]))
    assert "symmetry S_E × O(d), z-loss" in optimizer.explain("router")
    assert "no: a z-loss sees the shift 1aᵀ" in optimizer.explain("router")
    with pytest.warns(UserWarning, match=r"roles\.router\.centered=true: a z-loss penalizes the shift 1aᵀ of 'router'"):
        settings = settings_for(router, SymOptConfig(roles={"router": RoleConfig(centered=True)}))
    assert settings["centered"] is True
