"""Windows of torch.profiler: what is recorded, what is written, and what happens when somebody else profiles."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, record_function

from lit_symopt.errors import ConfigError, ProfileError
from lit_symopt.profiling.active import recording
from lit_symopt.profiling.events import read_trace
from lit_symopt.profiling.schedule import Schedule
from lit_symopt.profiling.trace_file import writable
from lit_symopt.profiling.windows import Window, Windows

ROOT = Path(__file__).parents[2]


def work(step: int) -> None:
    with record_function(f"work {step}"):
        torch.ones(8, 8) @ torch.ones(8, 8)


def run(
    windows: Windows, steps: int, *, within: Callable[[int], object] = lambda step: None, first: int = 1
) -> list[Window]:
    """A loop of steps; `within` is called in the middle of each."""
    found = []
    for step in range(first, first + steps):
        windows.before(step)
        work(step)
        within(step)
        window = windows.after()
        if window is not None:
            found.append(window)
    return found


def names(path: Path) -> list[str]:
    """Ranges of steps, then what ran in them, in the order of time."""
    events = sorted(read_trace(path).events, key=lambda event: event.start_us)
    found = [event.name for event in events if event.name.startswith(("ProfilerStep#", "work "))]
    return sorted(found, key=lambda name: name.startswith("work "))


def make(folder: Path, said: list[str] | None = None, **schedule: int) -> Windows:
    say = pytest.fail if said is None else said.append
    settings = {"wait": 0, "warmup": 1, "active": 2, **schedule}
    return Windows(Schedule(**settings), folder, worker="rank0", say=say)


def other(**options: Any) -> torch.profiler.profile:
    return torch.profiler.profile(activities=[ProfilerActivity.CPU], **options)


def exported(profiler: torch.profiler.profile, folder: Path) -> list[str]:
    path = folder / "of somebody else.json"
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    return sorted(event["name"] for event in events if event["name"].startswith("work "))


def traces(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.pt.trace.json"))


# -- what is recorded ----------------------------------------------------------------------------------------------


def test_three_windows_are_three_files_with_the_active_steps_only(tmp_path: Path) -> None:
    windows = make(tmp_path, skip_first=2, wait=1, warmup=1, active=2, repeat=3)
    found = run(windows, 20, first=101)
    assert [(window.first, window.last) for window in found] == [(105, 106), (109, 110), (113, 114)]
    assert [window.trace.path for window in found] == traces(tmp_path)
    for window in found:
        steps = (window.first, window.last)
        assert names(window.trace.path) == [*(f"ProfilerStep#{n}" for n in steps), *(f"work {n}" for n in steps)]
    assert windows.done
    assert not recording()


@pytest.mark.parametrize("warmup", [1, 3])
def test_without_a_wait_windows_follow_each_other(tmp_path: Path, warmup: int) -> None:
    found = run(make(tmp_path, wait=0, warmup=warmup, active=1, repeat=3), 20)
    assert [window.first for window in found] == [warmup + 1, 2 * (warmup + 1), 3 * (warmup + 1)]


def test_the_plugin_of_tensorboard_reads_worker_and_time_from_the_name(tmp_path: Path) -> None:
    pattern = pytest.importorskip("torch_tb_profiler.consts").WORKER_PATTERN
    before = time.time_ns()
    [window] = run(make(tmp_path), 4)
    match = pattern.match(window.trace.path.name)
    assert match[1] == "rank0"
    assert before < int(match[2][1:]) < time.time_ns()
    assert not pattern.match(f".{window.trace.path.name}.half")


def test_the_last_window_of_a_loop_that_ends_in_it_has_its_whole_steps(tmp_path: Path) -> None:
    said: list[str] = []
    windows = make(tmp_path, said, active=5)
    assert not run(windows, 4)
    windows.before(5)
    work(5)
    window = windows.finish()
    assert window is not None
    assert (window.first, window.last) == (2, 4)
    steps = [name for name in names(window.trace.path) if name.startswith("ProfilerStep")]
    assert steps == ["ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"]
    assert said == ["training ended in window 1: it has 3 of 5 steps, and is kept"]
    assert not recording()


@pytest.mark.parametrize("steps", [0, 1])
def test_a_loop_that_ends_before_a_step_is_whole_leaves_no_file_and_says_so(tmp_path: Path, steps: int) -> None:
    said: list[str] = []
    windows = make(tmp_path, said)
    run(windows, steps)
    windows.before(steps + 1)
    work(steps + 1)
    assert windows.finish() is None
    assert said == ["training ended before window 1 had a whole step; it is discarded"]
    assert not list(tmp_path.iterdir())
    assert not recording()


@pytest.mark.parametrize("steps", range(4))
def test_a_discarded_window_leaves_no_file_and_no_profiler(tmp_path: Path, steps: int) -> None:
    windows = make(tmp_path, active=5)
    run(windows, steps)
    windows.before(steps + 1)
    windows.discard()
    assert not list(tmp_path.iterdir())
    assert not recording()
    assert len(run(make(tmp_path), 4)) == 1  # nothing is in the way of another


@pytest.fixture(scope="module")
def nesting() -> None:
    """Skips where torch itself fails when a profiler begins while another one is at work, as torch 2.8 does."""
    code = (
        "from torch.profiler import ProfilerActivity as activity, profile;"
        "one, two = (profile(activities=[activity.CPU]) for _ in range(2));"
        "one.start(); two.start(); two.stop(); one.stop()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"torch {torch.__version__} has no second profiler: {done.stderr.strip().splitlines()[-1]}")


# -- somebody else -------------------------------------------------------------------------------------------------


def of_steps(profiler: torch.profiler.profile, begin: int, end: int) -> Callable[[int], None]:
    """Runs a profiler within two steps, and from the one to the other."""

    def within(step: int) -> None:
        if step == begin:
            profiler.start()
            work(step)
        if step == end:
            profiler.stop()

    return within


@pytest.mark.usefixtures("nesting")
@pytest.mark.parametrize(("begin", "end"), [(3, 3), (3, 4), (4, 4), (4, 6), (5, 5), (5, 9), (6, 6), (6, 8)])
def test_a_profiler_that_begins_in_a_window_keeps_its_trace_and_the_window_is_taken_later(
    tmp_path: Path, begin: int, end: int
) -> None:
    """Warm-up in steps 3 and 4, a window of 5 and 6."""
    said: list[str] = []
    profiler = other()
    windows = make(tmp_path, said, wait=2, warmup=2)
    found = run(windows, 20, within=of_steps(profiler, begin, end))
    assert f"work {begin}" in exported(profiler, tmp_path)
    [window] = found
    assert window.first > end
    assert names(window.trace.path)[2:] == [f"work {window.first}", f"work {window.last}"]
    assert said[0].startswith("window 1 of 1 is lost: another profiler of torch was started in it")


@pytest.mark.parametrize("schedule", [None, {"wait": 0, "warmup": 4, "active": 2}])
def test_a_window_waits_for_a_profiler_that_is_recording_or_in_its_warm_up(
    tmp_path: Path, schedule: dict[str, int] | None
) -> None:
    said: list[str] = []
    profiler = other(schedule=None if schedule is None else torch.profiler.schedule(repeat=1, **schedule))
    profiler.start()

    def within(step: int) -> None:
        if schedule is not None:
            profiler.step()
        elif step == 6:
            profiler.stop()

    [window] = run(make(tmp_path, said), 12, within=within)
    assert window.first == 8
    assert said == [
        "window 1 of 1 waits: another profiler of torch is in the way, and torch profiles for one at a time"
    ]
    assert "work 6" in exported(profiler, tmp_path)
    if schedule is not None:
        profiler.stop()


def test_a_profiler_that_never_ends_leaves_no_window_which_is_said_by_name(tmp_path: Path) -> None:
    said: list[str] = []
    windows = Windows(
        Schedule(wait=1, warmup=1, active=1), tmp_path, worker="rank0", busy=lambda: "the Profiler", say=said.append
    )
    run(windows, 10)
    assert windows.finish() is None
    assert len(said) == 2
    assert "waits: the Profiler is in the way" in said[0]
    assert said[1] == "window 1 of 1 was not taken: the Profiler was in the way until training ended"


def test_a_loop_that_fails_while_somebody_else_profiles_does_not_end_their_profile(tmp_path: Path) -> None:
    said: list[str] = []
    windows, profiler = make(tmp_path, said, active=5), other()
    run(windows, 3)
    profiler.start()
    work(4)
    windows.discard()
    assert recording()
    profiler.stop()
    assert "work 4" in exported(profiler, tmp_path)


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ProfileError, match=r"the folder .*file/traces for traces cannot be written: Not a directory"):
        writable(tmp_path / "file" / "traces")
    assert list(writable(tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files there")
def test_a_disk_without_room_costs_the_window_only_and_nothing_is_left_on_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import resource

    said: list[str] = []
    windows = make(tmp_path, said, warmup=1, active=1, repeat=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # as if there were no room for more
    try:
        assert not run(windows, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    capfd.readouterr()  # torch's complaint, and pytest's own output must not meet the limit
    [message] = said
    assert "the window of the steps 2 to 2 could not be written to" in message
    assert "MB left" in message
    assert not list(tmp_path.iterdir())
    [window] = run(windows, 2, first=3)
    assert list(tmp_path.iterdir()) == [window.trace.path]


def test_a_folder_that_vanishes_costs_the_window_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    folder = writable(tmp_path / "traces")
    windows = make(folder, said, repeat=2)
    assert not run(windows, 3, within=lambda step: folder.rmdir() if step == 2 else None)
    assert said[0].startswith(f"the window of the steps 2 to 3 could not be written to {folder}")
    writable(folder)
    assert len(run(windows, 3, first=4)) == 1


LOOP = """
import sys, torch
from pathlib import Path
from lit_symopt.profiling.schedule import Schedule
from lit_symopt.profiling.windows import Windows
windows = Windows(Schedule(wait=0, warmup=1, active=3, repeat=10**6), Path(sys.argv[1]), worker="rank0")
x = torch.ones(2, 2)
for step in range(10**9):
    windows.before(step)
    for _ in range(3000):
        x = x * 1
    windows.after()
    print(step, flush=True)
"""


@pytest.mark.parametrize("when", ["in a window", "while a file is written"])
def test_a_killed_process_leaves_only_whole_traces(tmp_path: Path, when: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        while not traces(tmp_path):  # the first is there, others follow
            process.stdout.readline()
        if when == "in a window":
            while int(process.stdout.readline()) % 4 != 1:
                pass
        else:
            while not list(tmp_path.glob(".*.half")):
                pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    if when == "while a file is written":
        assert list(tmp_path.glob(".*.half"))
    assert traces(tmp_path)
    for path in traces(tmp_path):
        json.loads(path.read_text())
        assert len([name for name in names(path) if name.startswith("ProfilerStep")]) == 3


# -- schedules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("wait", -1), ("warmup", -2), ("skip_first", -1), ("active", 0), ("repeat", 0), ("active", 1.5), ("wait", True)],
)
def test_a_number_that_cannot_be_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name}={value!r} of a profile must be a whole number, at least"):
        Schedule(**{name: value})


def test_windows_without_a_step_between_them_are_refused() -> None:
    Schedule(wait=0, warmup=0, repeat=1)
    with pytest.raises(ConfigError, match="repeat=2 windows of a profile need a step between them: set warmup or wait"):
        Schedule(wait=0, warmup=0, repeat=2)


def test_a_schedule_says_what_a_number_of_steps_is_too_few_for() -> None:
    schedule = Schedule(skip_first=1, wait=10, warmup=2, active=3, repeat=2)
    assert schedule.steps == 31
    assert schedule.too_long_for(31, "max_steps=31") is None
    never, cut, some = (str(schedule.too_long_for(steps, f"max_steps={steps}")) for steps in (13, 14, 16))
    numbers = "skip_first=1 + wait=10 + warmup=2 + active=3 = 16 steps until the first window is whole, and max_steps="
    assert never == f"no window becomes active: {numbers}13 leaves 13. Lower wait, warmup or skip_first"
    assert cut == f"the first window is cut short: {numbers}14 leaves 14. Lower wait, warmup or active"
    assert some == "1 of repeat=2 windows will be whole: all of them take 31 steps, and max_steps=16 leaves 16"


@pytest.mark.parametrize("steps", range(1, 33))
def test_what_a_schedule_says_beforehand_is_what_happens(tmp_path: Path, steps: int) -> None:
    schedule = Schedule(skip_first=1, wait=2, warmup=1, active=2, repeat=3)
    said: list[str] = []
    windows = Windows(schedule, tmp_path, worker="rank0", say=said.append)
    whole = len(run(windows, steps))
    windows.before(steps + 1)
    kept = windows.finish()
    before = schedule.too_long_for(steps, "it")
    if before is None:
        assert whole == 3
    elif before.startswith("no window"):
        assert whole == 0
        assert kept is None
    elif before.startswith("the first"):
        assert whole == 0
        assert kept is not None
    else:
        assert before.startswith(f"{whole} of repeat=3")
