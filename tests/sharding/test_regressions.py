"""What users of DeepSpeed's own matrix optimizer reported, each by its number there; none of it may happen here.

Real engines on two processes. Oracle: the definition of the rules in float64 (`small_network.trained`), on the mean
gradient of all micro-batches, and the singular values of what the weights have moved by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.sharding.processes import Ranks
from tests.sharding.small_engines import (
    ACCUMULATED,
    BF16,
    BF16_OPTIMIZER,
    FP16,
    OFFLOAD,
    Changes,
    everything_held,
    fp16_on_cpu,
    poison,
    started,
    step,
    straddling,
    whole_weights,
)
from tests.sharding.small_network import (
    RATES,
    RULES,
    Network,
    assert_change_is,
    assert_directions_are_unit,
    errors,
    groups_of,
    initial_weights,
    micro_batch,
    network,
    polar,
    trained,
    unit_rows,
)

pytestmark = pytest.mark.deepspeed

Weights = dict[str, Tensor]

# What half precision leaves of the direction of an update: the gradients have 8 or 11 bits, and a polar factor makes
# the rounding of a weak direction as large as its share of the momentum.
HALF = 0.05


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2) as started_ranks:
        yield started_ranks


def train(stage: int, changes: Changes, steps: int = 3, **options: Any) -> dict[str, Any]:
    """Weights after the first step and after the last, and what was attached."""
    with fp16_on_cpu(), started(stage, changes, **options) as (engine, optimizer):
        step(engine, range(1))
        first = whole_weights(engine)
        step(engine, range(1, steps))
        return {
            "first": first,
            "last": whole_weights(engine),
            "strategy": optimizer.distribution and optimizer.distribution.strategy,
            "straddling": straddling(optimizer) if optimizer.distribution else set(),
            "wrapper": type(engine.optimizer).__name__,
        }


def assert_on_all(found: list[dict[str, Any]], expected: Mapping[str, Tensor], tolerance: float = 1e-4) -> None:
    """Every rank has the expected weights, and all of them the same, bitwise."""
    for one in found:
        assert_change_is(one["last"], expected, tolerance)
        assert all(torch.equal(one["last"][name], weight) for name, weight in found[0]["last"].items())


# -- the comparison itself ---------------------------------------------------------------------------------------


def by_halves(rule: Any) -> Any:
    """A rule applied to each half of a flattened matrix, as a partition that knows no matrix would."""

    def halved(matrix: Tensor) -> Tensor:
        cut = matrix.shape[-2] // 2
        return torch.cat([rule(matrix[..., :cut, :]), rule(matrix[..., cut:, :])], dim=-2)

    return halved


@pytest.mark.parametrize(
    ("mistake", "seen_in"),
    [
        ({"rules": dict.fromkeys(RULES, lambda momentum: momentum)}, [*RULES]),  # the momentum itself
        ({"rules": dict.fromkeys(RULES, torch.zeros_like)}, [*RULES]),
        ({"rules": dict.fromkeys(RULES, torch.sign)}, [*RULES]),
        ({"each_micro_batch": True}, [*RULES]),
        ({"micro_batches": 1}, [*RULES]),  # what the other rank has seen is lost
        ({"rules": {name: by_halves(polar) for name in RULES}}, [*RULES]),
        ({"rules": dict.fromkeys(RULES, unit_rows)}, ["mix.weight", "head.weight", "experts"]),
        ({"rates": lambda _, group: RATES["spectral"]}, ["experts", "embed.weight", "mix.bias"]),
    ],
    ids=["sgd", "zero", "sign", "micro batches", "one rank", "halves", "rows", "rates"],
)
def test_the_oracle_sees_what_was_reported(mistake: dict[str, Any], seen_in: list[str]) -> None:
    off = errors(trained(3, **mistake), trained(3))
    for name in seen_in:
        assert off[name] > 2 * HALF, name  # far beyond every tolerance below


# -- the reports -------------------------------------------------------------------------------------------------


def train_under_zero_init() -> dict[str, Any]:
    with started(3, {}, init=True) as (engine, optimizer):
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        assert optimizer.distribution is not None
        placed = {
            placement.name: placement.shape
            for holding in optimizer.distribution.holdings
            for placement in holding.placements
        }
        step(engine, range(3))
        return {"last": whole_weights(engine), "groups": groups, "placed": placed}


def test_issue_8438_zero_init_routes_every_parameter(ranks: Ranks) -> None:
    from lit_symopt import SymOpt

    plain = SymOpt(groups_of(network())).param_groups
    found = ranks(train_under_zero_init)
    assert_on_all(found, trained(3))
    for one in found:
        assert one["placed"] == {name: tuple(weight.shape) for name, weight in initial_weights().items()}
        assert one["groups"] == [{key: value for key, value in group.items() if key != "params"} for group in plain]


@pytest.mark.parametrize("attach", [True, False], ids=["attached", "left alone"])
def test_issue_8442_stage_0_applies_the_rules(ranks: Ranks, attach: bool) -> None:
    found = ranks(train, 0, {}, attach=attach)
    assert_on_all(found, trained(3))
    assert found[0]["strategy"] == ("DeepSpeed stage 0" if attach else None)


def test_issue_8442_stage_0_in_half_precision_applies_the_rules(ranks: Ranks) -> None:
    # DeepSpeed has taken a step on zero gradients by then, which must not count.
    found = ranks(train, 0, BF16, groups={"vectors": {"weight_decay": 100.0}}, steps=1)
    assert {one["wrapper"] for one in found} == {"FP16_UnfusedOptimizer"}
    for one in found:
        assert_directions_are_unit(one["last"])
        expected = trained(1)
        expected["mix.bias"] -= RATES["vectors"] * 100.0 * initial_weights()["mix.bias"]
        assert_change_is(one["last"], expected, HALF)
        assert errors(one["last"], expected)["mix.bias"] < 1e-3


@pytest.mark.parametrize(
    ("stage", "changes", "tolerance"),
    [(0, {}, 1e-4), (1, {}, 1e-4), (2, {}, 1e-4), (3, {}, 1e-4), (2, OFFLOAD, 1e-4), (1, BF16_OPTIMIZER, HALF)],
    ids=["stage 0", "zero 1", "zero 2", "zero 3", "zero 2 offloaded", "BF16_Optimizer"],
)
def test_issue_8443_accumulated_micro_batches_make_one_update(
    ranks: Ranks, stage: int, changes: Changes, tolerance: float
) -> None:
    assert_on_all(ranks(train, stage, {**changes, **ACCUMULATED}), trained(3, micro_batches=4), tolerance)


def clipped_to_one(gradients: Weights) -> Weights:
    """As DeepSpeed clips: with 1e-6 in the denominator."""
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return {name: gradient / max(float(norm) + 1e-6, 1.0) for name, gradient in gradients.items()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_issue_8439_default_clipping_does_not_shrink_the_step(ranks: Ranks, stage: int) -> None:
    # A loss a hundred times too loud: DeepSpeed's default clips the gradient to a fiftieth.
    found = ranks(train, stage, {"gradient_clipping": None}, loudness=100.0)
    assert_on_all(found, trained(3, loudness=100.0, change=clipped_to_one))
    for one in found:
        assert_directions_are_unit(one["first"])
        # Later on the momentum is another mean of the same gradients, in which loud batches weigh less.
        assert_change_is(one["last"], trained(3), 0.03)


def nuclear(momentum: Tensor) -> Tensor:
    """⟨M, U⟩ U, of each matrix."""
    update = polar(momentum)
    return update * (momentum * update).sum(dim=(-2, -1), keepdim=True)


def train_clipped(stage: int, clipping: float | None) -> dict[str, Any]:
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = train(
            stage,
            {"gradient_clipping": clipping},
            loudness=100.0,
            groups={"spectral": {"scale": "nuclear", "alpha": 1.0}},
        )
    return {**found, "warned": [str(one.message) for one in caught if "nuclear" in str(one.message)]}


@pytest.mark.parametrize("stage", [1, 3])
def test_issue_8439_a_nuclear_scale_is_that_of_the_clipped_gradient_and_says_so(ranks: Ranks, stage: int) -> None:
    rules = {**RULES, "mix.weight": nuclear, "head.weight": nuclear}
    clipped, unclipped = (
        trained(3, rules=rules, loudness=100.0, change=clipped_to_one),
        trained(3, rules=rules, loudness=100.0),
    )
    assert errors(clipped, unclipped)["mix.weight"] > 0.5
    for setting, expected in ((None, clipped), (1.0, clipped), (0.0, unclipped)):
        found = ranks(train_clipped, stage, setting)
        assert_on_all(found, expected, 1e-3)
        for one in found:
            if setting is None:
                (warned,) = one["warned"]
                assert "DeepSpeed clips gradients to a norm of 1 unless" in warned
                assert all(part in warned for part in ("'nuclear'", "(spectral)", "set gradient_clipping"))
            else:  # asked for
                assert one["warned"] == []


def overflow(stage: int, changes: Changes) -> dict[str, Any]:
    """Start with too large a loss scale, go on with one infinite gradient on one rank, and finish three steps."""
    with fp16_on_cpu(), started(stage, {**changes, "fp16.initial_scale_power": 20}) as (engine, optimizer):
        calls: list[int] = []
        optimizer.register_step_pre_hook(lambda *_: calls.append(1))
        before, scales = everything_held(optimizer), [engine.optimizer.cur_scale]
        while not calls and engine.skipped_steps < 10:
            untouched = everything_held(optimizer)
            assert all(torch.equal(untouched[key], value) for key, value in before.items())
            step(engine, range(1))
            scales.append(engine.optimizer.cur_scale)
        first, in_a_step, skipped = whole_weights(engine), len(calls), engine.skipped_steps
        switch = poison(engine.module, "mix.weight", torch.inf)
        before, switch["on"] = everything_held(optimizer), dist.get_rank() == 1
        step(engine, [1])
        switch["on"] = False
        after = everything_held(optimizer)
        kept = all(torch.equal(after[key], value) for key, value in before.items())
        called, more = len(calls), engine.skipped_steps
        step(engine, range(1, 3))
        return {
            "scales": scales,
            "first": first,
            "last": whole_weights(engine),
            "kept": kept,
            "skipped": (skipped, more),
            "calls": (in_a_step, called, len(calls)),
        }


@pytest.mark.parametrize(
    ("stage", "changes"),
    [(1, FP16), (2, FP16), (3, FP16), (2, {**FP16, **OFFLOAD})],
    ids=["zero 1", "zero 2", "zero 3", "zero 2 offloaded"],
)
def test_issue_8432_an_fp16_overflow_leaves_the_momentum_alone(ranks: Ranks, stage: int, changes: Changes) -> None:
    found = ranks(overflow, stage, changes)
    assert_on_all(found, trained(3), HALF)
    for one in found:
        skipped, more = one["skipped"]
        assert skipped >= 2  # the loss scale was too large
        assert more == skipped + 1  # the infinite gradient
        assert one["scales"][0] == 2.0**20
        assert one["scales"][-1] < one["scales"][0]
        assert one["kept"]
        once, still, thrice = one["calls"]  # of the optimizer's step: as many as partitions, in each good step
        assert still == once
        assert thrice == 3 * once
        assert_directions_are_unit(one["first"])


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {"reduce_scatter": True},
        {"reduce_scatter": False},
        {"reduce_scatter": True, "contiguous_gradients": False},
        {"reduce_scatter": True, "round_robin_gradients": True},
        {"reduce_scatter": True, "overlap_comm": True},
    ],
    ids=lambda changes: ", ".join(f"{key}={value}" for key, value in changes.items()),
)
def test_issue_7807_matrices_that_straddle_partitions_are_updated_whole(
    ranks: Ranks, stage: int, changes: dict[str, bool]
) -> None:
    found = ranks(train, stage, {f"zero_optimization.{key}": value for key, value in changes.items()})
    assert_on_all(found, trained(3))
    assert {"embed.weight", "experts"} < found[0]["straddling"]
    assert {"mix.weight", "head.weight"} & found[0]["straddling"]


@pytest.mark.parametrize(
    ("stage", "changes", "loudness"),
    [
        (1, {}, 1e-12),
        (1, BF16, 1e-12),
        (1, BF16_OPTIMIZER, 1e-12),
        (2, BF16, 1e-12),
        (3, BF16, 1e-12),
        (2, FP16, 1e-6),  # below that a gradient is nothing in float16, whoever looks at it
        (3, FP16, 1e-6),
    ],
)
def test_issue_8533_tiny_gradients_give_a_whole_update(
    ranks: Ranks, stage: int, changes: Changes, loudness: float
) -> None:
    for one in ranks(train, stage, changes, loudness=loudness, steps=1):
        assert_directions_are_unit(one["first"])
        off = errors(one["first"], trained(1))
        assert all(off[name] < HALF for name in RULES)


def groups_through_an_engine(stage: int, init: bool) -> tuple[list[dict[str, Any]], ...]:
    """Everything but the tensors of the groups: when they were given, after attaching and after two steps."""
    from lit_symopt import SymOpt

    def described(optimizer: SymOpt) -> list[dict[str, Any]]:
        return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]

    changes: dict[str, dict[str, Any]] = {
        "rows": {"row_damping": 0.1, "weight_decay": 0.2},
        "experts": {"role": "expert_down"},
    }
    given = described(SymOpt(groups_of(network(), **changes)))
    with started(stage, {}, init=init, groups=changes) as (engine, optimizer):
        attached = described(optimizer)
        step(engine, range(2))
        assert engine.basic_optimizer is optimizer
        return given, attached, described(optimizer)


@pytest.mark.parametrize(("stage", "init"), [(0, False), (1, False), (2, False), (3, False), (3, True)])
def test_issue_8440_the_callers_groups_survive(ranks: Ranks, stage: int, init: bool) -> None:
    for given, attached, stepped in ranks(groups_through_an_engine, stage, init):
        assert [group["name"] for group in given] == ["spectral", "experts", "rows", "vectors"]
        assert [group["lr"] for group in given] == list(RATES.values())
        assert attached == given  # in order, with every key
        assert stepped == given


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (1, {}),
        (2, {}),
        (2, {"zero_optimization.round_robin_gradients": True}),
        (3, {}),
        (3, {"zero_optimization.offload_param": {"device": "cpu"}, "zero_optimization.sub_group_size": 40}),
    ],
)
def test_issue_8464_offloading_to_the_cpu_keeps_the_rules(ranks: Ranks, stage: int, changes: Changes) -> None:
    assert_on_all(ranks(train, stage, {**changes, **OFFLOAD}), trained(3))


def resume(stage: int, changes: Changes, folder: str) -> dict[str, Any]:
    """Two steps, a checkpoint, a third step; and the third step again, from the checkpoint in a new engine."""
    with fp16_on_cpu():
        with started(stage, changes) as (engine, optimizer):
            step(engine, range(2))
            engine.save_checkpoint(folder, tag="two")
            saved = everything_held(optimizer)
            step(engine, [2])
            third = whole_weights(engine)
        with started(stage, changes) as (engine, optimizer):
            engine.load_checkpoint(folder, tag="two")
            loaded = everything_held(optimizer)
            step(engine, [2])
            return {"saved": saved, "loaded": loaded, "third": third, "last": whole_weights(engine)}


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (1, {}),
        (1, BF16),
        (1, BF16_OPTIMIZER),
        (2, BF16),
        (3, BF16),
        (2, FP16),
        (3, FP16),
        (2, {**BF16, **OFFLOAD}),
        (3, {**BF16, **OFFLOAD}),
    ],
)
def test_issues_8433_and_8483_state_stays_in_fp32_when_training_is_resumed(
    ranks: Ranks, stage: int, changes: Changes, tmp_path: Any
) -> None:
    for one in ranks(resume, stage, changes, str(tmp_path)):
        assert sum(key.endswith(".momentum_buffer") for key in one["saved"]) == 3
        for key, tensor in one["saved"].items():
            assert tensor.dtype == one["loaded"][key].dtype == torch.float32, key
            assert torch.equal(tensor, one["loaded"][key]), key
        for name, weight in one["third"].items():
            assert torch.equal(weight, one["last"][name]), name


def train_scheduled(stage: int, configured: bool) -> dict[str, Any]:
    """With torch's scheduler, or one from DeepSpeed's configuration."""
    if configured:
        warmup = {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_type": "linear"}}
        return train(stage, {"scheduler": warmup}, steps=5)
    return train(
        stage,
        {},
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 1.0 / (1 + number)),
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_issue_7713_a_scheduler_keeps_each_groups_own_rate(ranks: Ranks, stage: int) -> None:
    expected = trained(3, rates=lambda number, group: RATES[group] / (1 + number))
    assert_on_all(ranks(train_scheduled, stage, False), expected)


def test_issue_7713_deepspeeds_warmup_ends_at_each_groups_own_rate(ranks: Ranks) -> None:
    # Its rates lag by one step, and start at 0.
    expected = trained(5, rates=lambda number, group: RATES[group] * max(0, number - 1) / 4)
    assert_on_all(ranks(train_scheduled, 2, True), expected)


@pytest.mark.parametrize("changes", [{}, ACCUMULATED, {"gradient_clipping": 1e-3}])
def test_issue_8461_bf16_optimizer_applies_the_rules(ranks: Ranks, changes: Changes) -> None:
    found = ranks(train, 1, {**BF16_OPTIMIZER, **changes})
    assert {one["wrapper"] for one in found} == {"BF16_Optimizer"}
    assert {"embed.weight", "experts", "head.weight"} <= found[0]["straddling"]
    assert_on_all(found, trained(3, micro_batches=4 if changes == ACCUMULATED else 2), HALF)
    for one in found:
        assert_directions_are_unit(one["first"])


# -- more traps --------------------------------------------------------------------------------------------------


def train_tagged(stage: int) -> dict[str, Any]:
    """With the mark on parameters by which DeepSpeed's own optimizer knows its matrices."""
    module = network()
    for parameter in module.parameters():
        parameter.use_muon = parameter.dim() == 2  # type: ignore[attr-defined]
    return train(stage, {}, module=module)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_marks_of_deepspeeds_own_optimizer_on_parameters_mean_nothing(ranks: Ranks, stage: int) -> None:
    assert_on_all(ranks(train_tagged, stage), trained(3))


def states_through_deepspeed(stage: int, changes: Changes) -> dict[str, Tensor]:
    """The whole state of every parameter after a step, by DeepSpeed's own means."""
    from deepspeed.utils import safe_get_full_optimizer_state

    keys = {name: "exp_avg" if name == "mix.bias" else "momentum_buffer" for name in initial_weights()}
    with started(stage, changes) as (engine, _):
        step(engine, range(1))
        return {
            name: safe_get_full_optimizer_state(parameter, keys[name]).clone()
            for name, parameter in engine.module.named_parameters()
        }


@pytest.mark.parametrize(("stage", "changes"), [(1, {}), (2, OFFLOAD), (3, {}), (1, BF16_OPTIMIZER)])
def test_deepspeed_finds_the_state_of_every_group_after_the_first_step(
    ranks: Ranks, stage: int, changes: Changes
) -> None:
    module: Network = network()
    total: Weights = {}
    for index in range(2):
        for (name, parameter), gradient in zip(
            module.named_parameters(),
            torch.autograd.grad(module(micro_batch(0, index)), list(module.parameters())),
            strict=True,
        ):
            assert gradient.shape == parameter.shape
            total[name] = total.get(name, 0.0) + 0.1 * gradient / 2  # β is 0.9 everywhere
    rtol, atol = (HALF, 1e-4) if changes == BF16_OPTIMIZER else (1e-4, 1e-7)
    for found in ranks(states_through_deepspeed, stage, changes):
        for name, momentum in total.items():
            torch.testing.assert_close(found[name], momentum, rtol=rtol, atol=atol)
