"""`lit-symopt bench` from the command line: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lit_symopt.bench.folder import RESULT
from lit_symopt.bench.result import Result
from lit_symopt.cli import main
from tests.cli.conftest import command

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SHAPES = """\
shapes:
  - {name: embedding, shape: [96, 16], role: embedding}
  - {name: "q.{}", shape: [32, 16], role: query, layout: "heads(2, dim='rows')", count: 2}
  - {name: experts, shape: [3, 16, 8], role: expert_down, layout: "experts(transposed())"}
  - {name: norm, shape: [16], role: vector}
"""
QUICK = ["--rounds", "2", "--steps", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(SHAPES)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(*arguments: str) -> int:
    return main(["bench", *QUICK, *arguments])


def test_a_benchmark_prints_a_table_and_writes_a_record(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    wanted = "adamw,adamw_fused,torch_muon,dion,symopt:adamw"
    assert bench("--shapes", "own.yaml", "--stack", "muon", "--precision", "bf16", "--against", wanted) == 0
    said = capsys.readouterr().out
    (folder,) = (tmp_path / "profiles" / "records" / "bench").iterdir()
    assert f"wrote {folder.relative_to(tmp_path)}" in said
    result = Result.load(folder / RESULT)
    assert [row.name for row in result.rows] == ["symopt:muon", "adamw", "adamw_fused", "torch_muon", "symopt:adamw"]
    ours, adamw, _, muon, _ = result.rows
    assert ours.products == muon.products != 0
    assert adamw.products is None
    assert (ours.iterations, muon.iterations, adamw.iterations) == (5, 5, None)
    assert ours.range is not None
    assert ours.range.within
    assert all(len(row.times.rounds) == 2 for row in result.rows)
    assert all(row.share is not None and row.scratch is not None for row in result.rows)
    assert result.ceilings is not None
    assert "bfloat16" in result.ceilings.flops
    assert list(result.absent) == ["dion"]
    assert "- dion: not installed; get it with: git clone https://github.com/microsoft/dion dion" in said
    page = (folder / "README.md").read_text()
    assert "lit-symopt bench --rounds 2 --steps 1 --threads 1 --shapes own.yaml" in page
    assert "| embedding 96×16 | 1 |" in page


@pytest.mark.parametrize("stack", ["muon", "symmetric"])
def test_products_alone_and_launches_are_cases(stack: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--shapes", "own.yaml", "--case", "products", "--stack", stack, "--output", "products") == 0
    result = Result.load(Path("products") / RESULT)
    assert [row.name for row in result.rows] == [f"symopt:{stack}", "products alone"]
    assert result.rows[0].products == result.rows[1].products
    arguments = ["--shapes", "qwen3_tiny", "--case", "launches", "--stack", stack, "--precision", "bf16"]
    assert bench(*arguments, "--output", "launches") == 0
    found = json.loads((Path("launches") / RESULT).read_text())["launches"]
    assert list(found) == ["4", "16"]
    assert f"{found['4']} and {found['16']}" in capsys.readouterr().out


def test_half_precision_parameters_are_stepped_too() -> None:
    assert (
        bench("--shapes", "own.yaml", "--dtype", "bfloat16", "--against", "adamw,torch_muon", "--output", "half") == 0
    )
    result = Result.load(Path("half") / RESULT)
    assert len(result.rows) == 3
    assert not result.absent


@pytest.mark.slow
@pytest.mark.deepspeed
def test_deepspeeds_muon_steps_without_its_engine(tmp_path: Path) -> None:
    arguments = ["--shapes", "own.yaml", "--stack", "muon", "--against", "deepspeed_muon", "--output", "deepspeed"]
    done = command("bench", *QUICK, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = Result.load(tmp_path / "deepspeed" / RESULT)
    assert [row.name for row in result.rows] == ["symopt:muon", "deepspeed_muon"]


@pytest.mark.slow
def test_the_row_norm_of_a_large_embedding_is_a_case() -> None:
    assert bench("--case", "row_norm", "--output", "row_norm") == 0
    result = Result.load(Path("row_norm") / RESULT)
    names = [row.name for row in result.rows]
    assert names == ["row_norm", "row_norm, row_damping=0", "adamw_fused", "copy of as many bytes"]
    assert result.rows[0].bytes == result.rows[3].bytes == 20 * 50_304 * 512


def test_several_processes_are_joined(tmp_path: Path) -> None:
    arguments = [
        "--shapes",
        "own.yaml",
        "--stack",
        "muon",
        "--against",
        "adamw",
        "--processes",
        "2",
        "--output",
        "both",
    ]
    done = command("bench", *QUICK, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = Result.load(tmp_path / "both" / RESULT)
    assert result.settings["processes"] == 2
    assert all(len(row.times.rounds) == 4 for row in result.rows)
    assert len(result.by_process["adamw"]) == 2
    assert "the median of 2 processes" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--shapes", "qwen4"], "no list, no recipe and no file"),
        (["--shapes", "broken.yaml"], "broken.yaml, line 2: "),
        (["--shapes", "own.yaml", "--layers", "2"], "has no layers"),
        (["--shapes", "own.yaml", "--against", "lion"], "--against lion: unknown"),
        (["--shapes", "own.yaml", "--stack", "lion"], "unknown stack 'lion'"),
        (["--shapes", "own.yaml", "--rounds", "0"], "--rounds 0: at least 1"),
        (["--shapes", "own.yaml", "--device", "toaster"], "--device toaster: torch cannot compute there"),
        (["--shapes", "own.yaml", "--checkout", "dion"], "give NAME=PATH"),
        (["--shapes", "own.yaml", "--checkout", "dion=nowhere"], "there is no package 'dion' in it"),
        (["--case", "products", "--against", "adamw"], "the case products has opponents of its own"),
        (["--case", "launches", "--layers", "2"], "the case launches has shapes of its own"),
        (["--shapes", "own.yaml", "--output", "full"], "a benchmark replaces nothing"),
        (["--shapes", "own.yaml", "--case", "products", "--stack", "adamw"], "multiplies no matrices"),
    ],
)
def test_wrong_input_is_refused(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.yaml").write_text("shapes:\n  - {name: a, shape: [2, 2]}\n")
    Path("full").mkdir()
    (Path("full") / "file").touch()
    assert bench(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert why in said
    assert not Path("profiles").exists()
