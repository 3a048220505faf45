from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from lit_symopt.blocks import Role
from lit_symopt.profiling.moments import moments
from lit_symopt.profiling.pictures import compare_bars, cost_bars, memory_bars, roofline_plot, timeline
from lit_symopt.profiling.pictures.canvas import PHASES, role_color
from lit_symopt.profiling.roofline import RooflinePoint
from lit_symopt.profiling.run import Ceilings, MemoryUse
from lit_symopt.ranges import Phase
from tests.profiling.made import cost, realistic, step, window
from tests.profiling.traces import AUTOGRAD, Made

CEILINGS = Ceilings(flops={"float32": 5e10, "float64": 2e10}, bytes_per_second=1e10)
MANY = [window(step([cost(f"role_{i}", "spectral", "rule", 100.0 * i) for i in range(40)]))]
ONE = [window(step([cost("query", "spectral", "rule", 100.0)]))]
ZEROS = [window(step([cost("query", "spectral", "rule", 0.0)], wall_us=0.0))]
NO_UPDATE = [window(step([cost("", "", "", 100.0, stage="forward")]))]


def point(role: str = "query", *, flops: float = 1e8, bytes_: float = 1e6, us: float = 9e3) -> RooflinePoint:
    return RooflinePoint(
        role=role,
        rule="spectral",
        dtype="float64",
        flops=flops,
        bytes=bytes_,
        measured_us=us,
        compute_us=flops / 2e4,
        memory_us=bytes_ / 1e4,
    )


def use(rank: int = 0, **changes: Any) -> MemoryUse:
    shown: dict[str, Any] = {"parameters": 4000, "gradients": 4000, "masters": 0, "state": {"query": 3000}}
    return MemoryUse(**{"rank": rank, **shown, "scratch": 900, "peak": 20000, **changes})


def training_step(*, gpu: bool = False, role: str = "query", rule_us: float = 200.0) -> Made:
    """Forward and backward in the closure, then an update whose two phases are apart."""
    end = 600 + rule_us
    made = (
        Made()
        .note("ProfilerStep#4", 0, end + 200)
        .note("train/data", 0, 50)
        .note("train/optimizer", 50, end + 100)
        .note("Optimizer.step#SymOpt.step", 60, end + 90)
        .note("train/forward", 70, 200)
        .note("train/backward", 200, 500)
        .note("symopt/step", 550, end + 80)
        .note(f"symopt/{role}/spectral/rule", 600, end, elements=(8,))
        .note(f"symopt/{role}/spectral/write", end + 20, end + 70, elements=(8,))
    )
    if gpu:
        made.launch(1, 80, 85).kernel("sgemm", 90, 190, correlation=1)
        made.launch(2, 210, 215, tid=AUTOGRAD).kernel("sgemm_nt", 220, 700, correlation=2)
        made.launch(3, 610, 615).kernel("syevj", 700, end + 400, correlation=3)
    return made


def is_picture(image: Any) -> bool:
    height, width, channels = image.shape
    small = 100 < height <= 900 and 600 < width <= 1400
    return small and channels == 3 and image.dtype == np.uint8 and bool(image.std() > 1)


@pytest.mark.parametrize("windows", [realistic(), realistic(device="cuda"), MANY, ONE, ZEROS, NO_UPDATE, []])
def test_costs_are_a_picture_whatever_they_are(windows: Any) -> None:
    assert is_picture(cost_bars(windows))
    assert is_picture(compare_bars({"symmetric": windows, "muon": ONE}))
    assert is_picture(compare_bars({"symmetric": windows}))


@pytest.mark.parametrize(
    "points",
    [
        [],
        [point()],
        [point(flops=0.0)],
        [point(us=1e-3)],  # faster than the roof
        [point(f"role_{i}") for i in range(40)],
        [point(f"role_{i}", flops=10.0 ** (i / 2), bytes_=1e3, us=1e9) for i in range(40)],
    ],
)
def test_a_roofline_is_a_picture_whatever_the_points_are(points: list[RooflinePoint]) -> None:
    assert is_picture(roofline_plot(points, CEILINGS))


@pytest.mark.parametrize(
    "memory",
    [
        [],
        [use()],
        [use(parameters=0, gradients=0, state={}, scratch=None, peak=None)],
        [use(peak=10**9)],
        [use(parameters=0, gradients=0, state={}, scratch=None)],
        [use(parameters=2**43, peak=None)],
        [use(rank, state={f"role_{i}": 100 * i for i in range(40)}) for rank in range(70)],
    ],
)
def test_memory_is_a_picture_whatever_it_is(memory: list[MemoryUse]) -> None:
    assert is_picture(memory_bars(memory))


@pytest.mark.parametrize("gpu", [False, True])
def test_a_timeline_is_a_picture_on_every_device(gpu: bool, tmp_path: Path) -> None:
    assert is_picture(timeline(training_step(gpu=gpu).trace(tmp_path)))


def test_a_timeline_needs_no_update(tmp_path: Path) -> None:
    assert is_picture(timeline(Made().note("ProfilerStep#1", 0, 100).op("aten::mm", 10, 20).trace(tmp_path)))
    foreign = Made().note("ProfilerStep#1", 0, 100).note("Optimizer.step#AdamW.step", 10, 90)
    assert is_picture(timeline(foreign.trace(tmp_path)))


def differ(a: Any, b: Any) -> bool:
    return a.shape != b.shape or bool((a != b).any())


def test_pictures_differ_when_the_numbers_do(tmp_path: Path) -> None:
    assert differ(cost_bars(realistic()), cost_bars(realistic(1.2)))
    assert differ(compare_bars({"a": realistic()}), compare_bars({"a": realistic(1.2)}))
    assert differ(roofline_plot([point()], CEILINGS), roofline_plot([point(us=1e4)], CEILINGS))
    assert differ(memory_bars([use()]), memory_bars([use(scratch=1800)]))
    assert differ(memory_bars([use()]), memory_bars([use(peak=18000)]))
    made = [training_step(), training_step(rule_us=400.0), training_step(role="key"), training_step(gpu=True)]
    first, *others = [timeline(one.trace(tmp_path)) for one in made]
    assert all(differ(first, other) for other in others)


@pytest.mark.parametrize("draw", [cost_bars, lambda windows: compare_bars({"a": windows})])
def test_equal_numbers_make_equal_pictures(draw: Callable[[Any], Any]) -> None:
    assert not differ(draw(realistic()), draw(realistic()))


def test_a_role_has_one_color_and_known_roles_have_different_ones() -> None:
    assert len({role_color(role) for role in Role}) == len(Role)
    assert role_color("my_role") == role_color("my_role")


def test_every_phase_has_a_color_of_its_own() -> None:
    assert set(get_args(Phase)) == set(PHASES) - {""}
    assert len(set(PHASES.values())) == len(PHASES)


def test_moments_follow_each_other_and_the_innermost_range_names_them(tmp_path: Path) -> None:
    found = moments(training_step().trace(tmp_path))
    places = [(m.place.stage, m.place.roles[0][0], m.place.phase, round(1000 * m.ms)) for m in found.host]
    assert places == [
        ("data", "", "", 50),
        ("optimizer", "", "", 20),
        ("forward", "", "", 130),
        ("backward", "", "", 300),
        ("optimizer", "", "", 50),
        ("optimizer", "(unattributed)", "", 50),
        ("optimizer", "query", "rule", 200),
        ("optimizer", "(unattributed)", "", 20),
        ("optimizer", "query", "write", 50),
        ("optimizer", "(unattributed)", "", 10),
        ("optimizer", "", "", 20),
        ("other", "", "", 100),
    ]
    assert [a.end_ms for a in found.host[:-1]] == pytest.approx([b.start_ms for b in found.host[1:]])
    assert found.ms == pytest.approx(1.0)


def test_kernels_lie_where_they_were_launched_and_when_they_ran(tmp_path: Path) -> None:
    found = moments(training_step(gpu=True).trace(tmp_path)).gpu
    assert [(m.place.stage, m.place.phase, m.kernel) for m in found] == [
        ("forward", "", "sgemm"),
        ("backward", "", "sgemm_nt"),
        ("optimizer", "rule", "syevj"),
    ]
    assert [(m.start_ms, m.end_ms) for m in found] == [
        pytest.approx((0.09, 0.19)),
        pytest.approx((0.22, 0.7)),
        pytest.approx((0.7, 1.2)),
    ]


def test_the_step_in_the_middle_is_shown(tmp_path: Path) -> None:
    made = Made()
    for number, (start, end) in enumerate([(0, 900), (1000, 1100), (2000, 2500)]):
        made.note(f"ProfilerStep#{number}", start, end)
    assert moments(made.trace(tmp_path)).name == "ProfilerStep#2"
