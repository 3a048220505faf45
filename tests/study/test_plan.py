from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_symopt.errors import ConfigError
from lit_symopt.study.plan import Names, Run, finals, trial
from lit_symopt.study.reading import from_dict
from lit_symopt.study.schedule import Schedule
from lit_symopt.study.search import Searcher
from lit_symopt.study.spec import Study
from tests.study import made
from tests.study.trained import PLAIN

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
LR, EMBEDDING = "model.symopt.lr", "model.symopt.roles.embedding.lr_multiplier"


def plain(**changes: Any) -> Study:
    return from_dict({**PLAIN, **changes})


def value(arguments: list[str], option: str) -> str:
    """What an option is set to; the last one counts."""
    return [argument.split("=", 1)[1] for argument in arguments if argument.startswith(f"--{option}=")][-1]


def test_names_are_readable() -> None:
    one = trial(plain(), family="two", contender="adamw", rates={LR: 0.005, EMBEDDING: 20.0})
    assert one.name == "two-adamw-trial-lr0.005-embedding20-s1"
    names = [run.name for run in finals(plain(), family="two", contender="adamw", rates={LR: 0.005})]
    assert names == ["two-adamw-final-x1-s2", "two-adamw-final-x0.5-s2"]


def test_what_is_nearer_to_a_run_sets_more() -> None:
    option = "model.symopt.weight_decay"
    for number, levels in enumerate((["study"], ["study", "family"], ["study", "family", "contender"])):
        given = {level: {option: index} for index, level in enumerate(levels)}
        study = plain(
            set=given["study"],
            families={"two": {"config": "tiny.yaml", "set": given.get("family", {})}},
            contenders={"a": {"set": given.get("contender", {})}},
            reference=None,
            search=None,
        )
        (run,) = finals(study, family="two", contender="a", rates={})
        assert run.options(study)[option] == number
        (run,) = finals(study, family="two", contender="a", rates={option: 0.5})
        assert run.options(study)[option] == 0.5


@pytest.mark.parametrize(("length", "steps", "warmup"), [(1.0, 200, 20), (0.65, 130, 13), (0.004, 1, 0)])
def test_a_shorter_run_is_a_whole_run_with_its_own_schedule(length: float, steps: int, warmup: int) -> None:
    study = plain(steps=200, contenders={"a": {"lengths": [length]}}, reference=None)
    (run,) = finals(study, family="two", contender="a", rates={})
    options = run.options(study)
    assert options["trainer.max_steps"] == options["model.symopt.schedule.total_steps"] == steps
    assert options["model.symopt.schedule.warmup_steps"] == warmup


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("steps", [1, 7, 200])
def test_looks_are_evenly_spread_over_optimizer_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int, steps: int
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(f"trainer: {{accumulate_grad_batches: {batches}}}\n")
    study = plain(steps=steps, looks=10, reference=None)
    (run, _) = finals(study, family="two", contender="adamw", rates={})
    interval = int(value(run.arguments(study), "trainer.val_check_interval"))
    assert interval == math.ceil(steps / 10) * batches
    assert steps * batches // interval <= 10


def test_two_runs_with_the_same_name_are_an_error() -> None:
    families = {"a": "tiny.yaml", "a-b": "tiny.yaml"}
    contenders: dict[str, Any] = {"b-c": {}, "c": {}}
    study = plain(families=families, contenders=contenders, reference=None, search=None)
    with pytest.raises(ConfigError, match="two runs with the same name, a-b-c-final-x1-s2: b-c in a with"):
        Names(study)


def test_rates_that_look_alike_are_an_error() -> None:
    study = plain()
    names = Names(study)
    names.add(trial(study, family="two", contender="adamw", rates={LR: 0.1}))
    with pytest.raises(ConfigError, match="two runs with the same name"):
        names.add(trial(study, family="two", contender="adamw", rates={LR: 0.1 + 1e-9}))


def finish(study: Study, folder: Path, *, order: int) -> dict[str, Any]:
    """Runs a schedule with three open runs, of which another one ends each time; what came out, by name."""
    schedule = Schedule(study, folder, Searcher(study, folder))
    running: list[Run] = []
    while True:
        while len(running) < 3 and (run := schedule.next()) is not None:
            running.append(run)
        if not running:
            assert len(schedule.results) == schedule.total
            return {name: (one.rates, one.loss) for name, one in schedule.results.items()}
        run = running.pop(order % len(running))
        result = replace(made.result(run), options=run.options(study))
        run.folder(folder).mkdir(parents=True, exist_ok=True)
        result.save(run.folder(folder))
        schedule.done(run, result)


def test_the_order_in_which_runs_end_changes_nothing(tmp_path: Path) -> None:
    study = made.study(trials=3, families=("qwen3", "gemma3"), names=("adamw", "muon"))
    outcomes = []
    for order in range(3):
        folder = tmp_path / str(order)
        folder.mkdir()
        outcomes.append(finish(study, folder, order=order))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_more_trials_repeat_the_final_runs_only_where_the_best_rates_change(tmp_path: Path) -> None:
    few, many = (made.study(trials=trials, families=("qwen3",), names=("adamw", "muon")) for trials in (2, 8))
    before = finish(few, tmp_path, order=0)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/result.json")}
    after = finish(many, tmp_path, order=0)
    for path, when in written.items():
        name = path.parent.name
        assert (path.stat().st_mtime_ns == when) == (before[name] == after[name])


def test_a_family_has_callbacks_of_its_own_after_those_of_the_study() -> None:
    one, other = ({"class_path": f"lit_symopt.callbacks.{name}"} for name in ("LogitNorms", "LoadImbalance"))
    families = {"two": {"config": str(RECIPE), "callbacks": [other]}, "one": str(RECIPE)}
    study = plain(families=families, callbacks=[one], contenders={"a": {}}, reference=None, search=None)
    listed = []
    for family in ("two", "one"):
        (run,) = finals(study, family=family, contender="a", rates={})
        listed.append(json.loads(value(run.arguments(study), "trainer.callbacks")))
    assert listed == [[one, other], [one]]
