from __future__ import annotations

import csv
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from lit_symopt.study.result import Result, read_results
from lit_symopt.study.table import last_tenth, table, write_tables
from tests.study import made

FAMILIES = ("gemma3", "olmoe")


@pytest.fixture
def results(tmp_path: Path) -> list[Result]:
    made.write_all(made.study(families=FAMILIES, trials=4), tmp_path)
    return read_results(tmp_path)


def test_a_row_says_what_the_run_was_and_came_to(results: list[Result]) -> None:
    rows = table(results)
    assert len(rows) == len(results) == 2 * (3 * 4 + 3 * 1 + 2 * 3 * 4)
    assert list(rows[0]) == [
        *("family", "contender", "stack", "purpose", "seed", "length", "lr", "embedding", "lm_head"),
        *("tokens", "seconds", "loss", "status", made.TAG),
    ]
    last = rows[-1]
    assert (last["family"], last["contender"], last["purpose"], last["length"], last["seed"]) == (
        *("olmoe", "symmetric", "final"),
        *(0.5, 4),
    )
    (run,) = (one for one in results if one.run == "olmoe-symmetric-final-x0.5-s4")
    assert last["loss"] == pytest.approx(run.loss, abs=1e-6)
    assert last["lr"] == run.rates[made.LR]
    assert last["tokens"] == 200 * made.TOKENS_A_STEP
    assert rows[0]["lm_head"] is None  # gemma3 ties it


def test_a_diverged_run_has_a_row_without_a_loss(results: list[Result]) -> None:
    diverged = replace(results[0], status="diverged", loss=None)
    (row,) = table([diverged])
    assert (row["status"], row["loss"]) == ("diverged", None)


def test_the_order_of_the_results_does_not_matter(results: list[Result]) -> None:
    shuffled = results[:]
    random.Random(0).shuffle(shuffled)
    assert table(shuffled) == table(results)


def test_tables_are_the_same_bytes_when_they_are_made_anew(results: list[Result], tmp_path: Path) -> None:
    first = [path.read_bytes() for path in write_tables(results, tmp_path)]
    second = [path.read_bytes() for path in write_tables(read_results(tmp_path), tmp_path)]
    assert first == second


def test_both_files_hold_the_table(results: list[Result], tmp_path: Path) -> None:
    rows = table(results)
    as_csv, as_jsonl = write_tables(results, tmp_path)
    assert [json.loads(line) for line in as_jsonl.read_text(encoding="utf-8").splitlines()] == rows
    with as_csv.open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows] == read


def test_no_results_are_a_table_without_rows(tmp_path: Path) -> None:
    as_csv, as_jsonl = write_tables([], tmp_path)
    assert as_csv.read_text(encoding="utf-8") == "family,contender,stack,purpose,seed,length\n"
    assert as_jsonl.read_text(encoding="utf-8") == ""


def test_options_with_the_same_short_name_keep_their_whole_names(results: list[Result]) -> None:
    one = replace(results[0], rates={"model.symopt.lr": 0.1})
    other = replace(results[1], rates={"model.other.lr": 0.2, "data.seed": 1.0})
    (row, _) = table([one, other])
    assert {"model.symopt.lr", "model.other.lr", "data.seed"} < row.keys()
    assert "lr" not in row
    assert row["seed"] == one.seed


def test_a_tag_is_averaged_over_the_last_tenth_of_the_steps(results: list[Result]) -> None:
    one = replace(
        results[0], steps=100, records={"tag": ((50, 7.0), (90, 5.0), (95, 1.0), (100, 2.0)), "early": ((9, 1.0),)}
    )
    assert last_tenth(one, "tag") == 1.5
    assert last_tenth(one, "early") is None
    assert last_tenth(one, "never") is None
