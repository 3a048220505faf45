"""Training with the losses of routers: what is minimized, logged, centered and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_symopt import Role, SymOpt, SymOptConfig
from lit_symopt.config import RoleConfig
from lit_symopt.errors import CheckpointError
from lit_symopt.models import LitMoECausalLM
from lit_symopt.models.router_losses import load_balancing_loss, router_z_loss
from tests.models.tiny import MIXTURES, Sequences, tiny, tokens, trainer

ONE_BATCH = Sequences(count=4)  # an epoch: where a resume starts in it does not matter
BOTH: dict[str, Any] = {"load_balancing_loss": 0.3, "router_z_loss": 0.2}


def router_logits(model: LitMoECausalLM, input_ids: Tensor) -> list[Tensor]:
    """What every router computes, from its input and weights as they stand in the model."""
    found: list[Tensor] = []
    routers = [getattr(layer.mlp, "gate", None) or layer.mlp.router for layer in model.model.model.layers]

    def keep(module: Any, arguments: tuple[Tensor, ...]) -> None:
        stream = arguments[0].flatten(0, -2)
        found.append(torch.nn.functional.linear(stream, module.weight, getattr(module, "bias", None)))

    hooks = [router.register_forward_pre_hook(keep) for router in routers]
    model(input_ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", MIXTURES)
def test_training_minimizes_the_weighted_sum_and_logs_each_term_without_its_coefficient(family: str) -> None:
    model, input_ids = tiny(family, **BOTH).double(), tokens(3, 11)
    layers = router_logits(model, input_ids)
    assert len(layers) == 2
    losses = model.losses(input_ids)
    expected = {
        "loss": model.loss(input_ids),
        "load_balancing_loss": load_balancing_loss(layers, top_k=2),
        "router_z_loss": router_z_loss(layers),
    }
    expected["total_loss"] = expected["loss"] + 0.3 * expected["load_balancing_loss"] + 0.2 * expected["router_z_loss"]
    assert list(losses) == list(expected)
    for name, value in expected.items():
        assert losses[name].dtype == torch.float64
        torch.testing.assert_close(losses[name], value, rtol=1e-12, atol=0, msg=name)
    assert torch.equal(model.training_loss({"input_ids": input_ids}), losses["total_loss"])


@pytest.mark.parametrize("family", MIXTURES)
def test_the_gradient_of_the_total_is_that_of_its_terms(family: str) -> None:
    model, input_ids = tiny(family, **BOTH).double(), tokens(3, 11)
    parameters = list(model.parameters())
    total = torch.autograd.grad(model.training_loss({"input_ids": input_ids}), parameters)
    layers = router_logits(model, input_ids)
    terms = model.loss(input_ids) + 0.3 * load_balancing_loss(layers, top_k=2) + 0.2 * router_z_loss(layers)
    for one, other in zip(total, torch.autograd.grad(terms, parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("family", MIXTURES)
def test_without_coefficients_the_loss_is_the_cross_entropy_and_nothing_else_is_logged(family: str) -> None:
    model, input_ids = tiny(family), tokens(3, 11)
    model.model.config.output_router_logits = True  # transformers would add router_aux_loss_coef of its own
    assert model.model.config.router_aux_loss_coef > 0
    assert list(model.losses(input_ids)) == ["loss"]
    with_theirs = model.model(input_ids=input_ids, labels=input_ids, use_cache=False)
    assert float(with_theirs.loss.detach()) > float(model.loss(input_ids).detach()) + 1e-4
    assert torch.equal(model.training_loss({"input_ids": input_ids}), model.loss(input_ids))


@pytest.mark.parametrize("family", MIXTURES)
def test_a_run_logs_them_apart_and_validates_with_the_cross_entropy_alone(tmp_path: Path, family: str) -> None:
    model, data = tiny(family, **BOTH), Sequences()
    run = trainer(tmp_path, max_steps=1, max_epochs=-1)
    run.fit(model, data)
    logged = run.logged_metrics
    assert logged["train/total_loss"].item() == pytest.approx(
        logged["train/loss"].item()
        + 0.3 * logged["train/load_balancing_loss"].item()
        + 0.2 * logged["train/router_z_loss"].item(),
        rel=1e-6,
    )
    (metrics,) = trainer(tmp_path).validate(model, data, verbose=False)
    sums = [(7 * len(batch)) * model.loss(batch).item() for batch in data.sequences.split(4)]
    assert metrics["val/loss"] == pytest.approx(sum(sums) / 70, rel=1e-6)
    plain = tiny(family)
    run = trainer(tmp_path, max_steps=1, max_epochs=-1)
    run.fit(plain, data)
    assert not {"train/total_loss", "train/router_z_loss", "train/load_balancing_loss"} & set(run.logged_metrics)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize(("experts", "selected"), [(1, 1), (4, 4)])
def test_one_expert_or_all_of_them_selected_trains(family: str, experts: int, selected: int) -> None:
    model = tiny(family, num_experts=experts, num_experts_per_tok=selected, **BOTH)
    optimizer = SymOpt.for_module(model, config=SymOptConfig(lr=1e-3))
    for _ in range(2):
        model.training_loss({"input_ids": tokens(3, 11)}).backward()
        optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert model.losses(tokens(3, 11))["load_balancing_loss"].item() == pytest.approx(1.0)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_router_is_centered_by_default_unless_a_z_loss_sees_its_shift(family: str) -> None:
    for z_loss in (0.0, 0.1):
        model = tiny(family, router_z_loss=z_loss, load_balancing_loss=0.1)
        blocks = [
            block
            for block in model.block_taxonomy().assign(model)
            if "gate.weight" in block.name or "router" in block.name
        ]
        assert len(blocks) == (2 if family == "olmoe" else 4)
        assert {block.z_loss for block in blocks} == {z_loss > 0}
        assert {block.symmetry.shift_invariant for block in blocks} == {z_loss == 0}
        groups = SymOpt.for_module(model).param_groups
        assert {group["centered"] for group in groups if group["role"] == "router"} == {z_loss == 0}


@pytest.mark.parametrize("family", MIXTURES)
def test_a_transformers_model_wrapped_by_hand_is_trained_and_centered_alike(family: str) -> None:
    known = tiny(family, **BOTH)
    wrapped = LitMoECausalLM(known.model, **BOTH)
    batch = {"input_ids": tokens(3, 11)}
    assert torch.equal(wrapped.training_loss(batch), known.training_loss(batch))
    centered = [{g["name"]: g["centered"] for g in SymOpt.for_module(model).param_groups} for model in (wrapped, known)]
    assert centered[0] == centered[1]
    assert centered[0]["router"] is False


@pytest.mark.parametrize("family", MIXTURES)
def test_centering_a_router_that_a_z_loss_sees_is_done_when_asked_for_with_a_warning(family: str) -> None:
    model = tiny(family, router_z_loss=0.1)
    asked = SymOptConfig(roles={"router": RoleConfig(centered=True)})
    with pytest.warns(UserWarning, match=r"roles\.router\.centered=true: a z-loss penalizes the shift"):
        optimizer = SymOpt.for_module(model, config=asked)
    model.training_loss({"input_ids": tokens(3, 11)}).backward()
    routers = [block for block in model.block_taxonomy().assign(model) if block.role is Role.ROUTER]
    parameters = dict(model.named_parameters())
    before = {block.name: parameters[block.name].detach().clone() for block in routers}
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    for name, old in before.items():
        step = parameters[name].detach() - old
        assert float(step.abs().max()) > 1e-4
        assert float(step.sum(dim=0).abs().max()) < 1e-5


def checkpoint_of(folder: Path, model: LitMoECausalLM) -> str:
    run = trainer(folder, max_steps=2, max_epochs=-1, limit_val_batches=0, enable_checkpointing=False)
    run.fit(model, ONE_BATCH)
    run.save_checkpoint(folder / "a.ckpt")
    return str(folder / "a.ckpt")


@pytest.mark.parametrize("family", MIXTURES)
def test_a_run_with_router_losses_continues_from_its_checkpoint(tmp_path: Path, family: str) -> None:
    def whole() -> LitMoECausalLM:
        model: LitMoECausalLM = tiny(family, **BOTH)
        run = trainer(tmp_path, max_steps=4, max_epochs=-1, limit_val_batches=0)
        run.fit(model, ONE_BATCH)
        return model

    path = checkpoint_of(tmp_path, tiny(family, **BOTH))
    continued = tiny(family, **BOTH)
    trainer(tmp_path, max_steps=4, max_epochs=-1, limit_val_batches=0).fit(continued, ONE_BATCH, ckpt_path=path)
    for one, other in zip(whole().parameters(), continued.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_checkpoint_without_z_loss_is_not_continued_with_one_but_can_be_validated(
    tmp_path: Path, family: str
) -> None:
    path = checkpoint_of(tmp_path, tiny(family))
    other = tiny(family, router_z_loss=0.1)
    trainer(tmp_path).validate(other, Sequences(), ckpt_path=path, verbose=False)
    with pytest.raises(CheckpointError, match=r"router: centered is 'True' there and 'False' here"):
        trainer(tmp_path, max_steps=4, max_epochs=-1, limit_val_batches=0).fit(other, ONE_BATCH, ckpt_path=path)
