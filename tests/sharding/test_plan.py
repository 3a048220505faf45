from __future__ import annotations

from math import prod
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_symopt import SymOpt, SymOptConfig
from lit_symopt.config import RoleConfig
from lit_symopt.groups import layout_of
from lit_symopt.layout import Layout
from lit_symopt.sharding.holdings import Placement
from lit_symopt.sharding.plan import OPTIONS, Block, Cell, Plan, Route, make_plan
from tests.sharding.cuts import LAYOUTS, block, contiguous, equal_shards, options, row_shards

SPECTRAL, ROW = options("spectral"), options("row_norm", row_damping=0.1)
CENTERED = options("row_norm", centered=True)


def one_cell(plan: Plan) -> tuple[Route, Cell]:
    (one,) = plan.rounds
    (cell,) = one.cells
    return one.route, cell


# -- every route does the whole work, once ------------------------------------------------------------------------


def elements(pieces: Any) -> list[int]:
    return sorted(element for piece in pieces for element in range(piece.start, piece.stop))


@given(seed=st.integers(0, 10**6), world=st.integers(1, 5), kind=st.sampled_from(["flat", "equal", "rows", "copies"]))
def test_every_element_is_computed_and_every_holder_gets_what_it_holds(seed: int, world: int, kind: str) -> None:
    random, blocks = Random(seed), []
    for name, (layout, shape) in LAYOUTS.items():
        for number, chosen in enumerate((SPECTRAL, ROW, CENTERED, options("sgd"), options("spectral", centered=True))):
            numel = prod(shape)
            held = {
                "flat": contiguous(numel, world, random),
                "equal": equal_shards(numel, world),
                "rows": row_shards(shape, world),
                "copies": ((0, numel),) * world,
            }[kind]
            blocks.append(block(f"{name}.{number}", layout, shape, held, chosen))
    plan = make_plan(blocks, world=world)
    seen: dict[str, list[int]] = {}
    for one in plan.rounds:
        for cell in one.cells:
            seen.setdefault(cell.block, []).extend(range(cell.start, cell.start + cell.numel))
            if one.route is Route.OWNER:
                own = [stretch for stretch in cell.held if stretch.rank == cell.owner]
                assert elements([*own, *cell.lent()]) == list(range(cell.numel))
                given_back = {(piece.target, piece.start, piece.stop) for piece in cell.returned()}
                assert given_back == {(s.rank, s.start, s.stop) for s in cell.held if s.rank != cell.owner}
            elif one.route is Route.LOCAL and (one.named_options()["rule"] != "sgd" or one.options[1]):
                assert all(len(stretch) == cell.numel for stretch in cell.held)
            elif one.route in (Route.ROWS, Route.GRAM):
                n = cell.shape[-1] if len(cell.shape) > 1 else 1
                rows = [row for first, last in cell.rows for row in range(first, last)]
                assert sorted(rows) == list(range(cell.numel // n))
                for rank, (first, last) in enumerate(cell.rows):
                    own = [s for s in cell.held if s.rank == rank]
                    lent = [f for f in cell.fragments if f.target == rank]
                    away = elements([f for f in cell.fragments if f.source == rank])
                    here = sorted(set(elements([*own, *lent])) - set(away))
                    assert here == list(range(first * n, last * n))
    for one_block in blocks:
        assert sorted(seen[one_block.placement.name]) == list(range(one_block.placement.numel))


def test_all_ranks_make_the_same_plan_and_one_rank_moves_nothing() -> None:
    blocks = [block(name, layout, shape, ((0, prod(shape)),), SPECTRAL) for name, (layout, shape) in LAYOUTS.items()]
    assert make_plan(blocks, world=1) == make_plan(blocks, world=1)
    assert sum(sum(by_rank) for by_rank in make_plan(blocks, world=1).sent().values()) == 0


# -- what symmetry saves ------------------------------------------------------------------------------------------


def vocabulary(chosen: tuple[Any, ...], held: Any) -> Plan:
    return make_plan([block("embedding", Layout.matrix(), (101, 16), held, chosen)], world=4)


@pytest.mark.parametrize("chosen", [options("row_norm"), ROW])
def test_a_row_rule_on_whole_rows_moves_nothing_but_the_scalar_of_its_damping(chosen: tuple[Any, ...]) -> None:
    plan = vocabulary(chosen, row_shards((101, 16), 4))
    route, cell = one_cell(plan)
    assert route is Route.ROWS
    assert cell.fragments == ()
    scalar = 8 * 2 * 3 / 4 if chosen == ROW else 0  # one float64 around a ring of four
    assert plan.sent() == {"linear": [scalar] * 4}


@pytest.mark.parametrize("chosen", [options("row_norm"), ROW])
@pytest.mark.parametrize("held", [equal_shards(101 * 16, 4), contiguous(101 * 16, 4, Random(3))])
def test_a_row_cut_by_a_boundary_costs_at_most_one_row(chosen: tuple[Any, ...], held: Any) -> None:
    plan = vocabulary(chosen, held)
    route, cell = one_cell(plan)
    assert route is Route.ROWS
    assert cell.fragments
    assert all(2 * (piece.stop - piece.start) <= 16 for piece in cell.fragments)  # there and back: one row
    row = 16 * 4
    assert sum(plan.sent()["linear"]) <= 3 * row + 4 * 12  # of three boundaries, and the damping's scalar


def test_centering_moves_one_row_of_float64_for_each_of_its_two_projections() -> None:
    plan = vocabulary(CENTERED, row_shards((101, 16), 4))
    assert plan.rounds[0].reduced_bytes() == 2 * 16 * 8
    assert plan.sent() == {"linear": [2 * 16 * 8 * 2 * 3 / 4] * 4}


def test_a_polar_factor_of_many_rows_moves_its_gram_matrix_and_of_few_rows_the_matrix() -> None:
    def route(rows: int, precision: str) -> Route:
        shape = (rows, 16)
        chosen = options("right_spectral", precision=precision)
        plan = make_plan([block("w", Layout.matrix(), shape, row_shards(shape, 2), chosen)], world=2)
        return one_cell(plan)[0]

    assert route(2000, "fp32") is Route.GRAM
    assert route(20, "fp32") is Route.OWNER  # half of 20 rows there and back is less than a Gram matrix in float64
    assert route(2000, "exact") is Route.OWNER  # whose singular values no Gram matrix has
    assert route(2000, "bf16") is Route.OWNER


def test_the_cheaper_of_gram_matrix_and_matrix_is_chosen() -> None:
    for rows in range(16, 200, 7):
        shape = (rows, 16)
        held = row_shards(shape, 2)
        plan = make_plan([block("w", Layout.matrix(), shape, held, options("spectral"))], world=2)
        gram = 2 * 8 * (16 * 17 // 2)
        largest = max(stop - start for start, stop in held)
        matrix = 2 * (prod(shape) - largest) * 4
        assert sum(plan.sent()["linear"]) == min(gram, matrix), rows


def test_heads_and_experts_that_lie_on_one_rank_stay_there() -> None:
    heads = block("q", Layout.heads(4), (32, 8), row_shards((32, 8), 2), SPECTRAL)
    shape = (6, 10, 4)
    experts = block("e", Layout.experts(Layout.gate_up("stacked")), shape, row_shards(shape, 3), SPECTRAL)
    for one, world in ((heads, 2), (experts, 3)):
        plan = make_plan([one], world=world)
        assert {r.route for r in plan.rounds} == {Route.LOCAL}
        assert plan.sent() == {"linear": [0] * world}


def test_ranks_that_did_nothing_in_one_call_come_first_in_the_next() -> None:
    def call(name: str, carried: list[int] | None) -> Plan:
        shape = (16, 16)
        blocks = [
            block(f"{name}.{n}", Layout.matrix(), shape, equal_shards(256, 4), options("spectral", precision="exact"))
            for n in range(2)
        ]
        return make_plan(blocks, world=4, carried=carried)

    first = call("gate", None)
    second = call("down", first.work())
    assert sorted(first.work()) == [0, 0, 16**3, 16**3]
    assert [a + b for a, b in zip(first.work(), second.work(), strict=True)] == [16**3] * 4


def test_copies_share_a_polar_factor_where_sending_it_costs_less_than_computing_it() -> None:
    def route(side: int, chosen: tuple[Any, ...], device_type: str) -> Route:
        shape = (2 * side, side)
        copies = [block("w", Layout.matrix(), shape, ((0, 2 * side * side),) * 2, chosen)]
        return one_cell(make_plan(copies, world=2, device_type=device_type))[0]

    assert route(64, SPECTRAL, "cuda") is Route.LOCAL  # five products in bfloat16
    assert route(1024, SPECTRAL, "cuda") is Route.OWNER
    assert route(64, options("spectral", precision="fp32"), "cuda") is Route.OWNER  # a decomposition in float64
    assert route(64, SPECTRAL, "cpu") is Route.OWNER
    assert route(1024, ROW, "cuda") is Route.LOCAL


def test_what_stays_of_a_plan_without_local_blocks_is_what_it_was() -> None:
    copies = [block(f"w{n}", Layout.matrix(), (32, 8), ((0, 256),) * 2, SPECTRAL) for n in range(3)]
    rows = [block(f"e{n}", Layout.matrix(), (64, 8), ((0, 512),) * 2, ROW) for n in range(2)]
    whole = make_plan([rows[0], *copies, rows[1]], world=2)
    rest = whole.without({"e0", "e1"})
    assert [one for one in whole.rounds if one.route is not Route.LOCAL] == list(rest.rounds)
    assert sum(rest.sent()["linear"]) == sum(whole.sent()["linear"]) > 0
    (local,) = [one for one in whole.without({"e0"}).rounds if one.route is Route.LOCAL]
    assert [cell.block for cell in local.cells] == ["e1"]


# -- the models of the paper --------------------------------------------------------------------------------------


def blocks_of(family: str, world: int, strategy: str, **roles: RoleConfig) -> tuple[list[Block], int]:
    import torch

    from lit_symopt import models

    with torch.device("meta"):
        module = getattr(models, family)()
    optimizer = SymOpt.for_module(module, module.block_taxonomy(), config=SymOptConfig(roles=roles))
    blocks = []
    for group in optimizer.param_groups:
        numels = [prod(shape) for shape in group["shapes"]]
        size, begin = -(-sum(numels) // world), 0
        for name, listed, numel in zip(group["param_names"], group["shapes"], numels, strict=True):
            shape = tuple(listed)
            held = {
                "ddp": ((0, numel),) * world,
                "zero2": tuple(
                    (min(max(r * size - begin, 0), numel), min(max((r + 1) * size - begin, 0), numel))
                    for r in range(world)
                ),
                "zero3": equal_shards(numel, world),
                "fsdp2": row_shards(shape, world),
            }[strategy]
            begin += numel
            if group["rule"] != "adamw" or group["centered"]:
                placement = Placement(name=name, shape=shape, held=held)
                chosen = tuple(group[key] for key in OPTIONS)
                blocks.append(
                    Block(placement=placement, role=group["role"], layout=layout_of(group, shape), options=chosen)
                )
    return blocks, sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("family", ["Qwen3", "OLMoE"])
@pytest.mark.parametrize("world", [2, 8])
def test_copies_share_evenly_what_no_block_has_most_of(family: str, world: int) -> None:
    blocks, _ = blocks_of(family, world, "ddp", lm_head=RoleConfig(rule="row_norm"))
    work = make_plan(blocks, world=world).work()
    assert max(work) <= 1.1 * sum(work) / world


def largest_polar_factor(block: Block) -> int:
    if block.options[OPTIONS.index("rule")] == "row_norm":
        return 0
    return max(part.m * part.n * min(part.m, part.n) for part in block.layout.parts(block.placement.shape))


@pytest.mark.parametrize("family", ["Qwen3", "OLMoE"])
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("world", [2, 8])
def test_traffic_and_balance_on_the_shapes_of_the_paper(family: str, strategy: str, world: int) -> None:
    blocks, parameters = blocks_of(family, world, strategy)
    plan = make_plan(blocks, world=world)
    sent = plan.sent()
    busiest = max(sum(by_rank[rank] for by_rank in sent.values()) for rank in range(world))
    limit = {"zero2": 0.2, "zero3": 2.0, "fsdp2": 2.0, "ddp": 4 * world}[strategy]  # in bytes of P/W in fp32
    assert busiest <= limit * 4 * parameters / world
    busiest_work, *others = sorted(plan.work(), reverse=True)
    if strategy == "ddp" and family == "Qwen3" and world == 8:
        # One rank computes the polar factor of the head, more than an even share: nothing else, and the others share.
        assert busiest_work <= 1.01 * max(largest_polar_factor(block) for block in blocks)
        assert max(others) <= 1.1 * sum(others) / len(others)
    else:
        assert busiest_work <= 1.1 * sum(plan.work()) / world
    if strategy != "ddp":  # rows stay where they are; a boundary may cut one, and damping is a scalar
        width = blocks[0].placement.shape[-1]
        assert max(sent["embedding"]) <= 4 * width + 64
    if family == "OLMoE" and strategy != "ddp":
        assert max(sent["expert_gate_up"]) <= 8 * 1024 * 2048 * 4  # experts are whole on their ranks
