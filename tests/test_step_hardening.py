"""What a step must survive: states, groups and dtypes that change under it, gradients stored in any order, flags."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_symopt import Layout, SymOpt
from lit_symopt.errors import ConfigError, GradientError
from lit_symopt.finite import FiniteCheck
from lit_symopt.rules import ema_
from tests.matrices import generator
from tests.sharding.processes import Ranks

RULES: dict[str, dict[str, Any]] = {
    "spectral": {"rule": "spectral"},
    "spectral in bfloat16": {"rule": "spectral", "precision": "bf16"},
    "row norm": {"rule": "row_norm", "scale": "rms"},
    "hybrid": {"rule": "row_then_spectral"},
    "sgd": {"rule": "sgd"},
    "sign": {"rule": "sign", "scale": "inverse_fan_in"},
    "adamw": {"rule": "adamw"},
    "centered adamw": {"rule": "adamw", "centered": True},
}
LAYOUTS: dict[str, tuple[Layout, tuple[int, ...]]] = {
    "matrix": (Layout.matrix(), (8, 6)),
    "transposed": (Layout.transposed(), (8, 6)),
    "heads by columns": (Layout.heads(2, dim="columns"), (8, 6)),
    "interleaved pairs": (Layout.gate_up("interleaved", pairs=True), (8, 6)),
    "experts stored in x out": (Layout.experts(Layout.gate_up("stacked", stored="in_out")), (3, 5, 8)),
    "query, key, value": (Layout.qkv(2, 1, 2, order="per_group", whole=True), (8, 6)),
    "split": (Layout.split((5, 3), inner=(Layout.matrix(), Layout.transposed())), (8, 6)),
}
STEPS = 4
BAD = 2


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def parameters(count: int, *shape: int) -> list[nn.Parameter]:
    return [nn.Parameter(random(*shape, seed=seed)) for seed in range(count)]


def fill(owners: list[nn.Parameter], seed: int) -> None:
    for number, parameter in enumerate(owners):
        parameter.grad = random(*parameter.shape, seed=100 * seed + number, dtype=parameter.dtype)


def everything(optimizer: SymOpt) -> list[Tensor]:
    """Copies of all weights and states."""
    owners = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = [value for parameter in owners for value in optimizer.state[parameter].values()]
    return [tensor.detach().clone() for tensor in (*owners, *states)]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


# ---- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("master", [True, False], ids=["master", "none"])
@pytest.mark.parametrize("rule", RULES)
def test_between_steps_nobody_holds_a_gradient(rule: str, master: bool, dtype: torch.dtype) -> None:
    parameter = nn.Parameter(random(8, 6, seed=0, dtype=dtype))
    optimizer = SymOpt([parameter], master_weights=master, **RULES[rule])
    for seed in range(2):
        fill([parameter], seed)
        gradient = weakref.ref(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        assert gradient() is None


def test_an_exception_in_a_step_leaves_no_gradient_held_either(monkeypatch: pytest.MonkeyPatch) -> None:
    (parameter,) = parameters(1, 8, 6)
    optimizer = SymOpt([parameter], rule="spectral")
    fill([parameter], 1)
    gradient = weakref.ref(parameter.grad)
    monkeypatch.setattr("lit_symopt.optim.update", _stopped)
    with pytest.raises(ValueError, match="stopped"):
        optimizer.step()
    optimizer.zero_grad()
    gc.collect()  # the exception has been to many frames
    assert gradient() is None


def _stopped(*_: Any, **__: Any) -> None:
    raise ValueError("stopped")


def test_an_optimizer_goes_with_its_last_name_and_takes_its_memory_along() -> None:
    (parameter,) = parameters(1, 80, 60)
    optimizer = SymOpt([parameter], rule="spectral", precision="bf16")
    for seed in range(3):
        fill([parameter], seed)
        optimizer.step()
    assert optimizer.kept_scratch(torch.device("cpu")) > 0
    gone = [weakref.ref(one) for one in (parameter, optimizer, optimizer._arena)]
    gc.collect()
    gc.disable()  # nor is there a cycle that waits for the collector
    try:
        del parameter, optimizer
        assert [one() for one in gone] == [None] * 3
    finally:
        gc.enable()


# ---- a refused step on a device that is not asked


@pytest.mark.parametrize("kind", ["ema", "nesterov", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stored", ["in order", "weights transposed", "gradients transposed"])
def test_a_step_that_is_refused_late_changes_nothing_and_the_next_one_is_as_if_it_had_not_been(
    rule: str, layout: str, kind: str, stored: str
) -> None:
    chosen, shape = LAYOUTS[layout]
    found = []
    for poisoned in (True, False):
        owners = parameters(3, *shape)
        if stored == "weights transposed":
            owners = [nn.Parameter(one.detach().mT.contiguous().mT) for one in owners]
        options = {**RULES[rule], "layout": chosen, "weight_decay": 0.1, "lr": 0.05}
        options |= {"momentum": 0.0} if kind == "none" else {"momentum": 0.9, "momentum_kind": kind}
        optimizer = SymOpt(owners, **options)
        optimizer._finite = FiniteCheck(defer=True)
        for seed in range(STEPS):
            fill(owners, seed)
            if seed == BAD:
                if not poisoned:
                    continue
                assert owners[1].grad is not None
                owners[1].grad.view(-1)[7] = torch.nan if kind == "ema" else torch.inf
            if stored == "gradients transposed":
                for one in owners:
                    assert one.grad is not None
                    one.grad = one.grad.mT.contiguous().mT
            before = everything(optimizer)
            optimizer.step()
            if seed == BAD:
                assert_same(before, everything(optimizer))
                with pytest.raises(GradientError, match=r"group0\[1\]"):
                    optimizer.check()
        found.append(everything(optimizer))
    assert_same(*found)


# ---- what changes between two steps


@pytest.mark.parametrize("rule", RULES)
def test_a_state_that_is_emptied_in_place_begins_anew(rule: str) -> None:
    (parameter,), (other,) = parameters(1, 8, 6), parameters(1, 8, 6)
    optimizer = SymOpt([parameter], **RULES[rule])
    fill([parameter], 1)
    optimizer.step()
    optimizer.state[parameter].clear()
    with torch.no_grad():
        parameter.copy_(other)
    fresh = SymOpt([other], **RULES[rule])
    for owner, one in ((parameter, optimizer), (other, fresh)):
        fill([owner], 2)
        one.step()
    assert_same(everything(optimizer), everything(fresh))


@pytest.mark.parametrize("rule", RULES)
def test_a_group_that_is_replaced_brings_its_rates(rule: str) -> None:
    (parameter,) = parameters(1, 8, 6)
    optimizer = SymOpt([parameter], lr=0.1, **RULES[rule])
    fill([parameter], 1)
    optimizer.step()
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.0}
    before = parameter.detach().clone()
    optimizer.step()
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("transposed", [False, True], ids=["in order", "transposed"])
def test_rates_that_become_tensors_are_each_groups_own(transposed: bool) -> None:
    owners = parameters(2, 8, 6)
    if transposed:
        owners = [nn.Parameter(one.detach().mT.contiguous().mT) for one in owners]
    optimizer = SymOpt([{"params": [one]} for one in owners], rule="spectral", lr=0.1)
    fill(owners, 1)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, (0.5, 0.0), strict=True):
        group["lr"] = torch.tensor(rate)
    before = [one.detach().clone() for one in owners]
    optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(owners, before, strict=True)] == [False, True]


@pytest.mark.parametrize("kind", ["ema", "nesterov"])
@pytest.mark.parametrize("rule", ["spectral", "row norm", "sgd", "hybrid"])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.bfloat16, torch.float64)], ids=str
)
@pytest.mark.parametrize("defer", [False, True], ids=["at once", "late"])
def test_a_model_may_be_moved_to_another_dtype_and_keeps_its_momentum(
    dtypes: tuple[torch.dtype, torch.dtype], rule: str, kind: str, defer: bool
) -> None:
    first, second = dtypes
    found = []
    for moved in (first, torch.float64):  # the second is the oracle
        # Numbers that all dtypes have
        owners = [nn.Parameter(random(8, 6, seed=seed, dtype=torch.bfloat16).to(moved)) for seed in range(2)]
        optimizer = SymOpt(owners, lr=0.05, momentum=0.5, momentum_kind=kind, **RULES[rule])
        optimizer._finite = FiniteCheck(defer=defer)
        for step, dtype in enumerate((moved, second if moved == first else torch.float64)):
            for number, one in enumerate(owners):
                one.grad = None
                one.data = one.data.to(dtype)
                one.grad = random(8, 6, seed=10 * step + number, dtype=torch.bfloat16).to(dtype)
            optimizer.step()
        optimizer.check()
        found.append([one.detach().double() for one in owners])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-2 if torch.bfloat16 in dtypes else 2e-6)


def test_momentum_of_two_dtypes_in_one_list_keeps_both() -> None:
    buffers = [torch.ones(3), torch.ones(3, dtype=torch.float64)]
    gradients = [torch.full((3,), 3.0, dtype=torch.float64)] * 2
    found = ema_(buffers, gradients, 0.5)
    assert [one.dtype for one in found] == [torch.float32, torch.float64]
    assert [one.tolist() for one in buffers] == [[2.0] * 3] * 2


def test_a_group_may_be_added_after_a_state_was_loaded() -> None:
    first, second = parameters(2, 8, 6)
    optimizer = SymOpt([first], rule="spectral", lr=0.1)
    fill([first, second], 1)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [second], "rule": "row_norm"})
    before = second.detach().clone()
    optimizer.step()
    assert not torch.equal(second, before)


# ---- numbers at the ends of their range


@pytest.mark.parametrize("radius", [0.0, 1e-42, 1e-30, 1e30])
def test_a_decay_does_not_depend_on_how_long_the_step_is(radius: float) -> None:
    (parameter,) = parameters(1, 8, 6)
    before = parameter.detach().clone()
    optimizer = SymOpt([parameter], rule="spectral", lr=0.5, weight_decay=0.5, radius=radius, momentum=0.0)
    fill([parameter], 1)
    optimizer.step()
    update = SymOpt([other := nn.Parameter(torch.zeros(8, 6))], rule="spectral", lr=1.0, momentum=0.0)
    other.grad = parameter.grad
    update.step()
    expected = 0.75 * before.double() + 0.5 * radius * other.detach().double()
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_a_bound_that_is_too_small_for_one_block_is_said_before_another_one_is_written() -> None:
    small, large = nn.Parameter(random(8, 6, seed=0)), nn.Parameter(random(300, 200, seed=1))
    optimizer = SymOpt([small, large], rule="spectral", scratch=0.1)
    fill([small, large], 1)
    before = [one.detach().clone() for one in (small, large)]
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"scratch=0\.1 MiB"):
            optimizer.step()
        assert_same(before, [one.detach() for one in (small, large)])


# ---- storage


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_may_share_a_gradient_and_it_is_not_written(rule: str, layout: str) -> None:
    chosen, shape = LAYOUTS[layout]
    owners, alone = parameters(3, *shape), parameters(3, *shape)
    gradient = random(*shape, seed=9)
    expanded = gradient[..., :1].expand(shape)
    found = []
    for group in (owners, alone):
        optimizer = SymOpt(group, layout=chosen, weight_decay=0.1, momentum=0.0, **RULES[rule])
        for given in (gradient, expanded):
            for one in group:
                one.grad = given if group is owners else given.clone(memory_format=torch.preserve_format)
            optimizer.step()
        found.append(everything(optimizer))
    assert torch.equal(gradient, random(*shape, seed=9))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_small_centered_matrices_of_a_stack_are_centered_together() -> None:
    """One by one they would take a hundred times as long."""
    from lit_symopt.row_step import takes

    (parameter,) = parameters(1, 256, 4, 8)
    optimizer = SymOpt([parameter], rule="row_norm", centered=True, layout=Layout.experts())
    group = optimizer.param_groups[0]
    assert not takes(group, group["layout"], parameter)
    assert takes({**group, "centered": False}, group["layout"], parameter)


# ---- several processes


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def refused_by_columns() -> list[list[float]]:
    """A late refusal where ranks hold columns, so that updates come back transposed: the weights of each run."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh, found = init_device_mesh("cpu", (2,)), []
    for poisoned in (True, False):
        weight = nn.Parameter(distribute_tensor(random(8, 6, seed=0), mesh, [Shard(1)]))
        optimizer = SymOpt([weight], rule="spectral", weight_decay=0.1, lr=0.05)
        optimizer._finite = FiniteCheck(defer=True)
        for seed in range(STEPS):
            if seed == BAD and not poisoned:
                continue
            gradient = distribute_tensor(random(8, 6, seed=10 + seed), mesh, [Shard(1)])
            if seed == BAD and dist.get_rank() == 1:
                gradient.to_local()[2, 1] = torch.nan
            weight.grad = gradient
            local = weight.detach()
            assert isinstance(local, DTensor)
            before = local.to_local().clone()
            optimizer.step()
            if seed == BAD:
                assert torch.equal(before, local.to_local())
                with pytest.raises(GradientError):
                    optimizer.check()
        whole = weight.detach()
        assert isinstance(whole, DTensor)
        found.append(whole.full_tensor().flatten().tolist())
    return found


def test_ranks_that_hold_columns_refuse_a_step_late_too(two: Ranks) -> None:
    first, second = two(refused_by_columns)
    assert first == second
    poisoned, clean = first
    assert poisoned == clean


def too_small_a_bound() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = nn.Parameter(distribute_tensor(random(300, 200, seed=0), init_device_mesh("cpu", (2,)), [Shard(0)]))
    optimizer = SymOpt([weight], rule="spectral", precision="exact", scratch=0.1)
    weight.grad = weight.detach().clone()
    with pytest.raises(ConfigError, match=r"scratch=0\.1 MiB") as caught:
        optimizer.step()
    return str(caught.value)


def test_a_bound_that_is_too_small_is_an_error_on_ranks_that_own_nothing_too(two: Ranks) -> None:
    first, second = two(too_small_a_bound, timeout=60.0)
    assert first == second
