"""The results of a study as a table: a row for each run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from lit_symopt.study.result import Result
from lit_symopt.study.spec import short_name

CSV, JSONL = "results.csv", "results.jsonl"
_FIRST = ("family", "contender", "stack", "purpose", "seed", "length")
_LAST_TENTH = 0.9


def table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each run, all with the same columns in the same order, whatever the order of the results.

    Columns: family, contender, stack, purpose, seed, length; the searched rates by their short names; tokens; seconds
    (training alone); loss (nats a token, over the whole validation set); status; and of each recorded tag the mean
    over the last tenth of the run's steps. What a run has not is `None`.

    Args:
        results: of one study.

    Returns:
        Rows by family, contender, trials before final runs, longest first, seed and rates.
    """
    rates = _rate_columns(results)
    tags = sorted({tag for one in results for tag in one.records})
    rows = []
    for one in sorted(results, key=lambda one: _place(one, rates)):
        row: dict[str, Any] = {name: getattr(one, name) for name in _FIRST}
        row |= {column: one.rates.get(option) for option, column in rates.items()}
        row |= {"tokens": one.tokens, "seconds": round(one.seconds, 2)}
        row |= {"loss": None if one.loss is None else round(one.loss, 6), "status": one.status}
        for tag in tags:
            value = last_tenth(one, tag)
            row[tag] = None if value is None else float(f"{value:.6g}")
        rows.append(row)
    return rows


def write_tables(results: Sequence[Result], folder: Path) -> tuple[Path, Path]:
    """Writes `results.csv` and `results.jsonl`, the same bytes for the same results.

    Args:
        results: of one study.
        folder: that exists.

    Returns:
        The two paths.

    Raises:
        OSError: if they cannot be written.
    """
    rows = table(results)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else _FIRST, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (folder / CSV).write_text(text.getvalue(), encoding="utf-8")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / JSONL).write_text(lines, encoding="utf-8")
    return folder / CSV, folder / JSONL


def last_tenth(result: Result, tag: str) -> float | None:
    """The mean of what a run logged under a tag in the last tenth of its steps; `None` if nothing.

    Args:
        result: of the run.
        tag: recorded, such as `router/load_cv`.
    """
    values = [value for step, value in result.records.get(tag, ()) if step > _LAST_TENTH * result.steps]
    return mean(values) if values else None


def _place(one: Result, rates: dict[str, str]) -> tuple[Any, ...]:
    own = tuple(one.rates.get(option, float("-inf")) for option in rates)
    return one.family, one.contender, one.purpose != "trial", -one.length, one.seed, own, one.run


def _rate_columns(results: Sequence[Result]) -> dict[str, str]:
    """Columns by option; the short name, unless two options share it or a column has it."""
    options = sorted({option for one in results for option in one.rates}, key=lambda name: (name.count("."), name))
    shorts = [short_name(option) for option in options]
    taken = {*_FIRST, "tokens", "seconds", "loss", "status"}
    return {
        option: option if shorts.count(short) > 1 or short in taken else short
        for option, short in zip(options, shorts, strict=True)
    }
