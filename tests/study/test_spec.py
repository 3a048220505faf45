from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_symopt.errors import ConfigError
from lit_symopt.study.reading import from_dict, load
from tests.study.trained import PLAIN

LR = "model.symopt.lr"


def changed(path: str, value: Any) -> dict[str, Any]:
    """The plain study with one entry set, or added."""
    found = deepcopy(PLAIN)
    *where, last = path.split("/")
    entry = found
    for key in where:
        entry = entry[key]
    entry[last] = value
    return found


def test_a_study_is_read_with_its_short_forms_and_defaults(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(
        "name: s\nfamilies: {f: f.yaml}\ncontenders: {a: {}, b: {search: {model.symopt.lr: {start: 5e-3, span: 8}}}}\n"
        "steps: 10\nseeds: [2]\nsearch: {trials: 3}\n"
    )
    study = load(path)
    assert study.family("f").config == "f.yaml"
    assert study.contender("a").lengths == (1.0,)
    (axis,) = study.contender("b").axes("f")
    assert (axis.low, axis.start, axis.high) == (5e-3 / 8, 5e-3, 5e-3 * 8)
    assert (study.warmup, study.looks, study.look_batches, study.search and study.search.sampler) == (0.1, 10, 8, "gp")


def test_what_is_saved_of_a_study_is_the_same_study() -> None:
    study = from_dict(PLAIN)
    assert from_dict(yaml.safe_load(yaml.safe_dump(study.to_dict(), sort_keys=False))) == study


WRONG: list[tuple[str, Any, str]] = [
    ("stepz", 3, "unknown key of the study: 'stepz'; known: name, families"),
    ("contenders/adamw/sets", {}, "unknown key of contenders.adamw: 'sets'"),
    (f"contenders/adamw/search/{LR}/stop", 3, f"unknown key of search of {LR}: 'stop'"),
    ("families/one/seed", 3, "unknown key of families.one: 'seed'"),
    ("search/startup", 3, "unknown key of search: 'startup'"),
    ("families", {}, "families must name at least one entry"),
    ("seeds", [], "seeds is empty"),
    ("contenders/adamw/lengths", [], "contenders.adamw.lengths is empty"),
    ("contenders/adamw/search", {}, "contenders.adamw.search must name at least one entry"),
    (f"contenders/adamw/search/{LR}", {"values": []}, f"values of search of {LR} is empty"),
    (f"contenders/adamw/search/{LR}", {"start": 1.0}, "give either {start: ..., span: ...} or {values: [...]}"),
    (f"contenders/adamw/search/{LR}", {"start": 0.0, "span": 8}, "must be positive"),
    (f"contenders/adamw/search/{LR}", {"start": 1.0, "span": 1}, "span=1.0"),
    (f"contenders/adamw/search/{LR}", {"values": [1.0]}, "the sampler random needs {start: ..., span: ...}"),
    (f"contenders/adamw/set/{LR}", 0.1, f"{LR} is in both set and search"),
    ("contenders/adamw/set/trainer.max_steps", 5, "trainer.max_steps is set by the study itself"),
    ("contenders/adamw/lengths", [-1.0], "lengths are positive shares"),
    ("contenders/adamw/families", ["three"], "unknown contenders.adamw.families: 'three'; known: two, one"),
    ("contenders/ada mw", {}, "'ada mw' cannot be the name of a contender"),
    ("reference", "lion", "unknown reference: 'lion'; known: adamw, symmetric"),
    ("seeds", [2, 2], "seeds: 2 is there twice"),
    ("seeds", [1], "seed 1 is that of the search and one of the final seeds"),
    ("steps", 0, "steps: 0 must be a whole number, at least 1"),
    ("warmup", 1.0, "warmup=1.0 must be a share of the steps"),
    ("search", None, "contenders.adamw has a search but the study none"),
    ("search/sampler", "annealing", "search.sampler='annealing' is unknown; known: grid, gp, tpe, random"),
    ("search", {"sampler": "grid", "trials": 3}, "search.trials=3 has no meaning with sampler grid"),
    ("search", {"sampler": "tpe"}, "search.trials: None must be a whole number"),
]


@pytest.mark.parametrize(("path", "value", "said"), WRONG, ids=[f"{path}={value}" for path, value, _ in WRONG])
def test_a_wrong_study_is_an_error_that_names_the_entry(path: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        from_dict(changed(path, value))
    assert said in str(raised.value)


@pytest.mark.parametrize("key", ["name", "families", "contenders", "steps", "seeds"])
def test_what_a_study_needs_is_missed_by_name(key: str) -> None:
    without = {name: value for name, value in PLAIN.items() if name != key}
    with pytest.raises(ConfigError, match=f"the study has no {key}"):
        from_dict(without)


@pytest.mark.parametrize("text", ["steps: [", "name: a\nname: b\n", "- 1\n", "steps: ${none}\n", ""])
def test_a_file_that_is_no_study_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"study\.yaml"):
        load(path)


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read: No such file"):
        load("none.yaml")


def test_every_study_under_configs_is_one() -> None:
    root = Path(__file__).parents[2]
    paths = sorted((root / "configs/studies").glob("*.yaml"))
    assert paths
    for path in paths:
        for family in load(path).families:
            assert (root / family.config).is_file()
