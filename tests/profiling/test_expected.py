"""Expected work. Oracles: torch's counter of a step's products, sums by hand, and the sum over the ranks of a plan.

The counter sees no decomposition and nothing that is done element by element: neither is checked against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lit_symopt import SymOpt, SymOptConfig
from lit_symopt.config import RoleConfig
from lit_symopt.profiling.expected import Kind, expected_operations, expected_work, planned_operations
from lit_symopt.profiling.memory import memory_use
from lit_symopt.profiling.operations import Operations, rule_operations
from lit_symopt.profiling.run import MemoryUse, Work
from lit_symopt.sharding.plan import Route, make_plan
from tests.models.tiny import FAMILIES, tiny
from tests.sharding.cuts import LAYOUTS, block, contiguous, equal_shards, options, row_shards
from tests.sharding.processes import Ranks

# -- one device -----------------------------------------------------------------------------------------------------


def with_gradients(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def products(optimizer: SymOpt) -> float:
    return sum(done.products for done in expected_operations(optimizer).values())


def counted(optimizer: SymOpt) -> int:
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["auto", "bf16", "exact"])
@pytest.mark.parametrize("stack", ["symmetric", "muon"])
def test_the_products_of_a_step_are_those_that_torch_counts(family: str, precision: Any, stack: Any) -> None:
    model = with_gradients(tiny(family))
    optimizer = SymOpt.for_module(model, config=SymOptConfig(stack=stack, precision=precision))
    assert products(optimizer) == counted(optimizer) > 0


@pytest.mark.parametrize("rule", ["spectral", "left_spectral", "row_then_spectral", "spectral_then_row", "row_norm"])
def test_every_matrix_rule_may_be_given_to_every_hidden_role(rule: str) -> None:
    model = with_gradients(tiny("olmoe"))
    roles = {role: RoleConfig(rule=rule) for role in ("query", "key", "value", "router", "embedding")}
    optimizer = SymOpt.for_module(model, config=SymOptConfig(roles=roles))
    assert products(optimizer) == counted(optimizer)
    assert {one.rule for one in expected_work(optimizer) if one.role in roles} == {rule}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_element_of_a_model_is_expected_once(family: str) -> None:
    model = tiny(family)
    work = expected_work(SymOpt.for_module(model))
    assert sum(one.elements for one in work) == sum(parameter.numel() for parameter in model.parameters())
    assert sum(one.blocks for one in work) == len(list(model.parameters()))
    assert all(one.bytes == 4 * (7 if one.rule == "adamw" else 5) * one.elements for one in work)  # two states or one


@pytest.mark.parametrize(
    ("rule", "options", "numbers"),
    [
        ("sgd", {"momentum": 0.0}, (2, 2, 8, 0)),  # gradient; half parameter; master read and written; no state
        ("sgd", {"momentum": 0.9}, (2, 2, 8, 8)),
        ("sgd", {"momentum": 0.9, "momentum_kind": "nesterov"}, (2, 2, 8, 8)),
        ("adamw", {}, (2, 2, 8, 16)),
        ("sgd", {"momentum": 0.9, "master_weights": False}, (2, 4, 0, 8)),
    ],
)
def test_half_precision_reads_its_gradient_and_writes_its_parameter_in_two_bytes(
    rule: str, options: dict[str, Any], numbers: tuple[int, ...]
) -> None:
    weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.bfloat16))
    optimizer = SymOpt([("w", weight)], rule=rule, **options)
    (work,) = expected_work(optimizer)
    assert work.bytes == 24 * sum(numbers)
    assert work.dtype == "float32"
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    state = sum(value.nbytes for value in optimizer.state[weight].values() if value.numel() > 1)
    assert 2 * state == 24 * sum(numbers[2:])  # each that is there is read and written


def test_float64_takes_eight_bytes_a_number_and_frozen_or_empty_parameters_nothing() -> None:
    double = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    frozen = nn.Parameter(torch.zeros(5, 5), requires_grad=False)
    empty = nn.Parameter(torch.zeros(0, 4))
    (work,) = expected_work(SymOpt([("w", double), ("frozen", frozen), ("empty", empty)], rule="spectral"))
    assert (work.bytes, work.dtype, work.blocks, work.elements) == (8 * 5 * 24, "float64", 1, 24)
    assert expected_work(SymOpt([("empty", empty)], rule="spectral")) == ()


def test_roles_are_named_as_the_ranges_of_a_trace_name_them() -> None:
    weight = nn.Parameter(torch.zeros(6, 4))
    (work,) = expected_work(SymOpt([("w", weight)], rule="spectral", role="gate/up+down"))
    assert work.role == "gate_up_down"


# -- plans ----------------------------------------------------------------------------------------------------------


def planned(kind: str, world: int, rule: str, **others: Any) -> tuple[Any, list[dict[Kind, Operations]]]:
    """A plan of many blocks, and what each rank computes of it."""
    random, blocks = Random(world), []
    for name, (layout, shape) in LAYOUTS.items():
        numel = prod(shape)
        held = {
            "flat": contiguous(numel, world, random),
            "equal": equal_shards(numel, world),
            "rows": row_shards(shape, world),
            "copies": ((0, numel),) * world,
        }[kind]
        blocks.append(replace(block(name, layout, shape, held, options(rule, **others)), role=name.replace(" ", "-")))
    plan = make_plan(blocks, world=world)
    return plan, [planned_operations(plan, rank=rank, device_type="cpu") for rank in range(world)]


def alone(rule: str, **others: Any) -> dict[str, Operations]:
    found = {}
    for name, (layout, shape) in LAYOUTS.items():
        chosen = {"rule": rule, "centered": False, "scale": "none", "precision": "auto", **others}
        done = Operations()
        for part in layout.parts(shape):
            done += rule_operations(
                chosen, m=part.m, n=part.n, count=part.count, dtype=torch.float32, device_type="cpu"
            )
        found[name.replace(" ", "-")] = done
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("kind", ["flat", "equal", "rows", "copies"])
@pytest.mark.parametrize("rule", ["spectral", "row_norm", "row_then_spectral", "sign", "adamw"])
@pytest.mark.parametrize("centered", [False, True])
def test_ranks_together_do_the_work_of_one_device(world: int, kind: str, rule: str, centered: bool) -> None:
    plan, ranks = planned(kind, world, rule, centered=centered)
    copies_on_all = (
        {cell.role for one in plan.rounds for cell in one.cells if one.route is Route.LOCAL and len(cell.held) > 1}
        if kind == "copies"
        else set()
    )
    shared_root = {cell.role for one in plan.rounds for cell in one.cells if one.route is Route.GRAM}
    for role, single in alone(rule, centered=centered).items():
        every = [done for rank in ranks for (name, _, _), done in rank.items() if name == role]
        together = sum(every, Operations())
        assert together.elementwise == pytest.approx(single.elementwise * (world if role in copies_on_all else 1))
        if role in shared_root:
            # Gram matrix and product are shared out by rows; the n x n root is computed by all.
            ((layout, shape),) = [LAYOUTS[name] for name in LAYOUTS if name.replace(" ", "-") == role]
            n = layout.parts(shape)[0].n
            assert together.products == single.products + (world - 1) * 2 * n**3
            assert together.decompositions == pytest.approx(world * single.decompositions)
        else:
            times = world if role in copies_on_all else 1
            assert together.products == pytest.approx(times * single.products)
            assert together.decompositions == pytest.approx(times * single.decompositions)


def test_work_is_spread_over_the_ranks() -> None:
    _, ranks = planned("copies", 4, "spectral")
    totals = [sum(done.total for done in rank.values()) for rank in ranks]
    assert min(totals) > 0
    assert max(totals) < 0.5 * sum(totals)


# -- real processes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def work_on_a_rank(kind: str) -> tuple[list[Work], int]:
    """Expected work, whose products are those that torch counts in a step, and the bytes of state after it."""
    model = tiny("qwen3")
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = SymOpt.for_module(model)
    if kind == "ddp":
        optimizer.attach(dist.group.WORLD)
    work, expected = expected_work(optimizer), products(optimizer)
    with_gradients(model)
    assert counted(optimizer) == expected
    state = 0
    for values in optimizer.state.values():
        for value in values.values():
            local = getattr(value, "to_local", lambda value=value: value)()
            state += local.nbytes if value.ndim else 0
    return list(work), state


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_expect_what_they_hold_and_compute(two: Ranks, kind: str) -> None:
    single = {(one.role, one.rule): one for one in expected_work(SymOpt.for_module(tiny("qwen3")))}
    results = two(work_on_a_rank, kind)
    for (role, rule), one in single.items():
        both = [each for work, _ in results for each in work if (each.role, each.rule) == (role, rule)]
        times = 2 if kind == "ddp" else 1
        assert sum(each.elements for each in both) == times * one.elements
        assert sum(each.bytes for each in both) == times * one.bytes
        assert {each.dtype for each in both} == {one.dtype}
    for work, state in results:
        # Of the bytes, state is 2 of 5 numbers, and of AdamW's 4 of 7: half of that is held.
        expected = sum(each.bytes * (2 / 7 if each.rule == "adamw" else 1 / 5) for each in work)
        assert state == pytest.approx(expected)
    total = sum(one.flops for one in single.values())
    together = sum(each.flops for work, _ in results for each in work)
    assert total <= together < 2 * total


def work_on_a_zero_rank(mode: str) -> tuple[list[Work], MemoryUse]:
    from tests.sharding.zero_engines import engine_of, micro_batch

    engine, optimizer = engine_of(mode)
    optimizer.attach(engine)
    work = expected_work(optimizer)
    engine.backward(engine(micro_batch(dist.get_rank(), 0)))
    engine.step()
    return list(work), memory_use(optimizer, engine.module, rank=dist.get_rank())


@pytest.mark.deepspeed
@pytest.mark.parametrize("mode", ["zero2", "zero3_bf16"])
def test_of_flat_partitions_each_process_expects_what_lies_in_its_own(two: Ranks, mode: str) -> None:
    from tests.sharding.zero_engines import model_of

    whole = sum(parameter.numel() for parameter in model_of(mode).parameters() if parameter.requires_grad)
    results = two(work_on_a_zero_rank, mode)
    assert sum(one.elements for work, _ in results for one in work) == whole
    for work, use in results:
        numbers = {one.rule: one.elements for one in work}
        assert [one.bytes for one in work] == [4 * {"row_norm": 5, "adamw": 7}[one.rule] * one.elements for one in work]
        # The fp32 partitions, padded by at most an element a parameter, and momentum or both averages and a counter.
        assert 0 <= use.masters - 4 * sum(numbers.values()) <= 4 * 8
        assert 0 <= use.state["linear"] - 4 * (numbers["row_norm"] + 2 * numbers["adamw"]) <= 8 * (8 + 2)
