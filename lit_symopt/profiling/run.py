"""What one process of one run measured: its windows, and what they are held against."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lit_symopt.errors import ProfileError
from lit_symopt.profiling.costs import TraceCosts

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the blocks of one role and rule must at least do in one step on this rank.

    Attributes:
        role, rule: of the blocks.
        flops: floating-point operations (2 for a multiply-add): matrix products, decompositions, and the least that
            is done element by element.
        bytes: gradient, state and weights read and written once each.
        dtype: in which the products are computed, as `float64`.
        blocks, elements: how many of each are updated here.
    """

    role: str
    rule: str
    flops: float
    bytes: float
    dtype: str
    blocks: int
    elements: int


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What this machine was seen to reach.

    Attributes:
        flops: floating-point operations a second of a large matrix product, by dtype.
        bytes_per_second: of a large copy, bytes read and bytes written added up.
        spread: highest over lowest of the repetitions, by dtype and for `copy`.
    """

    flops: dict[str, float]
    bytes_per_second: float
    spread: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes on one rank.

    Attributes:
        parameters, gradients: what this rank holds.
        masters: fp32 copies of parameters in half precision.
        state: of the optimizer without masters, by role.
        scratch: most that a step of the optimizer had allocated besides; `None` if not measured.
        peak: most that the process (on a GPU: its allocator) had at any time; `None` if not known.
    """

    rank: int
    parameters: int
    gradients: int
    masters: int
    state: dict[str, int]
    scratch: int | None
    peak: int | None


@dataclass(frozen=True, kw_only=True)
class RunProfile:
    """The record that a run's `KernelTime` writes for each profiled rank.

    Attributes:
        optimizer: the stack, or the class of an optimizer that has none.
        rank, world: of the process.
        device: what it ran on: `name`, `type`, `threads`, `torch`, ...
        windows: one for each trace.
        work: expected, by role and rule; empty for optimizers other than `SymOpt`.
        ceilings: of this machine, if they were measured.
        memory: of all ranks.
    """

    optimizer: str
    rank: int
    world: int
    device: Mapping[str, Any]
    windows: tuple[TraceCosts, ...]
    work: tuple[Work, ...] = ()
    ceilings: Ceilings | None = None
    memory: tuple[MemoryUse, ...] = ()

    def save(self, path: Path) -> None:
        """Writes a JSON file, as a whole or not at all.

        Raises:
            ProfileError: if it cannot be written, as on a full disk.
        """
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        half = path.with_name(f".{path.name}.half")
        try:
            half.write_text(text)
            os.replace(half, path)
        except OSError as error:
            with suppress(OSError):
                half.unlink(missing_ok=True)
            raise ProfileError(f"the record {path} could not be written: {error.strerror or error}") from error

    @staticmethod
    def load(path: Path) -> RunProfile:
        """Reads what `save` wrote.

        Raises:
            ProfileError: for a file that is not one.
        """
        try:
            value = json.loads(path.read_text())
            if value.pop("format") != FORMAT:
                raise ProfileError(f"{path} has another format than {FORMAT}; write it again with this version")
            ceilings = value["ceilings"]
            return RunProfile(
                **{
                    **value,
                    "windows": tuple(TraceCosts.from_json(window) for window in value["windows"]),
                    "work": tuple(Work(**work) for work in value["work"]),
                    "ceilings": None if ceilings is None else Ceilings(**ceilings),
                    "memory": tuple(MemoryUse(**memory) for memory in value["memory"]),
                }
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ProfileError):
                raise
            raise ProfileError(f"{path} is not the record of a profiled run: {error}") from error
