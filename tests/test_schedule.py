"""Schedules are functions of the steps that were given."""

import pytest
import torch

from lit_symopt import ScheduleConfig
from lit_symopt.errors import ConfigError
from lit_symopt.schedule import build_scheduler, factor


def factors(config: ScheduleConfig, steps: int) -> list[float]:
    return [round(factor(step, config), 6) for step in range(steps)]


def test_constant_warms_up_and_stays() -> None:
    assert factors(ScheduleConfig(warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_and_cosine_fall_to_the_final_ratio_and_stay_there() -> None:
    linear = ScheduleConfig(kind="linear", warmup_steps=1, total_steps=5, final_ratio=0.2)
    assert factors(linear, 7) == [1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]
    cosine = ScheduleConfig(kind="cosine", total_steps=4)
    assert factors(cosine, 6) == [1.0, 0.853553, 0.5, 0.146447, 0.0, 0.0]


def test_wsd_is_stable_until_its_decay() -> None:
    config = ScheduleConfig(kind="wsd", warmup_steps=2, total_steps=8, decay_steps=4)
    assert factors(config, 9) == [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_the_scheduler_multiplies_each_groups_own_rate() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups)
    scheduler = build_scheduler(optimizer, ScheduleConfig(warmup_steps=2))
    seen = []
    for _ in range(3):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert seen == [[0.5, 0.05], [1.0, 0.1], [1.0, 0.1]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "step"}, "unknown schedule 'step'"),
        ({"kind": "linear"}, "needs total_steps greater than warmup_steps=0, not None"),
        ({"kind": "cosine", "warmup_steps": 9, "total_steps": 9}, "not 9"),
        ({"kind": "wsd", "total_steps": 9}, "decay_steps between 1"),
        ({"kind": "wsd", "total_steps": 9, "warmup_steps": 5, "decay_steps": 5}, "not 5"),
        ({"warmup_steps": -1}, "must not be negative"),
        ({"final_ratio": 1.5}, r"must be in \[0, 1\]"),
    ],
)
def test_schedules_without_their_steps_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ScheduleConfig(**options)  # type: ignore[arg-type]
