"""The record of a profile, `summary.json`: the time of every step by block and stage, and what it was measured on.

All samples (`lit_symopt.profiling.samples`) are kept, few as they are, so that another record can be compared with the
noise of this one known (`lit_symopt.profiling.compare`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import isfinite, nan
from pathlib import Path
from typing import Any

from lit_symopt.errors import ProfileError
from lit_symopt.profiling.costs import STAGES
from lit_symopt.profiling.samples import (
    Rounds,
    Samples,
    blocks_of,
    checked,
    control_of,
    costs_of,
    samples_of,
    stages_of,
)

FORMAT = 1
SUMMARY = "summary.json"


@dataclass(frozen=True, kw_only=True)
class StackRecord:
    """What one stack's updates cost.

    Attributes:
        attributed_share: of the device time of the optimizer's steps, what lies in a phase; NaN without such ranges.
        blocks: samples of the device time of the update, by `role/rule`; see `lit_symopt.profiling.costs`.
        stages: samples of the device time, by stage.
        control: samples of forward and backward, which no optimizer touches, by kernel: the costliest, and the others.
        wall: samples of the duration of a training step on the host.
        update: samples of the duration of the optimizer's steps in it on the host; zeros without such ranges.
        memory: of the ranks, in the first round, as of `MemoryUse`.
        work: expected of the first profiled rank, as of `Work`.
        ceilings: of the machine, as of `Ceilings`.
        roofline: points, as of `RooflinePoint`.
        settings: what its `SymOptConfig` says besides rates and schedule.
    """

    attributed_share: float
    blocks: Mapping[str, Samples]
    stages: Mapping[str, Samples]
    control: Mapping[str, Samples]
    wall: Samples
    update: Samples
    memory: Sequence[Mapping[str, Any]] = ()
    work: Sequence[Mapping[str, Any]] = ()
    ceilings: Mapping[str, Any] | None = None
    roofline: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(
        rounds: Rounds,
        *,
        roofline: Sequence[Mapping[str, Any]] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> StackRecord:
        """What the runs of a stack measured.

        Args:
            rounds: of each run, the records of its profiled ranks.
            roofline: points.
            settings: of the stack.

        Raises:
            ProfileError: if a run measured nothing.
        """
        for number, ranks in enumerate(rounds, start=1):
            if not ranks or not all(any(window.steps for window in rank.windows) for rank in ranks):
                raise ProfileError(f"round {number} measured no whole step; give it more steps, or a shorter schedule")
        first = rounds[0]
        costs = [cost for cost in costs_of(rounds) if cost.in_update]
        whole = sum(cost.device_us for cost in costs)
        return StackRecord(
            attributed_share=sum(cost.device_us for cost in costs if cost.attributed) / whole if whole else nan,
            blocks=blocks_of(rounds),
            stages=stages_of(rounds),
            control=control_of(rounds),
            wall=samples_of(rounds, lambda step: step.wall_us),
            update=samples_of(rounds, lambda step: step.update_us),
            memory=[asdict(use) for use in first[0].memory],
            work=[asdict(work) for work in first[0].work],
            ceilings=next((asdict(rank.ceilings) for ranks in rounds for rank in ranks if rank.ceilings), None),
            roofline=roofline,
            settings=settings or {},
        )


@dataclass(frozen=True, kw_only=True)
class Record:
    """A profile of a recipe.

    Attributes:
        command: as it was given.
        commit: of the package, with `dirty`; `None` outside a git tree.
        date: UTC.
        versions: of what computes.
        device: what the runs said of it.
        recipe: name, and what of model, data and trainer decides the cost, as key → value.
        spec: of the schedule.
        world: processes of a run.
        own: the stack of the recipe, a key of `stacks`.
        stacks: by name.
    """

    command: str
    commit: Mapping[str, Any] | None
    date: str
    versions: Mapping[str, str]
    device: Mapping[str, Any]
    recipe: Mapping[str, Any]
    spec: Mapping[str, Any]
    world: int
    own: str
    stacks: Mapping[str, StackRecord]

    def save(self, folder: Path) -> None:
        """Writes `summary.json`, as a whole or not at all."""
        value = _plain({"format": FORMAT, **asdict(self)})
        half = folder / f".{SUMMARY}.half"
        half.write_text(_text(value) + "\n", encoding="utf-8")
        os.replace(half, folder / SUMMARY)

    @staticmethod
    def load(folder: str | Path) -> Record:
        """Reads what `save` wrote.

        Raises:
            ProfileError: for a folder that is no record, or of another format.
        """
        path = Path(folder) / SUMMARY
        if not path.is_file():
            raise ProfileError(
                f"{folder} is not the folder of a record: there is no {path}; lit-symopt profile makes one"
            )
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(value, dict) or "format" not in value or "stacks" not in value:
                raise ProfileError(f"{path} is not the summary of a profile")
            if value.pop("format") != FORMAT:
                raise ProfileError(f"{path} has another format than {FORMAT}; profile again with this version")
            record = Record(**{**value, "stacks": {name: _stack(stack) for name, stack in value["stacks"].items()}})
            if record.own not in record.stacks:
                raise ProfileError(f"{path} has no stack {record.own!r}, though it says so")
            for name in ("versions", "device", "recipe", "spec"):
                if not isinstance(getattr(record, name), dict):
                    raise ProfileError(f"{path}: {name} is no mapping")
            return record
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ProfileError):
                raise
            raise ProfileError(f"{path} is not the whole summary of a profile: {error}") from error


def _stack(value: dict[str, Any]) -> StackRecord:
    share = value["attributed_share"]
    every = {key: {name: checked(one) for name, one in value[key].items()} for key in ("blocks", "stages", "control")}
    known = {field.name for field in fields(StackRecord)}
    shapes = {tuple(tuple(map(len, round_)) for round_ in one) for parts in every.values() for one in parts.values()}
    if len(shapes) != 1 or not set(STAGES) <= set(every["stages"]):
        raise ValueError("its samples are not of the same steps")
    return StackRecord(
        **{
            **{key: one for key, one in value.items() if key in known},
            **every,
            "attributed_share": nan if share is None else float(share),
            "wall": checked(value["wall"]),
            "update": checked(value["update"]),
        }
    )


def _plain(value: Any) -> Any:
    """For JSON: tenths of microseconds are enough, and what is not a number is null."""
    if isinstance(value, float):
        return (round(value, 1) if abs(value) >= 1 else round(value, 6)) if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _text(value: Any, indent: int = 0) -> str:
    """JSON with one line for each list of numbers, so that a record can be read and its changes seen."""
    inner, outer = " " * (indent + 1), " " * indent
    if isinstance(value, dict) and value:
        lines = [f"{inner}{json.dumps(key)}: {_text(one, indent + 1)}" for key, one in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{outer}}}"
    return json.dumps(value)
