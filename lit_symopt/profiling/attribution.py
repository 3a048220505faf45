"""What the kernels of a trace were run for: `TraceCosts` from a `Trace`.

**Steps** are the intervals `ProfilerStep#N`; the thread they are on is the main thread. What began outside of them is
left out.

**On a CPU** the main thread is the device: each of its instants belongs to the innermost operator or annotation, so
`device_us` adds up to the duration of the step. Operators of other threads (a pinning loader, gloo) run in parallel
with it; they would break that sum and are `host_us`.

**With a GPU** `device_us` is the duration of kernels, copies and fills. One belongs where and when it was launched,
which its correlation id tells; all kernels of a CUDA graph carry that of the launch. If the launch is not in the trace,
the operator that launched it tells, by its external id. A kernel without either is shown in the stage `other` of the
step in which it starts. Streams run in parallel: communication that overlaps computation counts in full, so the sum
can exceed the span of the step. `host_us` is the time that each operator, annotation and launch has for itself, on all
threads; that of the main thread adds up to the step.

**Other threads**: where no range is open on the thread itself, the range counts that is open on the main thread when
the event begins. So what autograd's own thread launches is `train/backward`.

**A batch of several roles** is split by their elements, calls too.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lit_symopt.profiling.costs import HOST, Cost, Stage, StepCosts, TraceCosts
from lit_symopt.profiling.events import ANNOTATION, LAUNCHES, ON_GPU, OPERATOR, STEP_PREFIX, Event, Thread, Trace
from lit_symopt.profiling.nesting import NONE, nest
from lit_symopt.profiling.places import OTHER, Place, places_of

_ON_HOST = frozenset({OPERATOR, ANNOTATION}) | LAUNCHES


def attribute(trace: Trace, *, worker: str = "rank0") -> TraceCosts:
    """Attributes the time of every step of a trace to stage, role, rule, phase and kernel.

    Args:
        trace: of one process.
        worker: its name.
    """
    threads: dict[Thread, list[Event]] = {}
    kernels = []
    for event in trace.events:
        if event.category in _ON_HOST:
            threads.setdefault(event.thread, []).append(event)
        elif event.category in ON_GPU:
            kernels.append(event)
    window = _Window(trace)
    main = _Host(threads.pop(window.thread), window, main=None)
    hosts = {window.thread: main, **{key: _Host(events, window, main=main) for key, events in threads.items()}}
    main.measure_ranges()
    for host in hosts.values():
        host.count(as_device=host is main and not kernels)
    if kernels:
        _count_kernels(kernels, trace, window, hosts)
    costs = tuple(step.costs() for step in window.steps)
    return TraceCosts(device="cuda" if kernels else "cpu", worker=worker, steps=costs)


@dataclass
class _Step:
    """One step and its sums, in nanoseconds."""

    number: int
    start: int
    end: int
    update: int = 0
    validation: int = 0
    sums: dict[tuple[Stage, str, str, str, str], list[float]] = field(default_factory=dict)

    def add(self, place: Place, kernel: str, *, calls: int, device: int = 0, host: int = 0) -> None:
        for role, share in place.roles:
            sums = self.sums.setdefault((place.stage, role, place.rule, place.phase, kernel), [0.0, 0.0, 0.0])
            sums[0] += calls * share
            sums[1] += device * share
            sums[2] += host * share

    def costs(self) -> StepCosts:
        costs = []
        for (stage, role, rule, phase, kernel), (calls, device, host) in self.sums.items():
            where = {"stage": stage, "role": role, "rule": rule, "phase": phase, "kernel": kernel}
            costs.append(Cost(**where, calls=calls, device_us=device / 1e3, host_us=host / 1e3))  # type: ignore[arg-type]
        return StepCosts(
            step=self.number,
            wall_us=(self.end - self.start - self.validation) / 1e3,
            update_us=self.update / 1e3,
            costs=tuple(costs),
        )


class _Window:
    """The steps of a trace, the thread they are on, and a clock: nanoseconds since the first step began.

    Whole nanoseconds, of which a trace has at most three digits behind the point, add up without rounding.
    """

    def __init__(self, trace: Trace) -> None:
        found = [event for event in trace.events if event.is_step]
        self.thread = found[0].thread
        found = sorted((event for event in found if event.thread == self.thread), key=lambda event: event.start_us)
        self._origin = found[0].start_us
        self._starts, ends = [self.start(event) for event in found], [self.end(event) for event in found]
        # Rounded time stamps may overlap.
        ends = [*(min(end, after) for end, after in zip(ends, self._starts[1:], strict=False)), ends[-1]]
        numbers = [int(event.name.removeprefix(STEP_PREFIX)) for event in found]
        self.steps = [_Step(*step) for step in zip(numbers, self._starts, ends, strict=True)]

    def start(self, event: Event) -> int:
        """When an event begins."""
        return round((event.start_us - self._origin) * 1e3)

    def end(self, event: Event) -> int:
        """When it ends."""
        return self.start(event) + round(event.duration_us * 1e3)

    def step_at(self, time: int) -> _Step | None:
        """The step of a time."""
        step = self.last_step_before(time)
        return step if step is not None and time < step.end else None

    def last_step_before(self, time: int) -> _Step | None:
        """The last step that has begun at a time."""
        index = bisect_right(self._starts, time) - 1
        return self.steps[index] if index >= 0 else None


class _Host:
    """The operators, annotations and launches of one thread that begin in a step, and the place of each."""

    def __init__(self, events: Iterable[Event], window: _Window, *, main: _Host | None) -> None:
        spans: list[tuple[int, int, bool, int, Event, _Step]] = []
        for event in events:
            start, end = window.start(event), window.end(event)
            step = window.step_at(start)
            if step is not None:
                # On the main thread nothing lasts longer than its step; elsewhere nothing has to fit.
                end = min(end, step.end) if main is None else end
                spans.append((start, -end, not event.is_step, len(spans), event, step))
        spans.sort()  # of those that begin together the longer one is outside, then the earlier one in the file
        self._main = main
        self._spans = [(event, step, start, -minus_end) for start, minus_end, _, _, event, step in spans]
        self._nesting = nest([start for _, _, start, _ in self._spans], [end for _, _, _, end in self._spans])
        bare = [(event, start, end) for event, _, start, end in self._spans]
        self._own_places = places_of(bare, self._nesting.parents)

    def place_at(self, time: int) -> Place:
        """Where the thread is at a time; where the main thread is, if nothing says it here."""
        index = self._nesting.at(time)
        place = None if index == NONE else self._own_places[index]
        if place is None:
            place = OTHER if self._main is None else self._main.place_at(time)
        return place

    def measure_ranges(self) -> None:
        """Adds up how long updates and validation take, from the ends of their ranges."""
        for (_, step, start, end), place, parent in zip(
            self._spans, self._own_places, self._nesting.parents, strict=True
        ):
            around = OTHER if parent == NONE else self._own_places[parent] or OTHER
            inside, duration = place or OTHER, end - start
            step.update += duration * (inside.in_update - around.in_update)
            step.validation += duration * ((inside.stage == "validation") - (around.stage == "validation"))

    def count(self, *, as_device: bool) -> None:
        """Adds the time that every event has for itself to its step."""
        for (event, step, start, _), place, own in zip(self._spans, self._own_places, self._nesting.own, strict=True):
            # What other threads call a piece of work, as gloo its collectives, says more than that it is no operator.
            named = event.category != ANNOTATION or (self._main is not None and place is None)
            kernel = event.name if named else HOST
            where = place or self.place_at(start)
            step.add(where, kernel, calls=1, device=own if as_device else 0, host=0 if as_device else own)


def _count_kernels(kernels: Iterable[Event], trace: Trace, window: _Window, hosts: Mapping[Thread, _Host]) -> None:
    """Adds the durations of kernels, copies and fills to the steps in which they were launched."""
    launches: dict[int, Event] = {}
    operators: dict[int, Event] = {}
    for event in trace.events:
        if event.category in LAUNCHES and "correlation" in event.args:
            launches.setdefault(event.args["correlation"], event)
        elif event.category == OPERATOR and event.external_id:
            operators.setdefault(event.external_id, event)
    for kernel in kernels:
        launch = launches.get(kernel.args.get("correlation", NONE)) or operators.get(kernel.external_id)
        if launch is None:
            place, step = OTHER, window.last_step_before(window.start(kernel))
        else:
            time = window.start(launch)
            place, step = hosts[launch.thread].place_at(time), window.step_at(time)
        if step is not None:
            step.add(place, kernel.name, calls=1, device=window.end(kernel) - window.start(kernel))
