"""A trace is read as it was written, and what is no whole trace is refused with its name and the way out."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, schedule

from lit_symopt.errors import ProfileError
from lit_symopt.profiling.events import read_trace
from tests.profiling.traces import MAIN, ORIGIN, STREAM, Made


def small() -> Made:
    return (
        Made()
        .note("ProfilerStep#4", 0.0, 100.0)
        .op("aten::mm", 10.001, 20.5, external=17)
        .launch(88, 12.0, 14.0)
        .kernel("void gemm<float>(int)", 30.0, 42.125, correlation=88, external=17)
    )


def write(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


def test_events_are_what_the_file_says(tmp_path: Path) -> None:
    step, operator, launch, kernel = small().trace(tmp_path).events[:4]
    assert step.is_step
    assert not operator.is_step
    assert (operator.name, operator.category, operator.thread) == ("aten::mm", "cpu_op", (MAIN, MAIN))
    assert operator.external_id == kernel.external_id == 17
    assert operator.start_us == pytest.approx(ORIGIN + 10.001, abs=1e-3)
    assert operator.duration_us == 10.499
    assert kernel.end_us - kernel.start_us == pytest.approx(12.125, abs=1e-3)
    assert launch.args["correlation"] == kernel.args["correlation"] == 88
    assert kernel.thread == (0, STREAM)


def test_arrows_and_names_of_threads_are_no_events(tmp_path: Path) -> None:
    names = [event.name for event in small().trace(tmp_path).events]
    assert names == ["ProfilerStep#4", "aten::mm", "cudaLaunchKernel", "void gemm<float>(int)", "PyTorch Profiler (0)"]


def test_allocations_are_kept_with_what_they_say(tmp_path: Path) -> None:
    made = small()
    args = {"Total Allocated": 2048, "Bytes": 64, "Device Id": -1, "Device Type": 0, "Addr": 93906798544000}
    where = {"pid": MAIN, "tid": MAIN, "ts": ORIGIN + 5}
    made.events.append({"ph": "i", "cat": "cpu_instant_event", "s": "t", "name": "[memory]", **where, "args": args})
    (event,) = (event for event in made.trace(tmp_path).events if event.name == "[memory]")
    assert event.duration_us == 0.0
    assert dict(event.args) == args


def test_a_compressed_trace_is_the_same_trace(tmp_path: Path) -> None:
    plain = small().trace(tmp_path)
    packed = tmp_path / "made.pt.trace.json.gz"
    packed.write_bytes(gzip.compress(plain.path.read_bytes()))
    assert read_trace(packed).events == plain.events


def test_names_that_are_not_text_do_not_hide_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "odd.pt.trace.json"
    text = json.dumps(small().op("odd", 50.0, 60.0).document())
    path.write_bytes(text.encode().replace(b'"odd"', b'"o\xff\x01d"'))
    assert any(event.name == "o�\x01d" for event in read_trace(path).events)


def test_times_that_are_none_are_left_out_and_a_negative_duration_is_none(tmp_path: Path) -> None:
    made = small().op("open", 50.0, 49.0).op("never", 50.0, float("inf")).op("undefined", float("nan"), 60.0)
    made.events.append({"ph": "X", "cat": "cpu_op", "name": "late", "ts": "soon", "dur": 1})
    durations = {event.name: event.duration_us for event in made.trace(tmp_path).events if event.category == "cpu_op"}
    assert durations == {"aten::mm": 10.499, "open": 0.0}


def test_a_real_window_has_the_steps_of_its_schedule(tmp_path: Path) -> None:
    path = tmp_path / "real.pt.trace.json.gz"
    with profile(
        activities=[ProfilerActivity.CPU],
        schedule=schedule(wait=2, warmup=1, active=2, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        for _ in range(5):
            torch.ones(3, 3) @ torch.ones(3, 3)
            profiler.step()
    events = read_trace(path).events
    assert [event.name for event in events if event.is_step] == ["ProfilerStep#3", "ProfilerStep#4"]
    assert sum(event.name == "aten::mm" for event in events) == 2


@pytest.mark.parametrize("kept", [0.05, 0.4, 0.8, 0.99])
@pytest.mark.parametrize("packed", [False, True])
def test_a_trace_that_is_cut_off_is_refused(tmp_path: Path, kept: float, packed: bool) -> None:
    whole = json.dumps(small().document()).encode()
    if packed:
        whole = gzip.compress(whole)
    path = tmp_path / ("cut.json.gz" if packed else "cut.json")
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ProfileError, match=r"cut\.json.* no whole (?s:.*) record the window again"):
        read_trace(path)


@pytest.mark.parametrize("content", [b"", b"   ", b"PK\x03\x04\xff\xfe", b"<html></html>"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=r"other\.json is no whole JSON"):
        read_trace(path)
    path = tmp_path / "other.json.gz"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=r"other\.json\.gz is no whole"):
        read_trace(path)


@pytest.mark.parametrize("document", [{}, 3, None, "trace", {"traceEvents": {"a": 1}}, {"format": 1, "windows": []}])
def test_json_of_something_else_is_refused(tmp_path: Path, document: Any) -> None:
    with pytest.raises(ProfileError, match=r"else\.json is JSON, but no trace.*'traceEvents'"):
        read_trace(write(tmp_path / "else.json", document))


FOREIGN = [
    {"ph": "X", "name": "task", "ts": 3, "dur": 4, "pid": 1, "tid": 1},
    {"ph": "B", "name": "render", "cat": "blink", "ts": 3, "pid": 1, "tid": 1},
    {"ph": "X", "name": 7, "cat": ["a"], "ts": "soon"},
    {"ph": "X"},
    "note",
]


@pytest.mark.parametrize("document", [FOREIGN, {"traceEvents": FOREIGN}, [], {"traceEvents": []}])
def test_the_trace_of_another_program_is_refused(tmp_path: Path, document: Any) -> None:
    with pytest.raises(ProfileError, match=r"else\.json is a trace of [05] entries, but none of them"):
        read_trace(write(tmp_path / "else.json", document))


def test_a_trace_without_steps_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stepless.json"
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.ones(3) + 1
    profiler.export_chrome_trace(str(path))
    with pytest.raises(ProfileError, match=r"stepless\.json has \d+ events but no ProfilerStep#N.*KernelTime"):
        read_trace(path)


def test_a_missing_trace_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"missing\.json cannot be read: No such file"):
        read_trace(tmp_path / "missing.json")
    with pytest.raises(ProfileError, match=r"cannot be read: Is a directory"):
        read_trace(tmp_path)
