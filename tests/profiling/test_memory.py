"""Memory. Oracles: sums by hand, and a mode of torch that follows every storage which operators make."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_symopt import SymOpt, SymOptConfig
from lit_symopt.profiling.events import Event, Trace, read_trace
from lit_symopt.profiling.expected import expected_work
from lit_symopt.profiling.memory import memory_use, most_at_once, peak_bytes, scratch_bytes
from tests.models.tiny import FAMILIES, tiny
from tests.sharding.processes import Ranks

CPU = torch.device("cpu")


def stepped(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def whole_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


# -- what is held ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_symmetry_rule_keeps_one_number_an_element_and_adamw_two(family: str) -> None:
    model = tiny(family)
    optimizer = SymOpt.for_module(model)
    stepped(model, optimizer)
    use = memory_use(optimizer, model, rank=0)
    expected: dict[str, int] = {}
    for work in expected_work(optimizer):
        states = 4 * (2 * work.elements + work.blocks) if work.rule == "adamw" else 4 * work.elements
        expected[work.role] = expected.get(work.role, 0) + states  # AdamW counts its steps, a number a parameter
    assert use.state == expected
    assert use.parameters == use.gradients == whole_bytes(model)
    assert use.masters == 0
    assert use.scratch is None


def test_before_the_first_step_there_are_neither_gradients_nor_state() -> None:
    model = tiny()
    use = memory_use(SymOpt.for_module(model), model, rank=3)
    assert (use.rank, use.gradients, sum(use.state.values())) == (3, 0, 0)


def test_masters_of_half_precision_are_no_state() -> None:
    model = tiny().bfloat16()
    optimizer = SymOpt.for_module(model)
    stepped(model, optimizer)
    use = memory_use(optimizer, model, rank=0)
    numel = sum(parameter.numel() for parameter in model.parameters())
    assert (use.parameters, use.gradients, use.masters) == (2 * numel, 2 * numel, 4 * numel)
    vectors = sum(work.elements for work in expected_work(optimizer) if work.rule == "adamw")
    counters = sum(work.blocks for work in expected_work(optimizer) if work.rule == "adamw")
    assert sum(use.state.values()) == 4 * (numel + vectors + counters)


def test_a_tied_weight_is_there_once_and_a_frozen_one_has_no_gradient() -> None:
    model = tiny("qwen3 tied")
    assert memory_use(SymOpt.for_module(model), model, rank=0).parameters == whole_bytes(model)
    pair = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    pair[0].requires_grad_(False)
    optimizer = SymOpt(pair[1].named_parameters(), rule="spectral")
    pair(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    use = memory_use(optimizer, pair, rank=0)
    assert (use.parameters, use.gradients, use.state) == (4 * 18, 4 * 6, {"linear": 4 * 6})


def test_any_optimizer_has_its_state_in_role_all() -> None:
    model = nn.Linear(5, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer)
    use = memory_use(optimizer, model, rank=0)
    assert use.state == {"all": 4 * (2 * 24 + 2)}
    assert use.masters == 0


def test_what_a_strategy_puts_in_the_place_of_the_parameters_counts_as_masters() -> None:
    model = nn.Linear(5, 4, bias=False).bfloat16()
    flat = nn.Parameter(torch.zeros(24))  # of which 4 elements are padding
    optimizer = torch.optim.SGD([flat], momentum=0.9)
    flat.grad = torch.zeros_like(flat)
    optimizer.step()
    use = memory_use(optimizer, model, rank=0)
    assert (use.parameters, use.masters, use.gradients, use.state) == (40, 96, 96, {"all": 96})


def test_views_of_one_buffer_are_counted_once_and_meta_tensors_not_at_all() -> None:
    buffer = torch.zeros(10)
    model = nn.Module()
    model.a, model.b = nn.Parameter(buffer[:6]), nn.Parameter(buffer[6:])
    assert memory_use(torch.optim.SGD(model.parameters()), model, rank=0).parameters == 40
    absent = nn.Linear(5, 4, device="meta")
    assert memory_use(torch.optim.SGD(absent.parameters()), absent, rank=0).parameters == 0


def test_the_peak_of_a_process_is_what_linux_says_of_it() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc")
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    assert peak_bytes(CPU) == pytest.approx(int(line.split()[1]) * 1024, rel=0.01)


def on_a_rank() -> tuple[dict[str, Any], list[int]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = SymOpt.for_module(model, config=SymOptConfig(stack="muon"))
    stepped(model, optimizer)
    use = memory_use(optimizer, model, rank=0)
    held = [parameter.to_local().numel() for parameter in model.parameters()]
    return {"parameters": use.parameters, "gradients": use.gradients, "state": use.state}, held


def test_of_sharded_parameters_each_process_counts_its_own_part() -> None:
    with Ranks(2) as ranks:
        results = ranks(on_a_rank)
    whole = whole_bytes(tiny())
    for use, held in results:
        assert use["parameters"] == use["gradients"] == 4 * sum(held) < whole
    assert sum(use["parameters"] for use, _ in results) == whole
    assert set(results[0][0]["state"]) >= {"query", "down", "vector"}


# -- scratch --------------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are still there, and the most there were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._places: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {value.untyped_storage().data_ptr() for value in tree_leaves((args, kwargs)) if _is_real(value)}
        for value in tree_leaves(out):
            if _is_real(value):
                storage = value.untyped_storage()
                place, size = storage.data_ptr(), storage.nbytes()
                if size and place not in self._places | given:
                    self._places.add(place)
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, place, size)
        return out

    def _gone(self, place: int, size: int) -> None:
        self._places.discard(place)
        self.now -= size


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta


def equal_matrices(rule: str, *, number: int = 3) -> SymOpt:
    torch.manual_seed(0)
    named = [(f"w{index}", nn.Parameter(torch.randn(200, 80))) for index in range(number)]
    optimizer = SymOpt(named, rule=rule)
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    for _ in range(2):  # by then it keeps the memory that its steps borrow
        optimizer.step()
    return optimizer


def recorded(optimizer: SymOpt, folder: Path, *, memory: bool = True) -> Trace:
    path = folder / "rank0.pt.trace.json"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=memory) as profiler:
        elsewhere = torch.zeros(10_000_000)  # outside the step
        with record_function("ProfilerStep#0"):
            optimizer.step()
            del elsewhere
            optimizer.step()
    profiler.export_chrome_trace(str(path))
    return read_trace(path)


@pytest.mark.parametrize("rule", ["sgd", "row_norm", "spectral", "adamw"])
def test_the_scratch_of_a_step_is_what_its_operators_make(rule: str, tmp_path: Path) -> None:
    optimizer = equal_matrices(rule)
    with Live() as live:
        optimizer.step()
    scratch = scratch_bytes(recorded(optimizer, tmp_path))
    assert scratch is not None
    assert live.most <= scratch <= 1.01 * live.most + 1000  # and what an operator takes inside
    if rule != "adamw":  # the batch of three matrices, and their updates
        assert scratch + optimizer.kept_scratch(torch.device("cpu")) >= 2 * 3 * 200 * 80 * 4


def test_a_trace_without_allocations_or_steps_says_nothing_of_scratch(tmp_path: Path) -> None:
    trace = recorded(equal_matrices("sgd", number=1), tmp_path, memory=False)
    assert scratch_bytes(trace) is None
    with_memory = recorded(equal_matrices("sgd", number=1), tmp_path)
    others = tuple(event for event in with_memory.events if event.name != "symopt/step")
    assert scratch_bytes(Trace(with_memory.path, others)) is None


def test_scratch_is_of_the_gpu_where_one_was_used() -> None:
    def change(at: float, size: int, kind: int) -> Event:
        args = {"Bytes": size, "Device Type": kind, "Total Allocated": 10**9}
        return Event("[memory]", "cpu_instant_event", at, 0.0, 1, 1, 0, args)

    step = Event("symopt/step", "user_annotation", 10.0, 10.0, 1, 1, 0, {})
    mirrored = Event("symopt/step", "gpu_user_annotation", 5.0, 30.0, 0, 7, 0, {})
    changes = (change(6, 999, 1), change(12, 400, 0), change(13, 30, 1), change(14, 12, 1), change(15, -30, 1))
    assert scratch_bytes(Trace(Path(), (step, mirrored, *changes))) == 42
    assert scratch_bytes(Trace(Path(), (step, mirrored, change(12, 400, 0)))) == 400


def random_changes() -> Iterator[tuple[float, int, int]]:
    generator = torch.Generator().manual_seed(3)
    for index in range(200):
        yield float(index), int(torch.randint(-50, 60, (), generator=generator)), 0


def test_the_most_at_once_does_not_depend_on_order_and_never_lies_below_zero() -> None:
    changes, steps = list(random_changes()), [(10.0, 50.0), (60.0, 190.0)]
    highest = []
    for start, end in steps:
        inside = torch.tensor([size for at, size, _ in changes if start <= at <= end])
        highest.append(max(0, int(inside.cumsum(0).max())))
    assert most_at_once(changes, steps) == max(highest) > 0
    assert most_at_once(reversed(changes), steps) == max(highest)
    assert most_at_once([(1.0, -5, 0)], [(0.0, 2.0)]) == 0
    assert most_at_once(changes, []) is most_at_once([], steps) is None
