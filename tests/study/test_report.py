from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from lit_symopt.study.plan import finals, trial
from lit_symopt.study.plots import write_plots
from lit_symopt.study.report import report
from lit_symopt.study.result import Result, read_results
from lit_symopt.study.search import best
from lit_symopt.study.spec import Contender, Study
from tests.study import made


@pytest.fixture
def study() -> Study:
    return made.study(trials=4, families=("olmoe",), names=("adamw", "symmetric"))


@pytest.fixture
def results(study: Study, tmp_path: Path) -> list[Result]:
    made.write_all(study, tmp_path)
    return read_results(tmp_path)


def of(results: list[Result], contender: str, length: float = 1.0) -> list[Result]:
    return [one for one in results if (one.contender, one.purpose, one.length) == (contender, "final", length)]


def with_losses(results: list[Result], contender: str, length: float, losses: list[float]) -> list[Result]:
    changed = {one.run: loss for one, loss in zip(of(results, contender, length), losses, strict=True)}
    return [replace(one, loss=changed[one.run]) if one.run in changed else one for one in results]


def cells(text: str, start: str) -> list[str]:
    """The first line of a table that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_contender_has_its_rates_and_its_loss_with_the_spread(study: Study, results: list[Result]) -> None:
    results = with_losses(results, "adamw", 1.0, [3.2, 3.21, 3.25])
    results = with_losses(results, "symmetric", 1.0, [3.1, 3.11, 3.12])
    text = report(study, results)
    rates = best(results, "olmoe", "symmetric")
    row = cells(text, "symmetric")
    assert row[1] == "4"
    assert row[2] == f"lr {rates[made.LR]:.4g}, embedding {rates[made.EMBEDDING]:.4g}, lm_head {rates[made.HEAD]:.4g}"
    assert row[3] == "yes"
    assert row[4:6] == ["3.110 (3.100 to 3.120)", "-0.110"]
    assert row[6].startswith(f"{mean(one.seconds for one in of(results, 'symmetric')):.1f} (")
    assert row[7] == "3 of 3"
    assert cells(text, "adamw")[5] == "reference"
    assert "x86_64, 1 thread(s) a run, torch 2.13.0, Python 3.11.9, commit 0123abc" in text
    assert "seeds 2, 3, 4" in text


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ([3.1, 3.15, 3.2], "yes, without overlap"),
        ([3.1, 3.15, 3.21], "on average"),
        ([3.21, 3.25, 3.3], "no"),
    ],
)
def test_a_shorter_run_reaches_the_reference_or_not(
    study: Study, results: list[Result], losses: list[float], says: str
) -> None:
    results = with_losses(results, "adamw", 1.0, [3.2, 3.21, 3.25])
    text = report(study, with_losses(results, "symmetric", 0.65, losses))
    row = cells(text, "symmetric | 0.65")
    assert row[3] == says
    time = mean(one.seconds for one in of(results, "symmetric", 0.65)) / mean(
        one.seconds for one in of(results, "adamw")
    )
    assert row[5] == f"{time:.0%}"


def test_a_best_rate_at_the_end_of_its_range_is_named(study: Study) -> None:
    at_the_end = {**made.STARTS, made.LR: 0.04, made.HEAD: 0.125}
    run = trial(study, family="olmoe", contender="adamw", rates=at_the_end)
    result = replace(made.result(run), status="finished", loss=1.0)
    assert cells(report(study, [result]), "adamw")[3] == "no: lr highest, lm_head lowest"


def test_missing_and_diverged_runs_are_said(study: Study, results: list[Result]) -> None:
    gone = of(results, "symmetric")[0]
    lost = of(results, "symmetric", 0.8)[1]
    kept = [replace(one, status="diverged", loss=None) if one is lost else one for one in results if one is not gone]
    dropped = next(one for one in kept if one.purpose == "trial" and one.contender == "adamw")
    text = report(study, [one for one in kept if one is not dropped])
    assert "- symmetric: length 1 has no run yet with seed 2" in text
    assert "- symmetric: length 0.8 diverged with seed 3" in text
    assert "- adamw: 1 of 4 trials are missing" in text
    assert cells(text, "symmetric | 0.8")[3] == "no: diverged"
    assert cells(text, "symmetric")[7] == "2 of 3"


def test_final_runs_with_other_rates_than_the_best_are_said(study: Study, results: list[Result]) -> None:
    assert "other rates" not in report(study, results)
    moved = [replace(one, rates={**one.rates, made.LR: 0.5}) if one.purpose == "final" else one for one in results]
    assert "- adamw: final runs have other rates than the best of the trials" in report(study, moved)


def test_a_contender_without_a_search_has_no_trials(study: Study) -> None:
    fixed = replace(study, contenders=(Contender(name="adamw"),), search=None)
    runs = finals(fixed, family="olmoe", contender="adamw", rates={})
    row = cells(report(fixed, [made.result(run) for run in runs]), "adamw")
    assert row[1:4] == ["–", "–", "–"]
    assert row[7] == "3 of 3"


def test_recorded_tags_are_averaged_over_the_last_tenth(study: Study, results: list[Result]) -> None:
    flat = [replace(one, records={made.TAG: ((one.steps, one.seed / 10),)}) for one in results]
    assert "| adamw | 0.3 (0.2 to 0.4) |" in report(study, flat)


def test_plots_are_linked_and_no_path_of_the_machine_is_told(
    study: Study, results: list[Result], tmp_path: Path
) -> None:
    text = report(study, results, write_plots(study, results, tmp_path))
    for name in ("tokens", "seconds", "basin", "lengths", "finals", "record-router-load_cv"):
        assert f"]({name}.png)" in text
    assert str(tmp_path) not in text


def test_a_study_without_results_has_a_report(study: Study) -> None:
    text = report(study, [])
    assert cells(text, "adamw")[1:] == ["0", "–", "–", "–", "reference", "–", "0 of 3"]
    assert "- adamw: 4 of 4 trials are missing" in text
