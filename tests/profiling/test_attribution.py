"""Every microsecond of a step is found once, where it was spent. Oracles: traces made by hand, and a stopwatch."""

from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_symopt import SymOpt
from lit_symopt.profiling.attribution import attribute
from lit_symopt.profiling.costs import StepCosts, TraceCosts, total
from lit_symopt.profiling.events import read_trace
from tests.models.tiny import FAMILIES, tiny, tokens
from tests.profiling.traces import AUTOGRAD, Made, Recorded, record, where


def device(costs: TraceCosts | StepCosts) -> dict[str, float]:
    """Device time by place and kernel of the only step; what has none is left out."""
    step = costs if isinstance(costs, StepCosts) else costs.steps[0]
    return {key: round(us, 6) for key, us in total(step.costs, where).items() if us}


def host(costs: TraceCosts) -> dict[str, float]:
    return {where(cost): round(cost.host_us, 6) for cost in costs.steps[0].costs if cost.host_us}


def calls(costs: TraceCosts) -> dict[str, float]:
    return {where(cost): cost.calls for cost in costs.steps[0].costs}


def step(end: float = 100.0) -> Made:
    return Made().note("ProfilerStep#7", 0.0, end)


HOST = "(between operators)"

# -- on a CPU ---------------------------------------------------------------------------------------------------------


def test_an_operator_has_its_time_without_the_operators_in_it(tmp_path: Path) -> None:
    made = step().note("train/forward", 10, 60)
    made.op("aten::linear", 20, 50).op("aten::t", 22, 25).op("aten::addmm", 30, 45).op("aten::t", 55, 56)
    costs = made.costs(tmp_path)
    assert costs.device == "cpu"
    assert device(costs) == {
        f"other {HOST}": 50.0,
        f"forward {HOST}": 19.0,
        "forward aten::linear": 12.0,
        "forward aten::t": 4.0,
        "forward aten::addmm": 15.0,
    }
    assert calls(costs)["forward aten::t"] == 2
    assert host(costs) == {}
    assert (costs.steps[0].step, costs.steps[0].wall_us) == (7, 100.0)


def test_touching_and_crossing_intervals_lose_nothing(tmp_path: Path) -> None:
    made = step().note("train/forward", 10, 50).note("train/backward", 50, 80.0)
    made.op("outer", 20, 40).op("inner", 30, 40.001).op("next", 40, 45).op("late", 78, 80.002).op("last", 95, 100.3)
    assert device(made.costs(tmp_path)) == {
        f"other {HOST}": pytest.approx(10 + 14.998),
        f"forward {HOST}": 10 + 5,
        "forward outer": 10.0,
        "forward inner": 10.0,
        "forward next": 5.0,
        f"backward {HOST}": 28.0,
        "backward late": 2.002,
        "other last": 5.0,
    }


def test_what_lies_outside_of_the_steps_is_left_out(tmp_path: Path) -> None:
    made = Made().op("before", -20, -10).note("around", -5, 300).op("astride", -2, 3)
    made.note("ProfilerStep#7", 0, 100).op("inside", 98, 105).op("between", 102, 103)
    made.note("ProfilerStep#8", 110, 200).op("inside", 120, 121).op("after", 250, 251)
    costs = made.costs(tmp_path)
    assert [step.step for step in costs.steps] == [7, 8]
    assert device(costs.steps[0]) == {f"other {HOST}": 98.0, "other inside": 2.0}
    assert device(costs.steps[1]) == {f"other {HOST}": 89.0, "other inside": 1.0}


def test_a_step_ends_where_the_next_one_begins(tmp_path: Path) -> None:
    first, second = Made().note("ProfilerStep#1", 0, 100.002).note("ProfilerStep#2", 100, 200).costs(tmp_path).steps
    assert (first.wall_us, second.wall_us) == (100.0, 100.0)
    assert (device(first), device(second)) == ({f"other {HOST}": 100.0}, {f"other {HOST}": 100.0})


def test_each_phase_gets_its_own_and_the_rest_is_shown_as_unattributed(tmp_path: Path) -> None:
    made = step().note("train/optimizer", 5, 95).note("Optimizer.step#SymOpt.step", 10, 90).note("symopt/step", 20, 80)
    made.note("symopt/all/step/prepare", 21, 25).note("symopt/query/spectral/rule", 30, 60).op("aten::bmm", 32, 52)
    made.op("aten::cat", 70, 74)
    costs = made.costs(tmp_path)
    assert device(costs) == {
        f"other {HOST}": 10.0,
        f"optimizer {HOST}": 10.0 + 20.0,
        f"optimizer (unattributed) {HOST}": 22.0,
        f"optimizer all/step/prepare {HOST}": 4.0,
        f"optimizer query/spectral/rule {HOST}": 10.0,
        "optimizer query/spectral/rule aten::bmm": 20.0,
        "optimizer (unattributed) aten::cat": 4.0,
    }
    assert costs.steps[0].update_us == 60.0
    assert costs.attributed_share == pytest.approx(34 / 60)


def test_a_phase_in_a_phase_has_its_time_for_itself(tmp_path: Path) -> None:
    made = step().note("symopt/step", 0, 100).note("symopt/up/spectral/rule", 10, 90)
    made.note("symopt/up/spectral/communication", 40, 70).op("c10d::allgather_", 45, 60).op("aten::bmm", 75, 85)
    assert device(made.costs(tmp_path)) == {
        f"optimizer (unattributed) {HOST}": 20.0,
        f"optimizer up/spectral/rule {HOST}": 40.0,
        f"optimizer up/spectral/communication {HOST}": 15.0,
        "optimizer up/spectral/communication c10d::allgather_": 15.0,
        "optimizer up/spectral/rule aten::bmm": 10.0,
    }


def test_a_batch_of_several_roles_is_split_by_their_elements(tmp_path: Path) -> None:
    made = step().note("symopt/step", 0, 100)
    made.note("symopt/key+value/spectral/rule", 0, 100, elements=(100, 300)).op("aten::bmm", 0, 100).op("aten::t", 9, 9)
    costs = made.costs(tmp_path)
    assert device(costs) == {
        "optimizer key/spectral/rule aten::bmm": 25.0,
        "optimizer value/spectral/rule aten::bmm": 75.0,
    }
    assert calls(costs)["optimizer key/spectral/rule aten::bmm"] == 0.25
    assert calls(costs)["optimizer value/spectral/rule aten::t"] == 0.75


@pytest.mark.parametrize("elements", [(), (7,), (0, 0), (1, 2, 3)])
def test_without_usable_shapes_the_roles_share_alike(tmp_path: Path, elements: tuple[int, ...]) -> None:
    made = step().note("symopt/step", 0, 100).note("symopt/key+value/spectral/rule", 0, 100, elements=elements)
    assert device(made.costs(tmp_path)) == {
        f"optimizer key/spectral/rule {HOST}": 50.0,
        f"optimizer value/spectral/rule {HOST}": 50.0,
    }


@pytest.mark.parametrize("wrapped", [True, False])
def test_several_updates_in_one_step_add_up(tmp_path: Path, wrapped: bool) -> None:
    made = step()
    for start in (10, 40):
        if wrapped:
            made.note("Optimizer.step#SymOpt.step", start, start + 22)
        made.note("symopt/step", start, start + 20).note("symopt/up/spectral/rule", start, start + 20)
        made.op("aten::bmm", start + 5, start + 15)
    costs = made.costs(tmp_path)
    assert costs.steps[0].update_us == 40.0
    assert device(costs)["optimizer up/spectral/rule aten::bmm"] == 20.0
    assert calls(costs)["optimizer up/spectral/rule aten::bmm"] == 2
    assert costs.attributed_share == 1.0
    assert sum(device(costs).values()) == 100.0


def test_an_optimizer_in_the_update_does_not_break_it(tmp_path: Path) -> None:
    made = step().note("symopt/step", 10, 90).note("symopt/vector/adamw/rule", 20, 80)
    made.note("Optimizer.step#AdamW.step", 30, 60).op("aten::_fused_adamw_", 35, 55)
    costs = made.costs(tmp_path)
    assert device(costs)["optimizer vector/adamw/rule aten::_fused_adamw_"] == 20.0
    assert device(costs)[f"optimizer vector/adamw/rule {HOST}"] == 40.0
    assert costs.steps[0].update_us == 80.0


def closure(made: Made) -> Made:
    """Forward and backward inside `Optimizer.step#`, as Lightning calls them."""
    made.note("train/forward", 12, 30).op("aten::mm", 15, 25)
    made.note("Optimizer.zero_grad#X.zero_grad", 30, 32).note("train/backward", 32, 60).op("aten::mm", 40, 50)
    return made


def test_a_closure_is_no_update(tmp_path: Path) -> None:
    made = closure(step().note("Optimizer.step#SymOpt.step", 10, 90)).note("symopt/step", 62, 88)
    costs = made.note("symopt/up/spectral/rule", 62, 88).costs(tmp_path)
    assert total(costs.steps[0].costs, lambda cost: (cost.stage, cost.in_update)) == {
        ("other", False): pytest.approx(20.0 + 2.0),
        ("optimizer", False): 6.0,
        ("forward", False): 18.0,
        ("backward", False): 28.0,
        ("optimizer", True): 26.0,
    }
    assert costs.steps[0].update_us == 26.0


def test_an_optimizer_without_ranges_is_one_place_under_its_name(tmp_path: Path) -> None:
    made = closure(step().note("Optimizer.step#AdamW.step", 10, 90)).op("aten::_foreach_lerp_", 70, 85)
    costs = made.costs(tmp_path)
    assert device(costs) == {
        f"other {HOST}": 22.0,
        f"optimizer (all)/AdamW {HOST}": 17.0,
        f"forward {HOST}": 8.0,
        "forward aten::mm": 10.0,
        f"backward {HOST}": 18.0,
        "backward aten::mm": 10.0,
        "optimizer (all)/AdamW aten::_foreach_lerp_": 15.0,
    }
    assert costs.steps[0].update_us == 80 - 18 - 2 - 28
    assert costs.attributed_share == 0.0


def test_validation_is_a_stage_and_no_part_of_the_step(tmp_path: Path) -> None:
    made = step().note("train/validation", 60, 90).note("train/forward", 65, 70).note("train/validation", 72, 80)
    costs = made.op("aten::mm", 74, 79).costs(tmp_path)
    assert costs.steps[0].wall_us == 70.0
    assert device(costs) == {
        f"other {HOST}": 70.0,
        f"validation {HOST}": 25.0,
        "validation aten::mm": 5.0,
    }


def test_ranges_of_others_and_malformed_ones_change_no_place(tmp_path: Path) -> None:
    made = step().note("train/forward", 0, 100).note("[pl]run_training_batch", 10, 90).note("train/else", 20, 80)
    made.note("symopt/half", 30, 70).note("Optimizer.stepping", 40, 60).note("ProfilerStep#x", 45, 55)
    assert device(made.costs(tmp_path)) == {f"forward {HOST}": 100.0}


def test_frames_of_python_are_no_operators(tmp_path: Path) -> None:
    made = step().note("train/forward", 0, 100).add("python_function", "model.py(3): forward", 10, 90)
    assert device(made.op("aten::mm", 20, 50).costs(tmp_path)) == {f"forward {HOST}": 70.0, "forward aten::mm": 30.0}


def test_other_threads_of_a_cpu_run_beside_the_device(tmp_path: Path) -> None:
    made = step().note("symopt/step", 10, 90).note("symopt/up/spectral/communication", 20, 60)
    made.note("gloo:all_gather", 25, 45, tid=AUTOGRAD).op("aten::copy_", 30, 35, tid=AUTOGRAD)
    made.note("train/data", 95, 99, tid=5).op("aten::stack", 96, 98, tid=5).op("aten::stack", 120, 130, tid=5)
    costs = made.costs(tmp_path)
    assert host(costs) == {
        "optimizer up/spectral/communication gloo:all_gather": 15.0,
        "optimizer up/spectral/communication aten::copy_": 5.0,
        f"data {HOST}": 2.0,
        "data aten::stack": 2.0,
    }
    assert sum(device(costs).values()) == 100.0


NAMES = [
    "train/forward",
    "train/validation",
    "symopt/step",
    "symopt/a+b/spectral/rule",
    "symopt/a/spectral/write",
    "Optimizer.step#SymOpt.step",
    "Optimizer.step#SGD.step",
    "Optimizer.zero_grad#SGD.zero_grad",
    "somebody",
    "aten::mm",
    "aten::add",
    "cudaLaunchKernel",
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-20, 220_000), st.integers(0, 100_000), st.sampled_from(NAMES)), max_size=30),
    st.integers(-5, 40_000),
)
def test_the_parts_add_up_to_the_step(tmp_path: Path, spans: list[tuple[int, int, str]], gap: int) -> None:
    """Of any intervals, crossing ones too, to the nanosecond."""
    made = Made().note("ProfilerStep#0", 0, 100).note("ProfilerStep#1", 100 + gap / 1e3, 200)
    for index, (start, length, name) in enumerate(spans):
        if name.startswith("cuda"):
            made.launch(index, start / 1e3, (start + length) / 1e3)
        elif "::" in name:
            made.op(name, start / 1e3, (start + length) / 1e3)
        else:
            made.note(name, start / 1e3, (start + length) / 1e3, elements=(3, 4) if "+" in name else ())
    first, second = made.costs(tmp_path).steps
    for found, duration in ((first, 100.0 + min(gap, 0) / 1e3), (second, 100.0 - gap / 1e3)):
        assert found.device_us() == pytest.approx(duration, abs=1e-6)
        assert all(cost.device_us >= 0 and cost.host_us == 0 for cost in found.costs)
        keys = [where(cost) for cost in found.costs]
        assert len(keys) == len(set(keys))


# -- with a GPU; no trace of one is here, these are made by hand -------------------------------------------------------


def test_a_kernel_belongs_where_it_was_launched_not_where_it_ran(tmp_path: Path) -> None:
    made = step().note("symopt/step", 10, 50).note("symopt/up/spectral/rule", 20, 40).op("aten::bmm", 22, 30)
    made.launch(5, 24, 28).launch(6, 42, 44, name="cudaMemcpyAsync").launch(7, 46, 47, name="cudaMemsetAsync")
    made.kernel("gemm", 60, 85, correlation=5).kernel("Memset (Device)", 90, 91, correlation=7, category="gpu_memset")
    made.kernel("Memcpy DtoD (Device -> Device)", 85, 89, correlation=6, category="gpu_memcpy")
    made.add("gpu_user_annotation", "symopt/up/spectral/rule", 60, 85, pid=0, tid=7, **{"External id": 3})
    costs = made.costs(tmp_path)
    assert costs.device == "cuda"
    assert device(costs) == {
        "optimizer up/spectral/rule gemm": 25.0,
        "optimizer (unattributed) Memset (Device)": 1.0,
        "optimizer (unattributed) Memcpy DtoD (Device -> Device)": 4.0,
    }
    assert host(costs) == {
        f"other {HOST}": 60.0,
        f"optimizer (unattributed) {HOST}": 17.0,
        f"optimizer up/spectral/rule {HOST}": 12.0,
        "optimizer up/spectral/rule aten::bmm": 4.0,
        "optimizer up/spectral/rule cudaLaunchKernel": 4.0,
        "optimizer (unattributed) cudaMemcpyAsync": 2.0,
        "optimizer (unattributed) cudaMemsetAsync": 1.0,
    }
    assert costs.steps[0].update_us == 40.0
    assert costs.attributed_share == pytest.approx(25 / 30)


@pytest.mark.parametrize("name", ["cuLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC"])
def test_a_launch_through_the_driver_counts_alike(tmp_path: Path, name: str) -> None:
    made = step().note("symopt/step", 10, 50).note("symopt/up/spectral/rule", 20, 40).launch(5, 24, 28, name=name)
    made.kernel("triton_poi_fused_add_0", 60, 85, correlation=5)
    assert device(made.costs(tmp_path)) == {"optimizer up/spectral/rule triton_poi_fused_add_0": 25.0}


def test_all_kernels_of_a_graph_belong_to_its_launch(tmp_path: Path) -> None:
    made = step().note("train/forward", 10, 50).launch(5, 24, 28, name="cudaGraphLaunch")
    for start in (30, 40, 90):
        made.kernel("gemm", start, start + 8, correlation=5)
    costs = made.kernel("softmax", 98, 130, correlation=5).costs(tmp_path)
    assert device(costs) == {"forward gemm": 24.0, "forward softmax": 32.0}
    assert calls(costs)["forward gemm"] == 3


def test_what_autograd_launches_on_its_thread_is_backward(tmp_path: Path) -> None:
    made = step().note("train/backward", 10, 60).op("MmBackward0", 20, 40, tid=AUTOGRAD).launch(5, 24, 28, tid=AUTOGRAD)
    made.kernel("gemm", 70, 95, correlation=5)
    # A hook that exchanges while the backward pass still runs opens its own range on that thread.
    made.note("symopt/up/spectral/communication", 42, 50, tid=AUTOGRAD).launch(6, 44, 45, tid=AUTOGRAD)
    made.kernel("ncclDevKernel_AllGather", 72, 92, correlation=6, stream=20)
    costs = made.costs(tmp_path)
    assert device(costs) == {"backward gemm": 25.0, "optimizer up/spectral/communication ncclDevKernel_AllGather": 20.0}
    assert host(costs)["backward MmBackward0"] == 16.0


def test_a_launch_on_a_thread_without_operators_counts_where_the_main_thread_is(tmp_path: Path) -> None:
    made = step().note("train/forward", 10, 60).launch(5, 24, 28, tid=-247463936)
    assert device(made.kernel("gemm", 70, 95, correlation=5).costs(tmp_path)) == {"forward gemm": 25.0}


def test_a_kernel_belongs_to_the_step_that_launched_it(tmp_path: Path) -> None:
    made = Made().launch(1, -10, -9).kernel("early", 5, 20, correlation=1)
    made.note("ProfilerStep#7", 0, 100).note("train/forward", 80, 100).launch(5, 90, 92)
    made.note("ProfilerStep#8", 100, 200).kernel("gemm", 110, 150, correlation=5).kernel(
        "gemm", 150, 151, correlation=5
    )
    costs = made.costs(tmp_path)
    assert device(costs.steps[0]) == {"forward gemm": 41.0}
    assert device(costs.steps[1]) == {}


def test_without_the_launch_the_operator_says_where(tmp_path: Path) -> None:
    made = step().note("symopt/step", 10, 50).note("symopt/up/spectral/rule", 20, 40)
    made.op("aten::bmm", 22, 30, external=900).kernel("gemm", 60, 85, correlation=5, external=900)
    assert device(made.costs(tmp_path)) == {"optimizer up/spectral/rule gemm": 25.0}


def test_a_kernel_of_unknown_origin_is_shown_and_not_dropped(tmp_path: Path) -> None:
    made = Made().note("ProfilerStep#7", 0, 100).note("train/forward", 0, 100).kernel("gemm", 60, 85, correlation=5)
    made.note("ProfilerStep#8", 110, 200).kernel("gemm", 104, 106, correlation=6).kernel(
        "late", 205, 210, correlation=7
    )
    costs = made.kernel("of the warm-up", -5, 3, correlation=8).costs(tmp_path)
    assert device(costs.steps[0]) == {"other gemm": 27.0}
    assert device(costs.steps[1]) == {"other late": 5.0}


def test_streams_in_parallel_count_in_full(tmp_path: Path) -> None:
    made = step().note("train/backward", 0, 50).launch(5, 10, 11).launch(6, 12, 13)
    made.kernel("gemm", 20, 95, correlation=5).kernel("ncclDevKernel_AllReduce", 20, 90, correlation=6, stream=20)
    costs = made.costs(tmp_path)
    assert device(costs) == {"backward gemm": 75.0, "backward ncclDevKernel_AllReduce": 70.0}
    assert costs.steps[0].wall_us == 100.0


def test_a_kernel_of_several_roles_is_split(tmp_path: Path) -> None:
    made = step().note("symopt/step", 0, 50).note("symopt/key+value/spectral/rule", 0, 50, elements=(1, 3))
    costs = made.launch(5, 10, 11).kernel("gemm", 60, 80, correlation=5).costs(tmp_path)
    assert device(costs) == {"optimizer key/spectral/rule gemm": 5.0, "optimizer value/spectral/rule gemm": 15.0}


# -- real steps -------------------------------------------------------------------------------------------------------


def windows(family: str, folder: Path, optimizer: Any = None, count: int = 3) -> list[tuple[TraceCosts, Recorded]]:
    """A few windows: on a machine that others use, too, most of their steps are hardly disturbed."""
    model = tiny(family)
    optimizer = (optimizer or SymOpt.for_module)(model)
    ids = tokens(4, 8)
    found = []
    for window in range(count):
        recorded = record(model.model, optimizer, ids, folder / f"{window}.pt.trace.json")
        found.append((attribute(read_trace(recorded.path)), recorded))
    return found


def assert_agrees_with_the_stopwatch(found: list[tuple[TraceCosts, Recorded]]) -> None:
    errors = []
    for costs, recorded in found:
        for each, seconds in zip(costs.steps, recorded.seconds, strict=True):
            update = each.device_us(lambda cost: cost.in_update)
            assert update == pytest.approx(each.update_us, rel=0.05)
            assert each.device_us() == pytest.approx(each.wall_us, rel=0.05)
            errors.append(abs(update / 1e6 / seconds - 1))
    assert median(errors) < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_nearly_all_of_a_real_update_is_attributed(tmp_path: Path, family: str) -> None:
    found = windows(family, tmp_path)
    assert all(len(costs.steps) == 3 and costs.device == "cpu" for costs, _ in found)
    assert_agrees_with_the_stopwatch(found)
    assert median(costs.attributed_share for costs, _ in found) >= 0.95
    by_stage = total(found[0][0].steps[0].costs, lambda cost: cost.stage)
    assert set(by_stage) == {"other", "forward", "backward", "optimizer"}


def test_a_real_adamw_is_one_place_and_agrees_with_the_stopwatch(tmp_path: Path) -> None:
    found = windows("qwen3", tmp_path, lambda model: torch.optim.AdamW(model.parameters()))
    assert_agrees_with_the_stopwatch(found)
    places = {(cost.role, cost.rule, cost.phase) for cost in found[0][0].steps[0].costs if cost.in_update}
    assert places == {("(all)", "AdamW", "")}
