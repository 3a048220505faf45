"""What profile-compare says of two records: regressions beyond the noise, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_symopt.cli import main
from lit_symopt.errors import ConfigError, ProfileError
from lit_symopt.profiling.compare import CONTROL, UPDATE, Change, compare
from lit_symopt.profiling.noise import estimate, speed_of
from lit_symopt.profiling.record import Record, StackRecord
from lit_symopt.profiling.samples import Samples
from tests.profiling.records import record_of, stack_of

BLOCKS = {"query/spectral": 9_000.0, "embedding/row_norm": 3_000.0, "router/row_norm": 600.0, "vector/adamw": 40.0}


def slowed(record: Record, factor: float, *names: str, stack: str = "symmetric") -> Record:
    """A doctored record: these blocks, or stages, take `factor` times as long."""

    def longer(samples: Samples) -> Samples:
        return tuple(tuple(tuple(factor * us for us in window) for window in round_) for round_ in samples)

    old = record.stacks[stack]
    new = replace(
        old,
        blocks={name: longer(samples) if name in names else samples for name, samples in old.blocks.items()},
        stages={name: longer(samples) if name in names else samples for name, samples in old.stages.items()},
        control={name: longer(samples) if "control" in names else samples for name, samples in old.control.items()},
    )
    return replace(record, stacks={**record.stacks, stack: new})


def everything(stack: StackRecord) -> tuple[str, ...]:
    return (*stack.blocks, *stack.stages, "control")


def noisy(seed: int, noise: float = 0.05) -> Record:
    return record_of({"symmetric": stack_of(BLOCKS, noise=noise, seed=1000 * seed)})


def row(record_a: Record, record_b: Record, name: str, **options: Any) -> Change:
    (found,) = [change for change in compare(record_a, record_b, **options).changes if change.name == name]
    return found


@pytest.mark.parametrize("name", ["query/spectral", "embedding/row_norm", "router/row_norm"])
def test_a_rule_that_is_20_percent_slower_is_the_one_regression_that_is_flagged(name: str) -> None:
    record = noisy(1, noise=0.03)
    found = compare(record, slowed(record, 1.2, name))
    blocks = [change.name for change in found.regressions if change.name != UPDATE]
    assert blocks == [name]
    assert row(record, slowed(record, 1.2, name), name).ratio == pytest.approx(1.2, rel=0.01)


def test_a_rule_that_is_20_percent_faster_is_said_to_be_and_is_no_regression() -> None:
    record = noisy(1, noise=0.03)
    found = compare(slowed(record, 1.25, "embedding/row_norm"), record)
    assert not found.regressions
    assert [change.name for change in found.changes if change.verdict == "faster"] == ["embedding/row_norm"]


def test_measurements_of_the_same_thing_are_not_flagged_more_than_once_in_a_hundred_times() -> None:
    flagged = [pair for pair in range(100) if compare(noisy(2 * pair), noisy(2 * pair + 1)).regressions]
    assert len(flagged) <= 1


def test_a_machine_that_was_slower_is_no_regression_and_is_said() -> None:
    record = noisy(1)
    found = compare(record, slowed(record, 1.5, *everything(record.stacks["symmetric"])))
    assert not found.regressions
    assert [change.verdict for change in found.changes if change.name == CONTROL] == ["slower"]
    assert "symmetric: forward + backward, which no optimizer touches, is slower in B (×1.50)" in str(found)


def test_a_rule_that_is_slower_on_a_slower_machine_is_flagged() -> None:
    record = noisy(1, noise=0.03)
    machine = slowed(record, 1.5, *everything(record.stacks["symmetric"]))
    found = compare(record, slowed(machine, 1.25, "router/row_norm"))
    assert [change.name for change in found.regressions] == ["router/row_norm"]
    assert found.regressions[0].relative == pytest.approx(1.25, rel=0.01)


def test_bursts_that_only_meet_the_long_forward_pass_do_not_hide_a_regression() -> None:
    record = noisy(1, noise=0.03)
    machine = slowed(record, 2.15, "control")
    assert [change.name for change in compare(record, slowed(machine, 1.25, "router/row_norm")).regressions] == [
        "router/row_norm"
    ]


def test_a_rule_of_most_blocks_does_not_pass_for_the_machine() -> None:
    blocks = {f"{role}/spectral": 9_000.0 for role in ("query", "key", "value", "gate", "up")}
    record = record_of({"symmetric": stack_of({**blocks, "embedding/row_norm": 3_000.0, "vector/adamw": 2_000.0})})
    found = compare(record, slowed(slowed(record, 2.0, "control"), 1.3, *blocks))
    assert {change.name for change in found.regressions} == {UPDATE, *blocks}


def test_an_update_that_became_slower_as_a_whole_is_a_regression() -> None:
    record = noisy(1, noise=0.03)
    found = compare(record, slowed(record, 1.3, *record.stacks["symmetric"].blocks))
    assert UPDATE in [change.name for change in found.regressions]


def test_a_machine_whose_model_became_faster_makes_no_regression_of_an_optimizer_that_did_not_change() -> None:
    record = noisy(1)
    assert not compare(record, slowed(record, 0.5, "control")).regressions


def test_a_change_within_the_noise_is_none() -> None:
    record = noisy(1, noise=0.5)
    change = row(record, slowed(record, 1.2, "query/spectral"), "query/spectral")
    assert change.verdict == "same"
    assert change.noise > 0.2


def test_a_change_below_the_threshold_is_none() -> None:
    record = noisy(1, noise=0.001)
    other = slowed(record, 1.2, "query/spectral")
    assert not compare(record, other, threshold=0.25).regressions
    assert compare(record, other, threshold=0.15).regressions


def test_a_block_that_costs_next_to_nothing_is_listed_and_decides_nothing() -> None:
    record = noisy(1, noise=0.001)
    found = compare(record, slowed(record, 1.2, "vector/adamw"))
    (change,) = [change for change in found.changes if change.name == "vector/adamw"]
    assert (change.verdict, change.decides) == ("slower", False)
    assert not found.regressions
    assert "slower (minor)" in str(found)


def test_a_block_that_was_cheap_and_costs_a_lot_now_decides() -> None:
    record = noisy(1, noise=0.001)
    assert "vector/adamw" in [
        change.name for change in compare(record, slowed(record, 100.0, "vector/adamw")).regressions
    ]


def test_a_block_that_only_one_record_has_is_new_or_gone_and_the_whole_update_decides() -> None:
    before = noisy(1, noise=0.01)
    after = record_of({"symmetric": stack_of({**BLOCKS, "head/spectral": 5_000.0}, noise=0.01, seed=1000)})
    found = compare(before, after)
    assert {change.name: change.verdict for change in found.changes}["head/spectral"] == "new"
    assert [change.name for change in found.regressions] == [UPDATE]
    back = compare(after, before)
    assert {change.name: change.verdict for change in back.changes}["head/spectral"] == "gone"
    assert not back.regressions


def test_an_optimizer_without_ranges_is_judged_as_a_whole() -> None:
    record = record_of({"AdamW": replace(stack_of(BLOCKS, noise=0.01), blocks={})})
    found = compare(record, slowed(record, 1.3, "optimizer", stack="AdamW"))
    assert [change.name for change in found.regressions] == [UPDATE]


UNLIKE: list[tuple[str, Callable[[Record], Record], str]] = [
    (
        "device",
        lambda record: replace(record, device={**record.device, "name": "there"}),
        "device: name is 'here' in A and 'there' in B",
    ),
    (
        "threads",
        lambda record: replace(record, device={**record.device, "threads": 2}),
        "device: threads is 1 in A and 2 in B",
    ),
    (
        "torch",
        lambda record: replace(record, versions={"torch": "2.14.0"}),
        "torch is '2.13.0' in A and '2.14.0' in B",
    ),
    ("world", lambda record: replace(record, world=2), "processes is 1 in A and 2 in B"),
    (
        "ranks",
        lambda record: replace(record, spec={**record.spec, "ranks": "all"}),
        "spec: ranks is None in A and 'all' in B",
    ),
    (
        "recipe",
        lambda record: replace(record, recipe={"name": "tiny", "essentials": {"model.init_args.hidden_size": 64}}),
        "recipe: model.init_args.hidden_size is 32 in A and 64 in B",
    ),
    (
        "strategy",
        lambda record: replace(
            record, recipe={"essentials": {"model.init_args.hidden_size": 32, "trainer.strategy": "ddp"}}
        ),
        "recipe: trainer.strategy is None in A and 'ddp' in B",
    ),
    (
        "settings",
        lambda record: replace(
            record, stacks={"symmetric": replace(record.stacks["symmetric"], settings={"precision": "bf16"})}
        ),
        "symmetric: precision is None in A and 'bf16' in B",
    ),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in UNLIKE], ids=[case[0] for case in UNLIKE])
def test_records_that_are_not_alike_are_refused_and_compared_loudly_if_told_to(
    change: Callable[[Record], Record], message: str
) -> None:
    record = noisy(1)
    with pytest.raises(ProfileError, match=r"cannot be compared: .*give --anyway") as caught:
        compare(record, change(record))
    assert message in str(caught.value)
    said = str(compare(record, change(record), anyway=True))
    assert said.startswith("NOT ALIKE, compared anyway:\n")
    assert message in said


def test_the_same_recipe_under_another_name_and_of_another_commit_is_alike() -> None:
    record = noisy(1)
    other = replace(record, recipe={**record.recipe, "name": "copy"}, commit=None, command="another", date="later")
    assert not compare(record, other).regressions


def test_only_the_stacks_that_both_have_are_compared_and_the_others_are_named() -> None:
    stack = stack_of(BLOCKS)
    before, after = record_of({"symmetric": stack, "muon": stack}), record_of({"symmetric": stack, "adamw": stack})
    found = compare(before, after)
    assert {change.stack for change in found.changes} == {"symmetric"}
    assert {"only A has muon", "only B has adamw"} <= set(found.warnings)
    with pytest.raises(ProfileError, match="no stack in common: A has muon, B has adamw"):
        compare(record_of({"muon": stack}), record_of({"adamw": stack}))


def test_a_threshold_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"threshold=0\.0 must be above 0"):
        compare(noisy(1), noisy(1), threshold=0.0)


def test_the_noise_of_an_estimate_falls_with_the_rounds_and_is_that_of_rounds_where_these_differ() -> None:
    steady: Samples = (((10.0,) * 4,) * 4,) * 3
    assert estimate(steady).error == 0.0
    apart: Samples = tuple((((1.0 + 0.1 * number) * 10.0,) * 4,) * 4 for number in range(3))
    more: Samples = tuple((((1.0 + 0.02 * number) * 10.0,) * 4,) * 4 for number in range(12))
    assert 0.05 < estimate(apart).error < 0.1
    assert estimate(more).error < estimate(apart).error


def test_windows_in_which_everything_was_slower_add_no_noise() -> None:
    quiet: Samples = tuple(tuple((10.0 + 0.01 * window,) * 6 for window in range(4)) for _ in range(3))
    factors = [1.0, 1.7, 1.0, 1.3]
    drifting: Samples = tuple(
        tuple(tuple(factor * us for us in window) for window, factor in zip(round_, factors, strict=True))
        for round_ in quiet
    )
    speed = speed_of([[drifting], [drifting, drifting]])
    assert estimate(drifting).error > 0.05
    assert estimate(drifting, speed=speed).error < 0.001


def test_bursts_in_five_of_six_steps_do_not_move_a_time() -> None:
    quiet: Samples = (((10.0, 10.0, 10.0, 10.0, 10.0, 10.0),) * 4,) * 3
    bursts: Samples = (((50.0, 90.0, 10.0, 70.0, 80.0, 60.0),) * 4,) * 3
    assert estimate(bursts).value == pytest.approx(estimate(quiet).value)


# -- the command -------------------------------------------------------------------------------------------------


def saved(record: Record, folder: Path) -> str:
    folder.mkdir()
    record.save(folder)
    return str(folder)


def test_the_command_says_what_became_slower_and_exits_with_1(tmp_path: Path, capsys: Any) -> None:
    record = noisy(1, noise=0.02)
    a, b = saved(record, tmp_path / "a"), saved(slowed(record, 1.2, "query/spectral"), tmp_path / "b")
    assert main(["profile-compare", a, b]) == 1
    said = capsys.readouterr().out
    assert "regression(s) above 10%: symmetric whole update (×1.14), symmetric query/spectral (×1.20)" in said
    assert main(["profile-compare", a, a]) == 0
    assert "no regression" in capsys.readouterr().out
    assert main(["profile-compare", a, b, "--threshold", "0.3"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "none"], "none is not the folder of a record"),
        (["a", "foreign"], "is not the summary of a profile"),
        (["a", "other"], "device: name is 'here' in A and 'there' in B"),
        (["a", "a", "--threshold", "-1"], "threshold=-1.0 must be above 0"),
    ],
)
def test_wrong_input_of_the_command_is_one_error_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(noisy(1), tmp_path / "a")
    saved(replace(noisy(1), device={"type": "cpu", "name": "there", "threads": 1}), tmp_path / "other")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "summary.json").write_text("{}")
    assert main(["profile-compare", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said


def test_records_that_are_not_alike_are_compared_by_the_command_if_told_to(tmp_path: Path, capsys: Any) -> None:
    record = noisy(1)
    a = saved(record, tmp_path / "a")
    b = saved(replace(record, device={"type": "cpu", "name": "there", "threads": 1}), tmp_path / "b")
    assert main(["profile-compare", a, b, "--anyway"]) == 0
    assert "NOT ALIKE" in capsys.readouterr().out


def test_any_rule_of_the_record_in_the_repository_made_slower_is_flagged_and_no_other() -> None:
    record = Record.load(Path(__file__).parents[2] / "profiles" / "records" / "quickstart-cpu")
    changes = compare(record, record).changes
    assert not compare(record, record).regressions
    blocks = [(change.stack, change.name) for change in changes if change.decides and "/" in change.name]
    assert len(blocks) >= 15
    for stack, name in blocks:
        found = {(one.stack, one.name) for one in compare(record, slowed(record, 1.2, name, stack=stack)).regressions}
        assert (stack, name) in found
        assert found <= {(stack, name), (stack, "whole update")}
