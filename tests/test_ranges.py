"""The named ranges of a step: what a profiler sees, and that nobody else does."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lit_symopt import SymOpt
from lit_symopt.errors import ConfigError
from lit_symopt.layout import Layout
from lit_symopt.ranges import ALL, Subject, nvtx_ranges, phase
from lit_symopt.ranges import step as range_of_step
from tests.models.tiny import FAMILIES, tiny
from tests.sharding.processes import run_on_ranks


def gradients(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)


def ranges_of(optimizer: SymOpt, folder: Path) -> list[dict[str, Any]]:
    """The `symopt/` events of one step, in order of their start."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=False) as profiler:
        optimizer.step()
    profiler.export_chrome_trace(str(folder / "step.json"))
    events = json.loads((folder / "step.json").read_text())["traceEvents"]
    found = [event for event in events if event.get("ph") == "X" and event["name"].startswith("symopt/")]
    return sorted(found, key=lambda event: (event["ts"], -event["dur"]))


def assert_nested(events: list[dict[str, Any]]) -> None:
    """Each lies inside those that are open when it begins, or after them."""
    open_until: list[float] = []
    for event in events:
        while open_until and open_until[-1] <= event["ts"] + 1e-3:
            open_until.pop()
        end = event["ts"] + event["dur"]
        assert not open_until or end <= open_until[-1] + 1e-3, event["name"]
        open_until.append(end)


def spectral_step(folder: Path) -> list[dict[str, Any]]:
    weights = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(5)]
    shared = {"rule": "spectral", "layout": Layout.matrix(), "lr": 0.1}
    optimizer = SymOpt(
        [
            {"params": weights[:2], "name": "a", "role": "query", **shared},
            {"params": weights[2:], "name": "b", "role": "key", **shared},
        ]
    )
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return ranges_of(optimizer, folder)


def test_a_batch_of_two_roles_goes_through_its_phases_in_order(tmp_path: Path) -> None:
    names = [event["name"] for event in spectral_step(tmp_path)]
    assert names[0] == "symopt/step"
    batch = [name for name in names if name.startswith("symopt/query+key/spectral/")]
    phases = ("prepare", "momentum", "pack", "pack", "rule", "scale", "pack", "write")
    assert batch == [f"symopt/query+key/spectral/{name}" for name in phases]
    assert set(names) - set(batch) == {"symopt/step", "symopt/all/step/prepare", "symopt/all/finite/check"}


def test_arguments_are_the_elements_of_each_role_and_the_shape_of_the_batch(tmp_path: Path) -> None:
    rule = next(event for event in spectral_step(tmp_path) if event["name"].endswith("/rule"))
    assert rule["args"]["Concrete Inputs"][:2] == ["48", "72"]
    assert rule["args"]["Input Dims"][-1] == [5, 6, 4]


@pytest.mark.parametrize("family", FAMILIES)
def test_phases_lie_inside_the_step_and_never_cross(family: str, tmp_path: Path) -> None:
    module = tiny(family)
    optimizer = SymOpt.for_module(module)
    gradients(module)
    optimizer.step()  # makes the state
    step, *phases = ranges_of(optimizer, tmp_path)
    assert step["name"] == "symopt/step"
    assert_nested([step, *phases])
    leaves = [event for event in phases if not event["name"].endswith("/prepare")]
    assert sum(event["dur"] for event in leaves) <= step["dur"]  # none in another
    roles = {str(group["role"]) for group in optimizer.param_groups}
    named = {role for event in phases for role in event["name"].split("/")[1].split("+")}
    assert named == roles | {ALL}


def test_half_precision_says_what_masters_and_casts_cost(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(8, 4, dtype=torch.bfloat16))
    optimizer = SymOpt([weight], rule="spectral", lr=0.1)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    names = Counter(event["name"] for event in ranges_of(optimizer, tmp_path))
    assert names["symopt/linear/spectral/momentum"] == 3  # the master, the gradient, and the momentum itself
    assert names["symopt/linear/spectral/write"] == 2  # the master, and the parameter


def test_the_closure_is_not_part_of_the_step(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(8, 4))
    optimizer = SymOpt([weight], rule="sgd", lr=0.1)

    def closure() -> float:
        with torch.profiler.record_function("the closure"):
            loss = weight.square().sum()
            loss.backward()
        return loss.item()

    with profile(activities=[ProfilerActivity.CPU], acc_events=False) as profiler:
        optimizer.step(closure)
    profiler.export_chrome_trace(str(tmp_path / "step.json"))
    events = {event["name"]: event for event in json.loads((tmp_path / "step.json").read_text())["traceEvents"]}
    assert events["the closure"]["ts"] + events["the closure"]["dur"] <= events["symopt/step"]["ts"]


def test_without_a_profiler_a_range_is_nothing_and_asks_for_nothing() -> None:
    def never(*_: object) -> Subject:
        raise AssertionError("a subject was made although nobody listens")

    assert isinstance(phase(never, "rule", 1), nullcontext)
    assert phase(never, "rule", 1) is range_of_step()


def test_a_role_cannot_break_the_name_apart() -> None:
    assert Subject(rule="sgd", elements={"my/role+": 1}).name == "my_role_/sgd"


def test_an_error_inside_a_range_ends_it(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 3))
    optimizer = SymOpt([weight], rule="spectral", lr=0.1)
    weight.grad = torch.full_like(weight, torch.nan)
    with profile(activities=[ProfilerActivity.CPU], acc_events=False) as profiler:
        with pytest.raises(ValueError, match="not finite"):
            optimizer.step()
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    profiler.export_chrome_trace(str(tmp_path / "step.json"))
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    first, second = (event for event in events if event["name"] == "symopt/step")
    assert first["ts"] + first["dur"] <= second["ts"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_nvtx_without_cuda_is_refused() -> None:
    with pytest.raises(ConfigError, match="NVTX ranges need a CUDA device"), nvtx_ranges():
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nvtx_ranges_are_pushed_and_popped() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 4, device="cuda"))
    optimizer = SymOpt([weight], rule="spectral", lr=0.1)
    weight.grad = torch.randn_like(weight)
    with nvtx_ranges():
        optimizer.step()
        depth = torch.cuda.nvtx.range_push("outside")
        torch.cuda.nvtx.range_pop()
    assert depth == 0


def profiled_ranks(folder: str) -> dict[str, list[str]]:
    """The names that a rank sees in steps that share copies, and in steps on FSDP2's shards."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    found = {}
    for strategy in ("copies", "shards"):
        module = tiny("olmoe")
        if strategy == "shards":
            fully_shard(module)
        optimizer = SymOpt.for_module(module)
        if strategy == "copies":
            optimizer.attach(dist.group.WORLD)
        torch.manual_seed(1)
        gradients(module)
        optimizer.step()
        here = Path(folder, f"{strategy}{dist.get_rank()}")
        here.mkdir()
        events = ranges_of(optimizer, here)
        assert_nested(events)
        found[strategy] = sorted({event["name"] for event in events})
    return found


def test_on_several_ranks_communication_is_a_phase_of_the_blocks_it_is_for(tmp_path: Path) -> None:
    for found in run_on_ranks(profiled_ranks, 2, str(tmp_path)):
        for strategy, names in found.items():
            sent = {name for name in names if name.endswith("/communication")}
            assert "symopt/all/finite/communication" in sent
            assert any("/spectral/" in name for name in sent), strategy
        assert any("row_norm/communication" in name for name in found["shards"])  # damped, centered: sums over rows
        assert not any("row_norm/communication" in name for name in found["copies"])
