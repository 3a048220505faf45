"""A move: one group element acting on a site, and the broken version of it that must not pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Change = Callable[[Tensor], Tensor]
Relabel = Literal["tokens", "classes", "both"]


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What a parameter (or buffer) becomes: `change` of the float64 value of `source`, usually its own."""

    source: str
    change: Change


@dataclass(frozen=True, kw_only=True)
class Move:
    """One element of a symmetry, acting on one site.

    Attributes:
        symmetry: its row in the report, such as `neurons`.
        site: kind of site, such as `mlp`.
        where: name of the module.
        edits: what each parameter becomes, by name.
        broken: the control: a part of the edits, or others that are not of the group.
        labels: permutation of token ids or classes that goes with the edits.
        relabels: what it permutes.
        broken_labels: whether the control permutes them too.
        keep: parameters that must be as they are for the symmetry to hold (constant gains).
        writes: the weights by which the site writes to the stream.
    """

    symmetry: str
    site: str
    where: str
    edits: Mapping[str, Edit]
    broken: Mapping[str, Edit]
    labels: Tensor | None = None
    relabels: Relabel = "tokens"
    broken_labels: bool = False
    keep: frozenset[str] = field(default=frozenset())
    writes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A symmetry that is not tried on a site: it does not apply there, or the blocks contradict each other."""

    symmetry: str
    site: str
    where: str
    reason: str
    fails: bool = False


def without(edits: Mapping[str, Edit], *names: str) -> dict[str, Edit]:
    """All edits but those of some parameters: what breaks a joint action."""
    return {name: edit for name, edit in edits.items() if name not in names}
