"""Mixtures under ZeRO 3, whose ranks may reach different numbers of experts."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

import pytest

from tests.sharding.processes import Ranks

pytestmark = pytest.mark.deepspeed


def reached_and_trained(family: str) -> tuple[int, float]:
    """Experts that this rank's batch reaches, and the loss after two steps."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from lit_symopt import SymOpt
    from lit_symopt.strategies.cpu import communicate_by_gloo
    from tests.models.tiny import tiny, tokens

    communicate_by_gloo()
    module = tiny(family, num_experts=16)
    # One token again and again reaches few experts, many tokens reach more.
    batch = torch.zeros(1, 12, dtype=torch.long) if dist.get_rank() else tokens(2, 12)
    routed = module.model(input_ids=batch, output_router_logits=True).router_logits
    reached = len({int(expert) for logits in routed for expert in logits.topk(2, dim=-1).indices.flatten()})
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=SymOpt.for_module(module), config=config)
    engine.basic_optimizer.attach(engine)
    loss = torch.tensor(float("nan"))
    for _ in range(3):
        loss = engine.module.loss(batch)
        engine.backward(loss)
        engine.step()
    engine.destroy()
    return reached, float(loss.detach())


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2) as started:
        yield started


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_ranks_that_reach_different_numbers_of_experts_train_on(ranks: Ranks, family: str) -> None:
    (many, first), (few, second) = ranks(reached_and_trained, family)
    assert many > few
    assert all(isfinite(loss) for loss in (first, second))
