"""Whole studies. The oracle of a run is `lit-symopt fit`, that of a resumed study one in one piece."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from filelock import FileLock

from lit_symopt.cli import main
from lit_symopt.study.result import Result, read_results
from lit_symopt.study.stop_request import StopRequest
from tests.cli.conftest import command
from tests.study import trained

LATE = 120.0  # seconds after which a test gives up


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study that ran in one piece."""
    folder = trained.write(tmp_path_factory.mktemp("whole"))
    done = trained.study(folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A study of a contender that works, one that diverges and one that cannot be built."""
    contenders = {
        "wrong": {"set": {"model.symopt.roles.router.lr": 1.0}},
        "wild": {"set": {"model.symopt.stack": "adamw", "model.symopt.lr": 1e30}},
        "good": {"set": {"model.symopt.stack": "adamw"}},
    }
    folder = tmp_path_factory.mktemp("troubled")
    trained.write(folder, families={"two": "tiny.yaml"}, contenders=contenders, search=None, reference=None)
    return folder, trained.study(folder)


def measured(folder: Path) -> dict[str, Any]:
    """What a run measured but for its time."""
    return {
        one.run: (one.status, one.loss, one.tokens, one.rates, one.records, [point[3] for point in one.train])
        for one in read_results(folder / "out")
    }


def test_a_study_runs_trials_then_final_runs_of_the_best_rates(whole: Path) -> None:
    found = read_results(whole / "out")
    assert len(found) == trained.RUNS
    for family in ("one", "two"):
        own = [one for one in found if (one.family, one.contender) == (family, "adamw")]
        trials = [one for one in own if one.purpose == "trial"]
        assert [one.seed for one in trials] == [1, 1]
        best = min(trials, key=lambda one: one.loss or 9.0)
        finals = [one for one in own if one.purpose == "final"]
        assert [(one.seed, one.length, one.steps) for one in finals] == [(2, 0.5, 3), (2, 1.0, 6)]
        assert all(one.rates == best.rates for one in finals)
        assert len(best.rates) == (2 if family == "two" else 1)


def test_a_result_says_what_was_trained(whole: Path) -> None:
    result = next(one for one in read_results(whole / "out") if one.run == "two-symmetric-final-x1-s2")
    assert (result.status, result.stack, result.tokens) == ("finished", "symmetric", trained.TOKENS)
    assert [point[:2] for point in result.curve] == [(2, 128), (4, 256), (6, 384)]
    assert [point[0] for point in result.train] == [1, 2, 3, 4, 5, 6]
    logged = result.records["train/loss"]  # the recipe logs every step, counted from 0
    assert [(step + 1, loss) for step, loss in logged] == [(point[0], point[3]) for point in result.train]


def test_a_run_is_the_fit_that_its_log_names(whole: Path) -> None:
    name = "one-adamw-final-x1-s2"
    said = (whole / "out/runs" / name / "log.txt").read_text().splitlines()[0]
    program, *arguments = shlex.split(said)
    assert program == "lit-symopt"
    measuring = ("--trainer.limit_val_batches=1.0", f"--trainer.val_check_interval={trained.STEPS}")
    report = "--trainer.callbacks+=lit_symopt.callbacks.RunReport"
    done = command(*arguments, *measuring, report, cwd=whole)
    assert done.returncode == 0, done.stderr
    result = Result.load(whole / "out/runs" / name / "result.json")
    assert f"{result.loss:.4f} at step {trained.STEPS}" in done.stdout


def test_seconds_are_those_of_training(whole: Path) -> None:
    for result in read_results(whole / "out"):
        assert 0 < result.train[-1][2] == pytest.approx(result.seconds, abs=1e-3)
        assert result.seconds < result.wall_seconds
        times = [point[2] for point in result.curve]
        assert times == sorted(times)


def test_a_finished_study_runs_nothing_again(whole: Path) -> None:
    before = trained.results(whole)
    done = trained.study(whole)
    assert done.returncode == 0, done.stderr
    assert f"{trained.RUNS} of {trained.RUNS} runs were there already" in done.stdout
    assert trained.results(whole) == before


def test_the_report_is_rebuilt_to_the_same_bytes(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(whole)
    files = sorted(path for path in (whole / "out").iterdir() if path.suffix in (".md", ".csv", ".jsonl", ".png"))
    assert {"README.md", "results.csv", "results.jsonl", "tokens.png"} <= {path.name for path in files}
    before = [path.read_bytes() for path in files]
    for path in files:
        path.unlink()
    assert main(["study", "--config", "study.yaml", "--out", "out", "--report"]) == 0
    assert [path.read_bytes() for path in files] == before


def test_a_study_that_was_killed_and_stopped_ends_as_one_in_one_piece(whole: Path, tmp_path: Path) -> None:
    folder = trained.write(tmp_path)
    process = trained.start(folder)
    wait_for(folder, 1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=LATE)
    _, alive = psutil.wait_procs(children, timeout=LATE)
    assert not alive  # neither the run nor what it was forked from outlives the study
    killed = trained.results(folder)
    lock = folder / "out/optuna.journal.lock"  # the worst moment for it: while the search is written
    if not lock.is_symlink():
        lock.symlink_to("out/optuna.journal")

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a late signal must not end the tests
    try:
        Thread(target=stop_this_process, args=(folder,), daemon=True).start()
        stopped = trained.study(folder)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "finished runs are kept: give the same command again to go on" in stopped.stderr
    kept = trained.results(folder)
    assert len(killed) < len(kept) < trained.RUNS

    assert trained.study(folder).returncode == 0
    assert killed.items() <= kept.items() <= trained.results(folder).items()  # none was run again
    assert measured(folder) == measured(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_the_journals_write_stops_the_study_after_it(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained.write(tmp_path)
    rename = os.rename
    sent: list[str] = []

    def rename_and_interrupt(source: str, target: str) -> None:
        rename(source, target)
        if str(target).endswith(".rename") and not sent:  # Optuna gives its lock up
            sent.append(target)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(os, "rename", rename_and_interrupt)
    stopped = trained.study(folder)
    assert sent
    assert stopped.returncode == 128 + number
    assert not list((folder / "out").glob("optuna.journal.lock*"))


def test_a_second_interrupt_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        stop.raise_if_made()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt) as asked:
            stop.raise_if_made()
        assert asked.value.args == (signal.SIGTERM,)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def stop_this_process(folder: Path) -> None:
    """Asks this process to end once a study has three results."""
    wait_for(folder, 3)
    os.kill(os.getpid(), signal.SIGTERM)


def wait_for(folder: Path, results: int) -> None:
    """Waits until a study has so many results."""
    until = time.monotonic() + LATE
    while len(trained.results(folder)) < results and time.monotonic() < until:
        time.sleep(0.02)


def test_a_diverged_run_is_a_result_and_no_failure(troubled: tuple[Path, Any]) -> None:
    folder, done = troubled
    assert {one.contender: one.status for one in read_results(folder / "out")} == {
        "good": "finished",
        "wild": "diverged",
    }
    assert "two-wild-final-x1-s2: diverged" in done.stdout
    assert "NaN" not in (folder / "out/runs/two-wild-final-x1-s2/result.json").read_text()


def test_a_run_that_fails_lets_the_others_go_on_and_is_named_at_the_end(troubled: tuple[Path, Any]) -> None:
    folder, done = troubled
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("1 run(s) failed: two-wrong-final-x1-s2")
    assert "error: roles.router is set, but no block has this role" in done.stderr
    assert (folder / "out/README.md").exists()


def test_a_full_disk_stops_the_study_and_keeps_what_is_finished(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, a device without room")
    contender = {"set": {"model.symopt.stack": "adamw"}}
    folder = tmp_path / "full"
    trained.write(
        folder, families={"two": "tiny.yaml"}, contenders={"a": contender, "b": contender}, search=None, reference=None
    )
    runs = folder / "out/runs"
    (runs / "two-b-final-x1-s2").mkdir(parents=True)
    (runs / "two-b-final-x1-s2/.result.json.half").symlink_to("/dev/full")
    done = trained.study(folder)
    assert done.returncode == 2
    assert "error: the disk of out is full (so said the run two-b-final-x1-s2); finished runs are kept" in done.stderr
    assert list(trained.results(folder)) == ["two-a-final-x1-s2"]


def test_two_studies_do_not_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained.write(tmp_path))
    Path("out").mkdir()
    with FileLock("out/.lock"):
        assert main(["study", "--config", "study.yaml", "--out", "out"]) == 2
    assert "a study is running in out" in capsys.readouterr().err


def test_a_folder_of_another_study_is_refused_with_what_differs(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(trained.write(tmp_path, steps=7))
    assert main(["study", "--config", "study.yaml", "--out", str(whole / "out")]) == 2
    assert "what differs: steps was 6 and is 7. Choose another folder" in capsys.readouterr().err
    assert main(["study", "--config", "study.yaml", "--out", str(whole / "out"), "--report"]) == 2


def test_a_study_imports_neither_lightning_nor_transformers_itself() -> None:
    code = (
        "import sys; import lit_symopt.study.command, lit_symopt.study.running, lit_symopt.study.schedule;"
        "assert not {'lightning', 'transformers', 'optuna', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
