from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from lit_symopt.study.plots import write_plots
from lit_symopt.study.result import Result, read_results
from tests.study import made

ALL = {"tokens", "seconds", "basin", "lengths", "finals", f"record/{made.TAG}"}


def drawn(path: Path) -> tuple[int, int]:
    """Width and height of a picture, which shows something."""
    pixels = imread(path)
    assert (pixels[..., :3].min(axis=2) < 0.5).mean() > 0.002
    return pixels.shape[1], pixels.shape[0]


def test_every_plot_is_a_picture_of_readable_size(tmp_path: Path) -> None:
    study = made.study(trials=4)
    made.write_all(study, tmp_path)
    paths = write_plots(study, read_results(tmp_path), tmp_path)
    assert set(paths) == ALL
    assert paths[f"record/{made.TAG}"].name == "record-router-load_cv.png"
    for path in paths.values():
        width, height = drawn(path)
        assert 800 <= width <= 1400
        assert 300 <= height <= 900


def test_the_same_results_are_the_same_pictures(tmp_path: Path) -> None:
    study = made.study(trials=3, families=("olmoe",), names=("adamw", "symmetric"))
    made.write_all(study, tmp_path)
    first = {name: path.read_bytes() for name, path in write_plots(study, read_results(tmp_path), tmp_path).items()}
    second = {name: path.read_bytes() for name, path in write_plots(study, read_results(tmp_path), tmp_path).items()}
    assert first == second


def test_plots_without_runs_are_left_out(tmp_path: Path) -> None:
    study = made.study(trials=3, families=("qwen3",))
    results = made.write_all(study, tmp_path)
    assert write_plots(study, [], tmp_path) == {}
    assert set(write_plots(study, [one for one in results if one.purpose == "trial"], tmp_path)) == {"basin"}
    full = [one for one in results if one.purpose == "final" and one.length == 1.0]
    assert set(write_plots(study, full, tmp_path)) == {"tokens", "seconds", "finals"}


def test_an_option_with_one_value_has_no_basin(tmp_path: Path) -> None:
    study = made.study(trials=3, families=("qwen3",))
    trials = [one for one in made.write_all(study, tmp_path) if one.purpose == "trial"]
    whole = drawn(write_plots(study, trials, tmp_path)["basin"])
    options = sorted({option for one in trials for option in one.rates})
    assert len(options) > 1
    fixed = [replace(one, rates={**one.rates, **dict.fromkeys(options[1:], 4.0)}) for one in trials]
    assert drawn(write_plots(study, fixed, tmp_path)["basin"])[0] < whole[0]
    nothing = [replace(one, rates=dict.fromkeys(options, 4.0)) for one in trials]
    assert "basin" not in write_plots(study, nothing, tmp_path)


@pytest.mark.parametrize("finished", [0, 1])
def test_runs_that_diverged_are_drawn_as_such(tmp_path: Path, finished: int) -> None:
    study = made.study(trials=3, families=("qwen3",), names=("adamw", "muon"))
    kept: dict[tuple[str, str, float], int] = {}

    def some(one: Result) -> Result:
        key = one.contender, one.purpose, one.length
        kept[key] = kept.get(key, 0) + 1
        return one if kept[key] <= finished else replace(one, status="diverged", loss=None, curve=())

    results = [some(replace(one, status="finished", loss=one.loss or 9.0)) for one in made.write_all(study, tmp_path)]
    paths = write_plots(study, results, tmp_path)
    assert {"basin", "finals"} <= set(paths)
    for path in paths.values():
        drawn(path)
