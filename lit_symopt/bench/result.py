"""The result of a contest: a row for each contestant, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

from lit_symopt.bench.accuracy import LOW, Range
from lit_symopt.bench.contest import Times
from lit_symopt.errors import ProfileError
from lit_symopt.profiling.run import Ceilings
from lit_symopt.profiling.stacks import aligned

FORMAT = 1
HEAD = (
    "optimizer",
    "median ms",
    "middle half",
    "min to max",
    "time over ours",
    "products GF",
    "bytes MB",
    "share",
    "scratch MB",
    "σ range",
    "iterations",
)


PARTS = ("our step under the profiler", "ms", "share of it", "costliest kernels in it")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A contestant.

    Attributes:
        name, about: who.
        times: of all rounds.
        products: floating-point operations of the matrix products of a step; `None` if not counted.
        expected: of the same by formula, for ours.
        products_dtype: in which they are computed.
        bytes: that a step must at least move.
        scratch: bytes that a step allocates at most at once.
        share: the time that products and bytes take at the ceilings, over the median.
        range: where singular values came to lie.
        iterations: of the orthogonalization.
    """

    name: str
    about: str
    times: Times
    products: float | None = None
    expected: float | None = None
    products_dtype: str | None = None
    bytes: float = 0.0
    scratch: int | None = None
    share: float | None = None
    range: Range | None = None
    iterations: int | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything that was measured.

    Attributes:
        case: `step`, `products`, `row_norm` or `launches`.
        rows: ours first.
        absent: those that could not take part, with what they said or how to get them.
        shapes: what was updated.
        settings: rounds, steps, dtype and the like.
        device: what it ran on.
        ceilings: of the machine, in the same run.
        parts: where our time goes.
        launches: of a step by number of layers.
        by_process: time over ours in each process, of every opponent, if there were several.
        note: what the table should be read with.
    """

    case: str
    rows: tuple[Row, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    device: Mapping[str, Any] = field(default_factory=dict)
    ceilings: Ceilings | None = None
    parts: tuple[Mapping[str, Any], ...] = ()
    launches: Mapping[int, int] = field(default_factory=dict)
    by_process: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain types, with the ratios."""
        value = asdict(self)
        for row, own in zip(value["rows"], self.rows, strict=True):
            ratio = own.times.over(self.rows[0].times)
            row["median"], row["against_ours"] = own.times.median, asdict(ratio)
        return {"format": FORMAT, **value}

    @staticmethod
    def load(path: Path) -> Result:
        """Reads the file of a record.

        Raises:
            ProfileError: for a file that is none.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["format"] != FORMAT:
                raise ProfileError(f"{path} has format {value['format']}, not {FORMAT}; measure again")
            own = {key: value[key] for key in (one.name for one in fields(Result))}
            own["rows"] = tuple(map(_row, own["rows"]))
            own["parts"] = tuple(own["parts"])
            own["launches"] = {int(layers): count for layers, count in own["launches"].items()}
            own["by_process"] = {name: tuple(ratios) for name, ratios in own["by_process"].items()}
            own["ceilings"] = None if own["ceilings"] is None else Ceilings(**own["ceilings"])
            return Result(**own)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ProfileError):
                raise
            raise ProfileError(f"{path} is no result of a benchmark: {error!r}") from error


def _row(value: dict[str, Any]) -> Row:
    own = {key: value[key] for key in (one.name for one in fields(Row))}
    own["times"] = Times(tuple(tuple(round_) for round_ in own["times"]["rounds"]))
    if own["range"] is not None:
        own["range"] = Range(**{**own["range"], "shapes": tuple(tuple(shape) for shape in own["range"]["shapes"])})
    return Row(**own)


def table(result: Result) -> str:
    """The rows as plain text."""
    return aligned(HEAD, [cells(row, result) for row in result.rows])


def lines(result: Result) -> Iterator[str]:
    """What is to be said below the table."""
    for row in result.rows:
        if row.range is not None and not row.range.within:
            yield (
                f"! {row.name}: singular values above 0.01 ‖M‖_F come to lie in [{row.range.lowest:.3f}, "
                f"{row.range.highest:.3f}], not in [{LOW}, 1.2]"
            )
    for name, ratios in result.by_process.items():
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        yield f"{name}: ×{median(ratios):.2f} of our time, the median of {len(ratios)} processes ({each})"
    for name, why in result.absent.items():
        yield f"- {name}: {why}"
    if result.ceilings is not None:
        peaks = ", ".join(f"{name} {peak / 1e9:,.0f} GFLOP/s" for name, peak in result.ceilings.flops.items())
        spread = ", ".join(f"{name} ×{value:.2f}" for name, value in result.ceilings.spread.items())
        copy = f"copy {result.ceilings.bytes_per_second / 1e9:.1f} GB/s"
        yield f"ceilings: {peaks}, {copy} (highest over lowest: {spread})"
    if result.note:
        yield result.note


def parts_table(result: Result) -> str:
    """Where our time goes."""
    return aligned(PARTS, [part_cells(part) for part in result.parts], left=(0, 3))


def part_cells(part: Mapping[str, Any]) -> tuple[str, ...]:
    """A part as text, below `PARTS`."""
    kernels = ", ".join(f"{name} {share:.1%}" for name, share in part["kernels"].items())
    return f"{part['rule']}/{part['phase']}", f"{part['seconds'] * 1e3:,.2f}", f"{part['share']:.1%}", kernels


def cells(row: Row, result: Result) -> tuple[str, ...]:
    """A row as text, below `HEAD`."""
    low, high = row.times.quartiles
    least, most = row.times.spread
    flagged = row.range is not None and not row.range.within
    return (
        row.name,
        f"{row.times.median * 1e3:,.2f}",
        f"{low * 1e3:,.2f} to {high * 1e3:,.2f}",
        f"{least * 1e3:,.2f} to {most * 1e3:,.2f}",
        str(row.times.over(result.rows[0].times)),
        "–" if row.products is None else f"{row.products / 1e9:,.2f}",
        f"{row.bytes / 1e6:,.1f}" if row.bytes else "–",
        "–" if row.share is None else f"{row.share:.0%}",
        "–" if row.scratch is None else f"{row.scratch / 1e6:,.1f}",
        "–" if row.range is None else f"{row.range}{' !' if flagged else ''}",
        "–" if row.iterations is None else str(row.iterations),
    )
