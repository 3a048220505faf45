from __future__ import annotations

from lit_symopt.study.proposal import flattened, propose
from lit_symopt.study.spec import Axis, Search
from tests.study import made


def test_the_gaussian_process_keeps_away_from_where_runs_diverged() -> None:
    axis = Axis(option=made.LR, start=1.0, span=8.0)
    settings = Search(sampler="gp", trials=12, seed=1)
    trials: list[tuple[tuple[float, ...], float | None]] = [((1.0,), 3.2), ((0.5,), 3.1), ((0.25,), 3.2)]
    trials += [((rate,), None) for rate in (2.0, 3.0, 4.0, 6.0)]
    proposed = [propose(trials, [axis], settings, seed=seed) for seed in range(5)]
    assert all(point is not None and point[0] < 1.5 for point in proposed), proposed


def test_what_is_far_above_the_median_counts_like_what_diverged() -> None:
    assert flattened([3.0, 3.25, 3.5, 9.0, None]) == [3.0, 3.25, 3.5, 3.75, 3.75]
    assert flattened([3.0, None])[1] > 3.0
    assert flattened([None, None]) == [1.0, 1.0]


def test_the_same_trials_and_seed_are_the_same_point_and_another_seed_another() -> None:
    axis = Axis(option=made.LR, start=1.0, span=8.0)
    settings = Search(sampler="gp", trials=12, seed=1)
    trials = [((1.0,), 3.2), ((0.5,), 3.1)]
    assert propose(trials, [axis], settings, seed=1) == propose(trials, [axis], settings, seed=1)
    assert propose(trials, [axis], settings, seed=1) != propose(trials, [axis], settings, seed=2)


def test_a_range_that_is_used_up_has_no_next_point() -> None:
    axis = Axis(option=made.LR, start=1.0, span=1.004)  # 0.996, ..., 0.999, 1.0 with three digits
    settings = Search(sampler="random", trials=100, seed=1)
    trials: list[tuple[tuple[float, ...], float | None]] = []
    while (point := propose(trials, [axis], settings, seed=len(trials))) is not None:
        trials.append((point, 3.0))
    assert {point[0] for point, _ in trials} == {0.996, 0.997, 0.998, 0.999, 1.0}
