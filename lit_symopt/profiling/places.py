"""Where in a training step a moment lies, from the names of the ranges around it.

| range | opens |
|---|---|
| `ProfilerStep#N` | stage `other` |
| `train/<stage>` | the stage |
| `Optimizer.zero_grad#...` | stage `other` |
| `Optimizer.step#<Class>.step` | stage `optimizer`; the update of that class, if no `symopt/step` lies in it |
| `symopt/step` | the update, of no known role yet |
| `symopt/<roles>/<rule>/<phase>` | the update, a phase of it |

The innermost one decides: with a closure, `Optimizer.step#` contains `train/forward`. What is inside an update and
opens nothing of its own belongs to the update, another `Optimizer.step#` too. All of validation is validation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lit_symopt.profiling.costs import STAGE_RANGE, STAGES, UNATTRIBUTED, Stage
from lit_symopt.profiling.events import ANNOTATION, Event
from lit_symopt.profiling.nesting import NONE
from lit_symopt.ranges import JOIN, PREFIX, STEP

EVERY_ROLE = "(all)"
"""The role of the whole update of an optimizer without ranges of its own; its class is the rule."""

TORCH_STEP, TORCH_ZERO_GRAD = "Optimizer.step#", "Optimizer.zero_grad#"
"""What the names of torch's own ranges around an optimizer's methods begin with."""


@dataclass(frozen=True)
class Place:
    """Where a moment lies.

    Attributes:
        stage: of the training step.
        roles: role and share of each; one empty role outside of updates.
        rule, phase: of the update.
    """

    stage: Stage
    roles: tuple[tuple[str, float], ...] = (("", 1.0),)
    rule: str = ""
    phase: str = ""

    @property
    def in_update(self) -> bool:
        """Whether it lies in an update."""
        return bool(self.roles[0][0])


OTHER = Place("other")
_STAGES = {f"{STAGE_RANGE}{stage}": Place(stage) for stage in STAGES}
_VALIDATION = _STAGES[f"{STAGE_RANGE}validation"]
_IN_OPTIMIZER = Place("optimizer")
_STEP = Place("optimizer", ((UNATTRIBUTED, 1.0),))


def places_of(spans: Sequence[tuple[Event, int, int]], parents: Sequence[int]) -> list[Place | None]:
    """The place inside each event, with its start and end; `None` where nothing says it.

    Args:
        spans: of one thread, in order of their starts, those outside first.
        parents: index of the event that each lies in; see `lit_symopt.profiling.nesting`.
    """
    updates = [start for event, start, _ in spans if event.category == ANNOTATION and event.name == STEP]
    places: list[Place | None] = []
    for (event, start, end), parent in zip(spans, parents, strict=True):
        place = None if parent == NONE else places[parent]
        if event.category == ANNOTATION:
            has_ranges = bisect_left(updates, start) < bisect_left(updates, end)
            place = opened(event, place, has_ranges=has_ranges)
        places.append(place)
    return places


def opened(annotation: Event, around: Place | None, *, has_ranges: bool) -> Place | None:
    """The place inside an annotation.

    Args:
        annotation: an event of the category `user_annotation`.
        around: the place around it; `None` if nothing says it.
        has_ranges: whether `symopt/step` lies in the annotation.
    """
    name = annotation.name
    if around == _VALIDATION:
        return around
    if annotation.is_step or name.startswith(TORCH_ZERO_GRAD):
        return OTHER
    if name == STEP:
        return _STEP
    if name.startswith(f"{PREFIX}/") and name.count("/") == 3:
        return _of_phase(name, _elements(annotation.args))
    if name.startswith(TORCH_STEP) and not (around is not None and around.in_update):
        return _IN_OPTIMIZER if has_ranges else _of_class(name)
    return _STAGES.get(name, around)


@lru_cache(maxsize=4096)
def _of_phase(name: str, elements: tuple[int, ...]) -> Place:
    _, joined, rule, phase = name.split("/")
    roles = joined.split(JOIN)
    # Without record_shapes a trace does not say how many elements each role has.
    weights = elements if len(elements) == len(roles) and sum(elements) > 0 else (1,) * len(roles)
    return Place(
        "optimizer", tuple((role, w / sum(weights)) for role, w in zip(roles, weights, strict=True)), rule, phase
    )


@lru_cache(maxsize=4096)
def _of_class(name: str) -> Place:
    kind = name.removeprefix(TORCH_STEP).removesuffix(".step")
    return Place("optimizer", ((EVERY_ROLE, 1.0),), kind)


def _elements(args: Mapping[str, Any]) -> tuple[int, ...]:
    """The numbers of elements of the roles; the tensor behind them, which has the batch's shape, has no value."""
    values = args.get("Concrete Inputs", ())
    return tuple(int(value) for value in values if isinstance(value, str) and value.isdecimal())
