"""From the options of `lit-symopt bench` to its result: check, let everybody step, count, and print."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from typing import Any

import torch

from lit_symopt.bench import cases
from lit_symopt.bench.accuracy import Range, checked_shapes, range_of_opponent, range_of_ours
from lit_symopt.bench.contest import Contestant, Outcome, compete, short
from lit_symopt.bench.counting import breakdown, least_seconds, products, scratch_bytes
from lit_symopt.bench.opponents import opponents
from lit_symopt.bench.ours import PREFIX
from lit_symopt.bench.result import Result, Row, lines, parts_table, table
from lit_symopt.bench.shapes import shape_list
from lit_symopt.bench.tensors import Numbers
from lit_symopt.profiling.ceilings import measure_ceilings
from lit_symopt.profiling.device import describe
from lit_symopt.profiling.run import Ceilings
from lit_symopt.revision import revision


def measure(given: Namespace, numbers: Numbers) -> Result:
    """Everything, printed as it is found.

    Args:
        given: the options, checked.
        numbers: where and of which dtype.
    """
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    if given.case == "launches":
        return _launches(given, numbers)
    ranges: dict[str, Range] = {}
    case = _case(given, numbers, ranges)
    absent = dict(case.absent)
    for name, why in absent.items():
        print(f"- {name}: {why}", flush=True)
    print(f"{case.shapes.name}: {len(case.shapes.blocks)} parameters, {case.shapes.elements:,} numbers", flush=True)
    # Before and after: what else the machine does meets one of them more than the other, and the best counts.
    before = _ceilings(case.contestants, numbers)
    outcome = compete(case.contestants, rounds=given.rounds, steps=given.steps, device=numbers.device)
    ceilings = best_of(before, _ceilings(case.contestants, numbers))
    parts = breakdown(case.contestants[0].step, numbers.device)
    result = Result(
        case=given.case,
        rows=_rows(case.contestants, outcome, ranges, numbers, ceilings),
        absent={**absent, **outcome.failed},
        shapes=cases.described(case.shapes),
        settings=_settings(given),
        device=describe(numbers.device),
        ceilings=ceilings,
        parts=tuple(map(asdict, parts)),
        note=case.note,
    )
    show(result)
    return result


def show(result: Result) -> None:
    """Prints the table and what is to be said below it."""
    if result.rows:
        print(f"\n{table(result)}\n")
    print("\n".join(lines(result)))
    if result.parts:
        print(f"\n{parts_table(result)}", flush=True)


def best_of(first: Ceilings, second: Ceilings) -> Ceilings:
    """The higher of both measurements, by what was measured; and its spread.

    Example:
        >>> low, high = (Ceilings(flops={"float32": x}, bytes_per_second=3 - x, spread={"copy": x}) for x in (1.0, 2.0))
        >>> best_of(low, high)
        Ceilings(flops={'float32': 2.0}, bytes_per_second=2.0, spread={'copy': 1.0})
    """
    flops = {name: max(first.flops[name], second.flops[name]) for name in first.flops}
    copy = max(first.bytes_per_second, second.bytes_per_second)
    spread = {}
    for name in first.spread:
        spread[name] = (first if _reached(first, name) >= _reached(second, name) else second).spread[name]
    return Ceilings(bytes_per_second=copy, flops=flops, spread=spread)


def _reached(ceilings: Ceilings, name: str) -> float:
    return ceilings.flops.get(name, ceilings.bytes_per_second)


def commit() -> str:
    """Of the package, with `-dirty` if it was changed since; `unknown` outside a git tree."""
    found = revision()
    return "unknown" if found is None else f"{found.commit[:12]}{'-dirty' if found.changed else ''}"


def _options(given: Namespace) -> dict[str, Any]:
    """Of our optimizer."""
    return {name: getattr(given, name) for name in ("stack", "precision", "backend", "scratch")}


def _case(given: Namespace, numbers: Numbers, ranges: dict[str, Range]) -> cases.Case:
    options = _options(given)
    if given.case == "row_norm":
        return cases.row_norm(numbers, checkouts=given.checkout, backend=given.backend, scratch=given.scratch)
    shapes = shape_list(given.shapes, layers=given.layers)
    sides = checked_shapes(shapes)
    ours = range_of_ours(sides, numbers, **options) if sides else None
    if ours is not None:
        ranges[PREFIX + given.stack] = ours
    if given.case == "products":
        return cases.bare_products(shapes, numbers, **options)
    case = cases.steps(shapes, numbers, **options, against=given.against, checkouts=given.checkout)
    known = opponents(given.checkout)
    for contestant in case.contestants[1:]:
        if contestant.iterations is None or not sides:
            continue
        try:
            if contestant.name.startswith(PREFIX):
                found = range_of_ours(sides, numbers, **{**options, **cases.named(contestant.name)})
            else:
                found = range_of_opponent(known[contestant.name], sides, numbers)
        except Exception as error:  # noqa: BLE001  an opponent may fail in any way, and the others go on
            case.absent[contestant.name] = short(error)
            continue
        if found is not None:
            ranges[contestant.name] = found
    case.contestants[:] = [one for one in case.contestants if one.name not in case.absent]
    if ranges:
        said = ", ".join(f"{name} {found}" for name, found in ranges.items())
        print(f"singular values above 0.01 ‖M‖_F of random {' '.join(f'{m}×{n}' for m, n in sides)} come to: {said}")
    return case


def _ceilings(contestants: list[Contestant], numbers: Numbers) -> Ceilings:
    used = dict.fromkeys(one.products for one in contestants if one.products is not None)
    return measure_ceilings(numbers.device, list(used) or [numbers.dtype])


def _rows(
    contestants: list[Contestant], outcome: Outcome, ranges: dict[str, Range], numbers: Numbers, ceilings: Ceilings
) -> tuple[Row, ...]:
    rows = []
    for one in contestants:
        if one.name not in outcome.times:
            continue
        # In this order: a compiled step that was watched for its products may never run compiled again.
        times, scratch = outcome.times[one.name], scratch_bytes(one.step, numbers.device)
        counted = products(one.step) if one.products is not None else None
        known = counted is not None or one.products is None
        rows.append(
            Row(
                name=one.name,
                about=one.about,
                times=times,
                products=counted,
                products_dtype=None if one.products is None else str(one.products).removeprefix("torch."),
                bytes=one.least_bytes,
                scratch=None if scratch is None else scratch + one.kept(),
                share=least_seconds(one, counted, ceilings) / times.median if known else None,
                range=ranges.get(one.name),
                iterations=one.iterations,
            )
        )
    return tuple(rows)


def _launches(given: Namespace, numbers: Numbers) -> Result:
    found = cases.count_launches(given.shapes, numbers, **_options(given))
    few, many = found.values()
    what = "kernels launched" if numbers.device.type == "cuda" else "operators called"
    note = (
        f"{what} by a step with {' and '.join(map(str, found))} layers; growth {many / few - 1:.1%}, aim: at most 10 %"
    )
    print(f"{note}: {few} and {many}")
    return Result(
        case="launches",
        launches=found,
        shapes={"name": given.shapes},
        settings=_settings(given),
        device=describe(numbers.device),
        note=note,
    )


def _settings(given: Namespace) -> dict[str, Any]:
    names = ("shapes", "layers", "stack", "precision", "backend", "scratch", "dtype", "rounds", "steps", "seed")
    return {name: getattr(given, name) for name in names if getattr(given, name) is not None}
