"""What a group element does to the loss of a module, in fp32 and in float64, at three points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lit_symopt.audit.evaluate import Evaluator
from lit_symopt.audit.moves import Edit, Move
from lit_symopt.audit.points import Values

FACTORS = (1.0, 4.0, 16.0, 0.25)
"""What the writing blocks of a site are multiplied with until its broken element shows."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What counts as unmoved and as moved.

    Attributes:
        fp32, float64: largest relative change of the loss under a symmetry. What a module computes in float32 inside
            float64 is widened where it can be, and 1e-15 is usual; 1e-7 allows for a module where it cannot. Plain
            torch can be held to 1e-10.
        control: the least relative change of the loss by a broken element.
        commuting: largest relative distance of an update from commuting.
    """

    fp32: float = 1e-4
    float64: float = 1e-7
    control: float = 1e-3
    commuting: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Largest relative changes of the loss over all points, and how much larger than the limits they are."""

    fp32: float
    float64: float | None
    excess: float
    note: str = ""


class Laboratory:
    """A module in both dtypes, with the points at which it is evaluated: its own, a random one, and that one fitted.

    `double` is None for a module that does not run in float64: fp32 decides then.
    """

    def __init__(
        self,
        single: Evaluator,
        double: Evaluator | None,
        *,
        given: Values,
        sharpened: Values,
        generic: Values,
        fitted: Values,
        limits: Limits,
        elements: int,
    ) -> None:
        self.single, self.double = single, double
        self.points = (given, generic, fitted)
        self._kept = (given, sharpened, sharpened)
        self.limits = limits
        self.elements = elements
        self._bases: dict[tuple[object, ...], float] = {}

    @property
    def deciding(self) -> str:
        """The finest precision there is."""
        return "fp32" if self.double is None else "float64"

    @property
    def limit(self) -> float:
        """The limit in that precision."""
        return self.limits.fp32 if self.double is None else self.limits.float64

    def changes(self, move: Move) -> Changes:
        """How far a move moves the loss."""
        single = double = excess = 0.0
        notes: list[str] = []
        for index in range(3):
            in_single = self._change(move, move.edits, index, is_double=False)
            if self.double is None:
                single, excess = _larger(single, in_single), _larger(excess, in_single / self.limits.fp32)
                continue
            in_double = self._change(move, move.edits, index, is_double=True)
            if not in_single <= self.limits.fp32 and (flips := self._flips(move, index, self.double)):
                notes.append(f"{flips} selections of experts are ties within fp32: float64 decides")
                excess = _larger(excess, in_double / self.limits.float64)
            else:
                excess = _larger(excess, _larger(in_single / self.limits.fp32, in_double / self.limits.float64))
            single, double = _larger(single, in_single), _larger(double, in_double)
        return Changes(
            fp32=single,
            float64=None if self.double is None else double,
            excess=excess,
            note="; ".join(dict.fromkeys(notes)),
        )

    def control(self, move: Move, whole: Move) -> tuple[float, float]:
        """How far the broken element moves the loss, and how far beyond the limit the whole one does at that point.

        Where a site has too little or too much weight in the stream for its element to show, what it writes there is
        made larger or smaller; the symmetry is then tried there as well.

        Args:
            move: the element on one site.
            whole: the element on all sites, which may share a parameter.
        """
        whole = replace(whole, keep=move.keep | whole.keep, writes=move.writes)
        broken = replace(move, labels=move.labels if move.broken_labels else None)
        best = 0.0
        for factor in FACTORS if move.writes else FACTORS[:1]:
            for index in (2, 1):
                change = self._change(broken, move.broken, index, is_double=False, factor=factor)
                best = max(best, change)
                if change > self.limits.control:
                    if factor == 1.0:
                        return change, 0.0
                    return change, self._change(whole, whole.edits, index, is_double=True, factor=factor)
        return best, 0.0

    def _values(self, index: int, move: Move, factor: float = 1.0) -> Values:
        values = {**self.points[index], **{name: self._kept[index][name] for name in move.keep}}
        return values if factor == 1.0 else {**values, **{name: factor * values[name] for name in move.writes}}

    def _change(
        self, move: Move, edits: Mapping[str, Edit], index: int, *, is_double: bool, factor: float = 1.0
    ) -> float:
        evaluator = self.double if is_double and self.double is not None else self.single
        values = self._values(index, move, factor)
        key = (index, is_double, move.keep, factor, move.writes if factor != 1.0 else ())
        if key not in self._bases:
            self._bases[key] = evaluator.loss(values)
        base = self._bases[key]
        moved = evaluator.loss(evaluator.edited(values, edits), labels=move.labels, relabels=move.relabels)
        return abs(moved - base) / max(abs(base), 1e-12)

    def _flips(self, move: Move, index: int, double: Evaluator) -> int:
        """How many top-k selections differ between fp32 and float64, before or after the move."""
        values = self._values(index, move)
        flips = 0
        for edits, labels in (({}, None), (move.edits, move.labels)):
            one, other = (
                evaluator.choices(evaluator.edited(values, edits), labels=labels, relabels=move.relabels)
                for evaluator in (self.single, double)
            )
            if [a.shape for a in one] != [b.shape for b in other]:
                return 0  # not the same selections: nothing can be said of them
            flips += sum(int((a != b).any(-1).sum()) for a, b in zip(one, other, strict=True))
        return flips


def _larger(a: float, b: float) -> float:
    return b if not b <= a else a
