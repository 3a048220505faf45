"""What a step of a contestant takes besides time: operations, memory, launches; in steps of their own, never timed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lit_symopt.bench.contest import Contestant
from lit_symopt.profiling.costs import Cost, total
from lit_symopt.profiling.events import ANNOTATION, MEMORY, OPERATOR, Event, Thread, Trace, read_trace
from lit_symopt.profiling.memory import most_at_once
from lit_symopt.profiling.run import Ceilings
from lit_symopt.ranges import named

STEP = "bench/step"
KERNELS = 3
_KERNEL = "kernel"


def traced(step: Callable[[], object], device: torch.device, *, steps: int = 1, memory: bool = False) -> Trace:
    """A profile of a few steps after one to warm up.

    Args:
        step: to be taken.
        device: on which it computes.
        steps: in the profile.
        memory: also every allocation.
    """
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with tempfile.TemporaryDirectory(prefix="lit-symopt-bench-") as folder:
        path = Path(folder) / "step.pt.trace.json"
        with profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=steps, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
            profile_memory=memory,
        ) as profiler:
            for _ in range(1 + steps):
                with named(STEP):
                    step()
                    if device.type != "cpu":
                        torch.accelerator.synchronize(device)
                profiler.step()
        return read_trace(path)


def products(step: Callable[[], object]) -> float | None:
    """Floating-point operations of the matrix products of a step, as torch counts them.

    `None` if there are none, or if they cannot be counted (kernels that torch does not know).
    """
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with FlopCounterMode(display=False) as counter:
            step()
    except Exception:  # noqa: BLE001  whatever a compiled step makes of being watched
        return None
    return float(counter.get_total_flops()) or None


def scratch_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """The most that a step had allocated at once, over what there was when it began.

    On a GPU what torch's allocator says, else from a profile of every allocation of torch on the host.
    """
    if device.type == "cuda":
        torch.accelerator.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.accelerator.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    trace = traced(step, device, memory=True)
    changes = [
        (event.start_us, int(event.args.get("Bytes", 0)), int(event.args.get("Device Type", 0)))
        for event in trace.events
        if event.name == MEMORY
    ]
    return most_at_once(changes, [(event.start_us, event.end_us) for event in _steps(trace)])


def launches(step: Callable[[], object], device: torch.device) -> int:
    """On a GPU the kernels that a step launches, else its operators that no other operator calls."""
    trace = traced(step, device)
    begin, end = next((event.start_us, event.end_us) for event in _steps(trace))
    if device.type == "cuda":
        return sum(event.category == _KERNEL and event.start_us >= begin for event in trace.events)
    inside = [e for e in trace.events if e.category == OPERATOR and begin <= e.start_us and e.end_us <= end]
    return _outermost(inside)


@dataclass(frozen=True, kw_only=True)
class Share:
    """A part of one of our steps.

    Attributes:
        rule, phase: as `lit_symopt.ranges` names them.
        seconds: of the whole part, in a step under the profiler.
        share: of the step.
        kernels: the three that take most of it, with their shares of the step.
    """

    rule: str
    phase: str
    seconds: float
    share: float
    kernels: dict[str, float]


def breakdown(step: Callable[[], object], device: torch.device, *, steps: int = 3) -> list[Share]:
    """Where the time of one of our steps goes, by rule and phase, the costliest first."""
    from lit_symopt.profiling.attribution import attribute

    trace = attribute(traced(step, device, steps=steps))
    costs: list[Cost] = [cost for one in trace.steps for cost in one.costs if cost.in_update]
    whole = sum(cost.device_us for cost in costs)
    if not whole:
        return []
    found = []
    for (rule, phase), time in total(costs, lambda cost: (cost.rule, cost.phase)).items():
        own = total((cost for cost in costs if (cost.rule, cost.phase) == (rule, phase)), lambda cost: cost.kernel)
        costliest = sorted(own, key=lambda name: -own[name])[:KERNELS]
        found.append(
            Share(
                rule=rule or "none",
                phase=phase or "outside of phases",
                seconds=time / 1e6 / len(trace.steps),
                share=time / whole,
                kernels={kernel: own[kernel] / whole for kernel in costliest},
            )
        )
    return sorted(found, key=lambda share: -share.seconds)


def least_seconds(contestant: Contestant, products: float | None, ceilings: Ceilings) -> float:
    """The time that operations and bytes take at the ceilings, one after the other: products, and what moves.

    A step that computes while it moves could be faster, at best by half.
    """
    computing = 0.0
    if products and contestant.products is not None:
        computing = products / ceilings.flops[str(contestant.products).removeprefix("torch.")]
    return computing + contestant.least_bytes / ceilings.bytes_per_second


def _steps(trace: Trace) -> list[Event]:
    return [event for event in trace.events if event.category == ANNOTATION and event.name == STEP]


def _outermost(operators: Sequence[Event]) -> int:
    """How many operators begin in no other of the same thread."""
    count = 0
    ends: dict[Thread, float] = {}
    for event in sorted(operators, key=lambda event: (event.start_us, -event.end_us)):
        if event.start_us >= ends.get(event.thread, float("-inf")):
            count += 1
            ends[event.thread] = event.end_us
    return count
