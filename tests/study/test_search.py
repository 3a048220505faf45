from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median

import pytest

from lit_symopt.errors import ConfigError
from lit_symopt.study.plan import Run, trial
from lit_symopt.study.search import JOURNAL, Searcher, best
from lit_symopt.study.spec import Axis, Contender, Search, Study
from tests.study import made

CENTER = {made.LR: 0.4, made.EMBEDDING: -0.5, made.HEAD: 0.3}


def one_search(sampler: str = "gp", *, trials: int = 12, seed: int = 1) -> Study:
    return made.study(
        sampler=sampler, trials=trials, search_seed=seed, families=("qwen3",), names=("muon",), seeds=(99,)
    )


def bowl(rates: dict[str, float], noise: float) -> float:
    """A quadratic in the logarithms of the rates, 3 nats at its center and 3.36 at the start of the search."""
    off = [math.log(rate / made.STARTS[option], made.SPAN) - CENTER[option] for option, rate in rates.items()]
    return 3.0 + sum(weight * value**2 for weight, value in zip((1.5, 0.4, 0.2), off, strict=True)) + noise


def search(study: Study, folder: Path) -> list[float]:
    """Losses of all trials."""
    searcher, draw, losses = Searcher(study, folder), random.Random(0), []
    while (rates := searcher.next("qwen3", "muon")) is not None:
        losses.append(bowl(rates, draw.gauss(0.0, 0.005)))
        searcher.tell("qwen3", "muon", rates, losses[-1])
    return losses


def run_trials(study: Study, folder: Path, count: int) -> list[Run]:
    """So many trials, each with its result on disk, as the command does it."""
    searcher, runs = Searcher(study, folder), []
    for _ in range(count):
        rates = searcher.next("qwen3", "muon")
        assert rates is not None
        runs.append(trial(study, family="qwen3", contender="muon", rates=rates))
        searcher.tell("qwen3", "muon", rates, made.write(runs[-1], folder).loss)
    return runs


def rates_of(runs: list[Run]) -> list[dict[str, float]]:
    return [dict(run.rates) for run in runs]


def test_the_best_of_twelve_trials_of_the_gaussian_process_is_far_below_the_start(tmp_path: Path) -> None:
    left = []
    for seed in range(1, 6):
        folder = tmp_path / str(seed)
        folder.mkdir()
        losses = search(one_search(seed=seed), folder)
        assert len(losses) == 12
        left.append((min(losses) - 3.0) / (losses[0] - 3.0))
    assert median(left) < 0.15, left  # random trials leave about 0.4


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random"])
def test_trials_begin_at_the_start_stay_in_the_range_and_never_repeat(tmp_path: Path, sampler: str) -> None:
    tried = rates_of(run_trials(one_search(sampler, trials=8), tmp_path, 8))
    assert tried[0] == made.STARTS
    assert len({tuple(rates.values()) for rates in tried}) == 8
    for rates in tried:
        for option, rate in rates.items():
            assert made.STARTS[option] / made.SPAN <= rate * 1.005
            assert rate <= made.STARTS[option] * made.SPAN * 1.005
            assert rate == float(f"{rate:.3g}")


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random"])
def test_a_search_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path: Path, sampler: str) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    study = one_search(sampler, trials=7)
    expected = rates_of(run_trials(study, whole, 7))
    found = rates_of(run_trials(study, parts, 3))
    open_ = Searcher(study, parts).next("qwen3", "muon")  # killed while this one ran
    found += rates_of(run_trials(study, parts, 4))
    assert found[3] == open_
    assert found == expected
    assert Searcher(study, parts).next("qwen3", "muon") is None


def test_a_run_that_finished_after_the_search_was_killed_counts(tmp_path: Path) -> None:
    study = one_search("random", trials=2)
    rates = Searcher(study, tmp_path).next("qwen3", "muon")
    assert rates is not None
    made.write(trial(study, family="qwen3", contender="muon", rates=rates), tmp_path)
    second = Searcher(study, tmp_path).next("qwen3", "muon")
    assert second is not None
    assert second != rates
    made.write(trial(study, family="qwen3", contender="muon", rates=second), tmp_path)
    assert Searcher(study, tmp_path).next("qwen3", "muon") is None


def test_the_results_are_enough_where_the_journal_is_lost(tmp_path: Path) -> None:
    study = one_search("random", trials=5)
    run_trials(study, tmp_path, 3)
    (tmp_path / JOURNAL).unlink()
    assert len(run_trials(study, tmp_path, 2)) == 2
    assert Searcher(study, tmp_path).next("qwen3", "muon") is None


def test_a_run_whose_folder_was_removed_is_asked_for_again(tmp_path: Path) -> None:
    study = one_search("random", trials=3)
    runs = run_trials(study, tmp_path, 3)
    (runs[1].folder(tmp_path) / "result.json").unlink()
    searcher = Searcher(study, tmp_path)
    rates = searcher.next("qwen3", "muon")
    assert rates == runs[1].rates
    searcher.tell("qwen3", "muon", rates, 3.0)
    assert searcher.next("qwen3", "muon") is None


def test_the_half_line_of_a_killed_process_does_no_harm(tmp_path: Path) -> None:
    study = one_search("random", trials=4)
    run_trials(study, tmp_path, 2)
    journal = tmp_path / JOURNAL
    written = journal.read_bytes()
    journal.write_bytes(written[:-20])  # the last tell
    run_trials(study, tmp_path, 2)
    assert all(json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines())


def test_a_journal_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text("not a journal\nat all\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"optuna\.journal is no journal of Optuna .* remove it"):
        Searcher(one_search(), tmp_path)


def test_more_trials_extend_a_search(tmp_path: Path) -> None:
    run_trials(one_search("random", trials=3), tmp_path, 3)
    assert len(run_trials(one_search("random", trials=5), tmp_path, 2)) == 2


def test_the_order_in_which_contenders_run_does_not_matter(tmp_path: Path) -> None:
    study = made.study(sampler="random", trials=4, families=("qwen3", "gemma3"), names=("adamw", "muon"))
    pairs = [(family.name, contender.name) for family, contender in study.pairs()]
    found = []
    for name, order in (("there", pairs), ("back", pairs[::-1])):
        folder = tmp_path / name
        folder.mkdir()
        searcher = Searcher(study, folder)
        tried: dict[tuple[str, str], list[dict[str, float]]] = {pair: [] for pair in pairs}
        for _, pair in product(range(4), order):
            rates = searcher.next(*pair)
            assert rates is not None
            tried[pair].append(rates)
            searcher.tell(*pair, rates, 3.0 + random.Random(str(rates)).random())
        found.append(tried)
    assert found[0] == found[1]
    assert found[0]["qwen3", "adamw"][1] != found[0]["qwen3", "muon"][1]
    assert made.HEAD not in found[0]["gemma3", "adamw"][0]  # an axis of the other family only


def test_all_trials_may_diverge(tmp_path: Path) -> None:
    searcher = Searcher(one_search("gp", trials=5), tmp_path)
    for _ in range(5):
        rates = searcher.next("qwen3", "muon")
        assert rates is not None
        searcher.tell("qwen3", "muon", rates, math.nan)
    assert searcher.next("qwen3", "muon") is None


def grid() -> Study:
    axes = (Axis(option=made.LR, values=(1e-3, 2e-3)), Axis(option=made.HEAD, values=(0.0, 1.0, 2.0)))
    study = one_search("random")
    return replace(
        study,
        contenders=(Contender(name="muon", search=axes), Contender(name="fixed")),
        search=Search(sampler="grid", trials=None, seed=1),
    )


def test_a_grid_tries_all_combinations_and_needs_no_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    runs = run_trials(grid(), tmp_path, 2)
    runs += run_trials(grid(), tmp_path, 4)
    assert [tuple(run.rates.values()) for run in runs] == list(product((1e-3, 2e-3), (0.0, 1.0, 2.0)))
    assert Searcher(grid(), tmp_path).next("qwen3", "muon") is None


def test_a_contender_without_a_search_has_no_trials(tmp_path: Path) -> None:
    searcher = Searcher(grid(), tmp_path)
    assert searcher.next("qwen3", "fixed") is None
    with pytest.raises(ConfigError, match="fixed searches nothing in qwen3"):
        searcher.tell("qwen3", "fixed", {}, 3.0)


def test_rates_that_were_not_asked_for_are_refused(tmp_path: Path) -> None:
    searcher = Searcher(one_search("random"), tmp_path)
    with pytest.raises(ConfigError, match=r"muon in qwen3 did not ask for .*'model.symopt.lr': 1.0"):
        searcher.tell("qwen3", "muon", {made.LR: 1.0}, 3.0)


def test_results_of_another_search_are_refused(tmp_path: Path) -> None:
    study = one_search("random")
    run = trial(study, family="qwen3", contender="muon", rates={made.LR: 0.01})
    made.write(run, tmp_path)
    with pytest.raises(ConfigError, match=f"{run.name} tried model.symopt.lr, but the search is over .*lm_head"):
        Searcher(study, tmp_path)


@pytest.mark.parametrize("missing", ["optuna", "scipy"])
def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf'{missing}.*pip install "lit-symopt\[study\]"'):
        Searcher(one_search("gp"), tmp_path)


def test_best_is_the_lowest_finished_trial_and_ties_go_by_name() -> None:
    study = one_search("random")
    runs = made.trials(study, family="qwen3", contender="muon")
    results = [made.result(run) for run in runs]
    assert best(results, "qwen3", "muon") == made.best_trial(runs)
    equal = [replace(one, loss=3.0, status="finished") for one in results]
    first = min(equal, key=lambda one: one.run)
    assert best(equal[::-1], "qwen3", "muon") == first.rates
    final = replace(results[0], purpose="final", status="finished", loss=1.0)
    assert best([*results, final], "qwen3", "muon") == made.best_trial(runs)


def test_no_finished_trial_is_an_error_that_names_the_search() -> None:
    study = one_search("random", trials=2)
    runs = made.trials(study, family="qwen3", contender="muon")
    diverged = [replace(made.result(run), status="diverged", loss=None) for run in runs]
    with pytest.raises(ConfigError, match="none of the 2 trials of muon in qwen3 finished"):
        best(diverged, "qwen3", "muon")
