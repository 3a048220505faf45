from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from typing import Literal

import pytest

from lit_symopt.profiling.costs import HOST, UNATTRIBUTED, TraceCosts
from lit_symopt.profiling.reduce import by_block, by_kernel, by_phase, by_stage, update_ms, wall_ms
from lit_symopt.profiling.roofline import RooflinePoint
from lit_symopt.profiling.rows import cost_table
from lit_symopt.profiling.table import format_table, kernel_rows, markdown_table, short_kernel
from tests.profiling.made import cost, realistic, step, window

# Two windows: steps of 10, 10 and 20 ms with updates of 4, 4 and 5 ms, of which 1 ms each is in no phase.
QUERY = [
    cost("query", "spectral", "rule", 2000.0, kernel="aten::bmm", calls=3),
    cost("query", "spectral", "write", 500.0, kernel="aten::add_"),
]
ROUTER = [cost("router", "left_spectral", "rule", 500.0, kernel="aten::bmm")]
REST = [
    cost(UNATTRIBUTED, "", "", 1000.0, kernel="(between operators)"),
    cost("", "", "", 6000.0, kernel="aten::mm", stage="forward"),
]
SMALL = step([*QUERY, *ROUTER, *REST], number=3)
LARGE = step(
    [*QUERY, *ROUTER, *ROUTER, *ROUTER, *REST, cost("", "", "", 9000.0, kernel="aten::mm", stage="backward")], number=8
)
WINDOWS = [window(SMALL, SMALL), window(LARGE)]
POINT = RooflinePoint(
    role="query",
    rule="spectral",
    dtype="float32",
    flops=1e6,
    bytes=1e5,
    measured_us=2500.0,
    compute_us=1250.0,
    memory_us=10.0,
)


def test_samples_have_one_number_for_every_step_of_every_window() -> None:
    assert by_block(WINDOWS) == {
        ("query", "spectral"): [2.5, 2.5, 2.5],
        ("router", "left_spectral"): [0.5, 0.5, 1.5],
        (UNATTRIBUTED, ""): [1.0, 1.0, 1.0],
    }
    assert by_phase(WINDOWS)["query", "spectral", "write"] == [0.5, 0.5, 0.5]
    assert by_stage(WINDOWS)["backward"] == [0.0, 0.0, 9.0]
    assert list(by_stage(WINDOWS)) == ["data", "forward", "backward", "optimizer", "validation", "other"]
    assert by_kernel(WINDOWS)["optimizer", "router", "left_spectral", "rule", "aten::bmm"] == [0.5, 0.5, 1.5]
    assert wall_ms(WINDOWS) == [10.0, 10.0, 20.0]
    assert update_ms(WINDOWS) == [4.0, 4.0, 5.0]


def test_samples_of_every_kind_add_up_to_the_same_update() -> None:
    windows = realistic()
    for found in (by_block(windows), by_phase(windows)):
        assert [sum(column) for column in zip(*found.values(), strict=True)] == pytest.approx(update_ms(windows))
    assert by_stage(windows)["optimizer"] == pytest.approx(update_ms(windows))


def test_rows_have_median_ends_and_shares() -> None:
    table = cost_table(WINDOWS, [POINT])
    assert [(row.role, row.rule) for row in table.blocks] == [
        ("query", "spectral"),
        ("router", "left_spectral"),
        (UNATTRIBUTED, ""),
    ]
    query, router, lost = table.blocks
    assert (router.ms.median, router.ms.lowest, router.ms.highest) == (0.5, 0.5, 1.5)
    assert (query.of_update, router.of_update, lost.of_update) == pytest.approx((7.5 / 13, 2.5 / 13, 3 / 13))
    assert (query.of_step, router.of_step) == pytest.approx((7.5 / 40, 2.5 / 40))
    assert (query.phase, query.of_phase) == ("rule", 0.8)
    assert query.kernels == (("aten::bmm", 0.8), ("aten::add_", 0.2))
    assert (query.roofline, router.roofline) == (0.5, None)
    assert table.attributed == pytest.approx(10 / 13)
    assert table.attributed == pytest.approx(window(SMALL, SMALL, LARGE).attributed_share)
    assert (table.update.median, table.wall.highest, table.of_step) == (4.0, 20.0, 13 / 40)
    assert (table.windows, table.steps) == (2, 3)


def test_what_is_counted_twice_or_lost_shows_as_a_sum_of_parts_that_is_not_the_update() -> None:
    assert cost_table(WINDOWS).of_update == 1.0
    assert cost_table([window(replace(SMALL, update_us=5000.0))]).of_update == 0.8


def test_on_a_gpu_the_parts_are_held_against_the_update_on_the_host() -> None:
    table = cost_table(realistic(device="cuda"))
    assert table.of_update == pytest.approx(1.0)
    assert table.update.median == pytest.approx(1.8 * table.parts.median)
    assert "host ms" in format_table(realistic(device="cuda"))
    assert "host ms" not in format_table(realistic())


def test_the_terminal_shows_the_numbers() -> None:
    text = format_table(WINDOWS, [POINT])
    assert text.splitlines()[:3] == [
        "Cost of the optimizer on cpu: 3 training steps in 2 windows; medians over the steps, and the range.",
        "Update 4.000 (4.000–5.000) ms, 32.5% of the training step of 10.00 (10.00–20.00) ms. Attributed: 76.9%.",
        "Whole range symopt/step on the host: 4.000 (4.000–5.000) ms; its parts add up to 100.0%.",
    ]
    expected = "query spectral 2.500 2.500–2.500 57.7 18.8 rule 80% 50.0 bmm 80%, add_ 20%"
    assert text.splitlines()[6].split() == expected.split()
    assert text.splitlines()[8].split()[:4] == [UNATTRIBUTED, "–", "1.000", "1.000–1.000"]
    assert text.splitlines()[-1].split() == ["training", "step", "(wall)", "10.00", "10.00–20.00", "100.0"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_terminal_is_not_wider_than_120_columns(device: Literal["cpu", "cuda"]) -> None:
    long = [cost("role_" * 9, "rule_" * 9, "communication", 1e7, kernel="void x::y<a::Functor<float>>(int)" * 3)]
    for windows in (realistic(device=device), [window(step(long), device=device)]):
        assert max(map(len, format_table(windows, [POINT]).splitlines())) <= 120


def test_what_is_in_no_phase_has_a_row_even_if_there_is_nothing() -> None:
    windows = [window(step(QUERY))]
    assert cost_table(windows).blocks[-1].role == UNATTRIBUTED
    assert UNATTRIBUTED in format_table(windows)
    assert f"| {UNATTRIBUTED} | – | 0.000 |" in markdown_table(windows)


def test_validation_is_outside_of_the_training_step() -> None:
    validated = step([*QUERY, cost("", "", "", 50_000.0, stage="validation")])
    stages = {row.stage: row for row in cost_table([window(validated)]).stages}
    assert stages["validation"].ms.median == 50.0
    assert stages["validation"].of_step is None
    assert stages["optimizer"].of_step == 1.0


def test_a_run_with_another_optimizer_has_a_table_that_says_so() -> None:
    windows = [window(step(REST[1:]))]
    assert math.isnan(cost_table(windows).attributed)
    for text in (format_table(windows), markdown_table(windows)):
        assert "No step of SymOpt was recorded. Training step 6.000 (6.000–6.000) ms." in text
        assert "nan" not in text


@pytest.mark.parametrize("windows", [[], [window()]])
def test_without_a_whole_step_there_is_one_sentence(windows: list[TraceCosts]) -> None:
    assert format_table(windows) == markdown_table(windows) == "No whole training step was recorded."
    assert kernel_rows(windows) == []


def test_markdown_has_as_many_cells_in_every_row_as_in_the_head() -> None:
    pipes = [cost("query", "spectral", "rule", 1.0, kernel="void a::k<x|y>(int)")]
    for windows in (realistic(), realistic(device="cuda"), [window(step(pipes))]):
        for block in markdown_table(windows).split("\n\n"):
            lines = block.splitlines()
            cells = {line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}
            assert len(cells) <= 1
    assert "| query | spectral | 2.500 | 2.500–2.500 | 57.7 | 18.8 | rule 80% | `bmm` 80%, `add_` 20% |" in (
        markdown_table(WINDOWS)
    )


def test_rows_for_a_file_hold_every_kernel_in_every_place_once() -> None:
    rows = kernel_rows(WINDOWS)
    assert rows[0] == {
        "stage": "forward",
        "role": "",
        "rule": "",
        "phase": "",
        "kernel": "aten::mm",
        "calls": 1.0,
        "ms": 6.0,
        "lowest_ms": 6.0,
        "highest_ms": 6.0,
        "host_ms": 0.0,
        "share": pytest.approx(18 / 40),
    }
    router = next(row for row in rows if row["role"] == "router")
    assert (router["calls"], router["ms"], router["highest_ms"]) == (pytest.approx(5 / 3), 0.5, 1.5)
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    assert len({(row["stage"], row["role"], row["rule"], row["phase"], row["kernel"]) for row in rows}) == len(rows)
    assert [row["share"] for row in rows] == sorted((row["share"] for row in rows), reverse=True)
    file = io.StringIO()
    csv.DictWriter(file, fieldnames=list(rows[0])).writerows(rows)
    assert len(file.getvalue().splitlines()) == len(rows)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x64_nn>(cutlass_80::Params)",
            "Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x64_nn>",
        ),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
            "TensorListMetadata<2>, at::native::(anonymous namespace)::BinaryOpScalarFunctor<float, 2, 1, 1>, "
            "std::multiplies<float>, float>(at::native::(anonymous namespace)::TensorListMetadata<2>)",
            "multi_tensor_apply_kernel<BinaryOpScalarFunctor>",
        ),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD (Device -> Device)"),
        (HOST, "host"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevComm*, unsigned long)", None),
    ],
)
def test_names_of_kernels_lose_what_makes_them_unreadable(name: str, short: str | None) -> None:
    assert short_kernel(name) == (name if short is None else short)
