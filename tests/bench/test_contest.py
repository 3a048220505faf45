"""Turns, counts and records."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_symopt.bench.accuracy import Range
from lit_symopt.bench.cases import bare_products, count_launches
from lit_symopt.bench.contest import WARM_UP, Contestant, Ratio, Times, compete
from lit_symopt.bench.counting import breakdown, launches, least_seconds, products, scratch_bytes
from lit_symopt.bench.folder import RESULT, default_folder, refuse_existing, write
from lit_symopt.bench.ours import symopt
from lit_symopt.bench.processes import joined
from lit_symopt.bench.products import products_of, replay
from lit_symopt.bench.result import Result, Row, lines, table
from lit_symopt.bench.shapes import shape_list
from lit_symopt.bench.tensors import Numbers
from lit_symopt.errors import ConfigError, ProfileError
from lit_symopt.profiling.expected import expected_operations
from lit_symopt.profiling.run import Ceilings

CPU = torch.device("cpu")
NUMBERS = Numbers()


def noting(said: list[str], name: str) -> Contestant:
    return Contestant(name=name, step=lambda: said.append(name))


def test_everybody_has_a_turn_and_the_order_rotates() -> None:
    said: list[str] = []
    found = compete([noting(said, name) for name in "abc"], rounds=3, steps=2, device=CPU)
    assert "".join(said) == "aabbcc" + "aabbcc" + "bbccaa" + "ccaabb"
    assert WARM_UP == 2
    assert {name: [len(round_) for round_ in times.rounds] for name, times in found.times.items()} == {
        name: [2, 2, 2] for name in "abc"
    }


def test_who_fails_is_named_and_the_others_go_on() -> None:
    said: list[str] = []

    def fail() -> None:
        said.append("b")
        if said.count("b") > WARM_UP + 1:
            raise RuntimeError("out of kernels")

    rest = [noting(said, "a"), Contestant(name="b", step=fail), noting(said, "c")]
    found = compete(rest, rounds=3, steps=2, device=CPU)
    assert found.failed == {"b": "RuntimeError: out of kernels"}
    assert set(found.times) == {"a", "c"}
    assert all(len(times.rounds) == 3 for times in found.times.values())


def test_an_error_of_ours_is_raised() -> None:
    def fail() -> None:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        compete([Contestant(name="a", step=fail)], rounds=1, steps=1, device=CPU)


def test_ratios_are_of_medians_and_their_spread_of_rounds() -> None:
    ours, other = Times(((1.0, 1.0, 9.0), (2.0, 2.0, 2.0))), Times(((2.0, 2.0, 2.0), (3.0, 3.0, 90.0)))
    assert other.over(ours) == Ratio(value=2.5 / 2.0, lowest=1.5, highest=2.0)
    assert (other.median, other.spread, ours.quartiles) == (2.5, (2.0, 90.0), (1.25, 2.0))
    assert Times(((3.0,),)).quartiles == (3.0, 3.0)


# -- counting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", ["muon", "symmetric"])
def test_the_products_of_our_step_are_those_expected(stack: str) -> None:
    optimizer = symopt(shape_list("olmoe_tiny", layers=2), NUMBERS, stack=stack, precision="bf16")
    expected = sum(operations.products for operations in expected_operations(optimizer).values())
    assert products(optimizer.step) == pytest.approx(expected)


def test_a_step_that_cannot_be_watched_is_not_counted() -> None:
    def fail() -> None:
        raise RuntimeError

    assert products(fail) is None
    assert products(lambda: torch.ones(3).add_(1)) is None


@pytest.mark.parametrize("stack", ["muon", "symmetric"])
def test_the_products_alone_are_the_same_work(stack: str) -> None:
    optimizer = symopt(shape_list("olmoe_tiny", layers=2), NUMBERS, stack=stack, precision="bf16")
    step = products(optimizer.step)
    assert step == products(replay(products_of(optimizer.step), CPU))


def test_products_are_repeated_with_their_strides() -> None:
    x = torch.randn(3, 5, 4)
    found = products_of(lambda: torch.baddbmm(torch.ones(()), x.mT, x))
    assert found == [(((3, 4, 5), (20, 1, 4), torch.float32), ((3, 5, 4), (20, 4, 1), torch.float32))]
    replay(found, CPU)()


def test_a_stack_without_products_has_none_to_be_compared_with() -> None:
    with pytest.raises(ConfigError, match="the stack adamw multiplies no matrices"):
        bare_products(shape_list("qwen3_tiny", layers=1), NUMBERS, stack="adamw", precision="bf16")


def test_scratch_is_the_most_at_once() -> None:
    def step() -> None:
        first = torch.ones(1 << 20)
        del first
        kept = [torch.ones(1 << 18), torch.ones(1 << 18)]
        del kept

    assert scratch_bytes(step, CPU) == 4 << 20


def test_only_outermost_operators_are_launches() -> None:
    x = torch.ones(4, 4)

    def step() -> None:
        x.mul_(2)
        torch.stack([x, x])  # calls others

    assert launches(step, CPU) == 2


def test_a_step_has_launches_for_a_number_of_layers() -> None:
    found = count_launches("qwen3_tiny", NUMBERS, stack="muon", precision="bf16", layers=(1, 2))
    assert list(found) == [1, 2]
    assert all(count > 20 for count in found.values())


def test_the_parts_of_our_step_add_up() -> None:
    optimizer = symopt(shape_list("qwen3_tiny", layers=1), NUMBERS, stack="muon", precision="bf16")
    found = breakdown(optimizer.step, CPU, steps=2)
    assert sum(part.share for part in found) == pytest.approx(1.0)
    assert {(part.rule, part.phase) for part in found} >= {("spectral", "rule"), ("adamw", "rule"), ("finite", "check")}
    assert [part.seconds for part in found] == sorted((part.seconds for part in found), reverse=True)
    assert all(sum(part.kernels.values()) <= part.share + 1e-9 for part in found)


def test_the_least_time_is_products_and_bytes_at_the_ceilings() -> None:
    ceilings = Ceilings(flops={"bfloat16": 100.0}, bytes_per_second=10.0)
    contestant = Contestant(name="a", step=lambda: None, least_bytes=20.0, products=torch.bfloat16)
    assert least_seconds(contestant, 300.0, ceilings) == 5.0
    assert least_seconds(replace(contestant, products=None), None, ceilings) == 2.0


# -- records -------------------------------------------------------------------------------------------------------


def result(scale: float = 1.0) -> Result:
    ours = Row(name="symopt:muon", about="ours", times=Times(((1.0, 2.0), (2.0, 3.0))), products=3e9, bytes=1e6)
    bad = Range(lowest=0.5, highest=1.1, shapes=((2, 3),))
    other = Row(name="b", about="other", times=Times(((2.0 * scale,) * 2, (4.0 * scale,) * 2)), range=bad, scratch=5)
    return Result(
        case="step",
        rows=(ours, other),
        absent={"dion": "not installed; get it with: git clone"},
        shapes={"name": "tiny", "layers": 1, "elements": 6, "parameters": {"query 2×3": 1}},
        settings={"rounds": 2},
        device={"name": "chip", "type": "cpu", "threads": 1, "cores": 2, "torch": "2", "python": "3"},
        ceilings=Ceilings(flops={"bfloat16": 1e9}, bytes_per_second=1e9, spread={"copy": 1.5}),
        parts=({"rule": "spectral", "phase": "rule", "seconds": 1.0, "share": 0.5, "kernels": {"bmm": 0.25}},),
    )


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "record"
    write(folder, result(), command="lit-symopt bench", date="2026-11-22", commit="abc", circumstances="busy")
    assert Result.load(folder / RESULT) == result()
    said = json.loads((folder / RESULT).read_text())
    assert (said["command"], said["commit"], said["circumstances"]) == ("lit-symopt bench", "abc", "busy")
    assert said["rows"][1]["against_ours"] == {"value": 1.5, "lowest": 4 / 3, "highest": 1.6}
    page = (folder / "README.md").read_text()
    for text in (
        "`lit-symopt bench`",
        "commit: abc",
        "chip",
        "×1.50 (1.33 to 1.60)",
        "busy",
        "not installed",
        "bmm 25.0%",
    ):
        assert text in page, text


@pytest.mark.parametrize("spoil", [lambda text: text[:-9], lambda text: text.replace('"format": 1', '"format": 7')])
def test_what_is_no_record_is_refused(tmp_path: Path, spoil: Callable[[str], str]) -> None:
    write(tmp_path / "record", result(), command="", date="", commit="")
    file = tmp_path / "record" / RESULT
    file.write_text(spoil(file.read_text()))
    with pytest.raises(ProfileError, match=r"result\.json (is no result|has format 7)"):
        Result.load(file)


def test_nothing_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    refuse_existing(tmp_path / "empty")
    write(tmp_path / "empty", result(), command="", date="", commit="")
    with pytest.raises(ProfileError, match="a benchmark replaces nothing"):
        refuse_existing(tmp_path / "empty")
    with pytest.raises(ProfileError, match="cannot be written"):
        refuse_existing(Path("/proc/bench"))
    monkeypatch.chdir(tmp_path)
    device = {"type": "cpu", "threads": 2}
    first = default_folder(date="2026-11-22T00", device=device, shapes="a/list.yaml")
    assert first == Path("profiles/records/bench/2026-11-22-cpu-2threads-list")
    first.mkdir(parents=True)
    assert default_folder(date="2026-11-22T00", device=device, shapes="list").name.endswith("-list-2")


def test_what_is_flagged_or_absent_is_said_below_the_table() -> None:
    said = list(lines(result()))
    assert said[0] == "! b: singular values above 0.01 ‖M‖_F come to lie in [0.500, 1.100], not in [0.7, 1.2]"
    assert "- dion: not installed; get it with: git clone" in said
    assert "[0.50, 1.10] !" in table(result())


def test_processes_are_joined_round_by_round_and_their_ratios_kept() -> None:
    found = joined([result(), result(2.0), replace(result(3.0), absent={"x": "gone"})])
    assert found.by_process == {"b": (1.5, 3.0, 4.5)}
    assert len(found.rows[1].times.rounds) == 6
    assert set(found.absent) == {"dion", "x"}
    assert "b: ×3.00 of our time, the median of 3 processes (1.50, 3.00, 4.50)" in list(lines(found))
    alone = replace(result(), rows=result().rows[:1])
    assert [row.name for row in joined([result(), alone]).rows] == ["symopt:muon"]
