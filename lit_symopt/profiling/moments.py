"""One training step of a trace over time: where its main thread is, and what its GPU runs, from moment to moment.

`attribution` adds times up; here they are kept apart, for a picture.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from lit_symopt.profiling.events import ANNOTATION, LAUNCHES, ON_GPU, Event, Trace
from lit_symopt.profiling.nesting import NONE, nest
from lit_symopt.profiling.places import OTHER, Place, places_of


@dataclass(frozen=True)
class Moment:
    """An interval in one place.

    Attributes:
        place: stage, roles, rule and phase.
        start_ms, end_ms: since the step began.
        kernel: what the GPU runs; empty on the host.
    """

    place: Place
    start_ms: float
    end_ms: float
    kernel: str = ""

    @property
    def ms(self) -> float:
        """How long it is."""
        return self.end_ms - self.start_ms


@dataclass(frozen=True, kw_only=True)
class StepMoments:
    """One step.

    Attributes:
        name: `ProfilerStep#12`.
        ms: its duration on the host.
        host: of the main thread, without gaps.
        gpu: kernels, copies and fills, each in the place of its launch; they may end after the step.
    """

    name: str
    ms: float
    host: tuple[Moment, ...]
    gpu: tuple[Moment, ...]


def moments(trace: Trace) -> StepMoments:
    """The step of a trace whose duration is in the middle; of an even number the shorter one."""
    steps = [event for event in trace.events if event.is_step]
    steps = [event for event in steps if event.thread == steps[0].thread]
    step = sorted(steps, key=lambda event: event.duration_us)[(len(steps) - 1) // 2]
    host = _host(trace.events, step)
    return StepMoments(name=step.name, ms=step.duration_us / 1e3, host=host, gpu=tuple(_gpu(trace.events, step, host)))


def _host(events: Iterable[Event], step: Event) -> tuple[Moment, ...]:
    """The places of the main thread: those of the innermost range, neighbors in the same place as one."""
    ranges = [
        event
        for event in events
        if event.category == ANNOTATION
        and event.thread == step.thread
        and step.start_us <= event.start_us < step.end_us
    ]
    # Of those that begin together the longer one is outside, and the step outside of all.
    ranges.sort(key=lambda event: (event.start_us, -event.duration_us, not event.is_step))
    starts = [round((event.start_us - step.start_us) * 1e3) for event in ranges]
    ends = [round((min(event.end_us, step.end_us) - step.start_us) * 1e3) for event in ranges]
    nesting = nest(starts, ends)
    places = places_of(list(zip(ranges, starts, ends, strict=True)), nesting.parents)
    found: list[Moment] = []
    for start, end, owner in zip(nesting.times, [*nesting.times[1:], max(ends)], nesting.owners, strict=True):
        place = (None if owner == NONE else places[owner]) or OTHER
        if found and found[-1].place == place:
            found[-1] = Moment(place, found[-1].start_ms, end / 1e6)
        elif end > start:
            found.append(Moment(place, start / 1e6, end / 1e6))
    return tuple(found)


def _gpu(events: Iterable[Event], step: Event, host: tuple[Moment, ...]) -> Iterable[Moment]:
    """What the main thread, or autograd's meanwhile, launched in the step."""
    launched: dict[object, float] = {}
    kernels = []
    for event in events:
        if event.category in LAUNCHES and step.start_us <= event.start_us < step.end_us:
            launched[event.args.get("correlation")] = (event.start_us - step.start_us) / 1e3
        elif event.category in ON_GPU:
            kernels.append(event)
    starts = [moment.start_ms for moment in host]
    for event in sorted(kernels, key=lambda event: event.start_us):
        time = launched.get(event.args.get("correlation"))
        if time is not None:
            place = host[max(bisect_right(starts, time) - 1, 0)].place
            start = (event.start_us - step.start_us) / 1e3
            yield Moment(place, start, start + event.duration_us / 1e3, event.name)
