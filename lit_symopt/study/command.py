"""`lit-symopt study`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_symopt.errors import ConfigError

if TYPE_CHECKING:
    from lit_symopt.study.spec import Study

FAILURES = 1
REPORT = "README.md"
INTERRUPTED = 128  # as shells say it: 128 + the signal's number


def run(arguments: Sequence[str]) -> int:
    """Run what is missing of a study and write its report.

    The exit code is 0; 1 if runs failed or a search found nothing; 130 after Ctrl-C.

    Args:
        arguments: what follows the command's name.

    Raises:
        SymOptError, SystemExit: for wrong input, and for a full disk.
    """
    given = _options().parse_args(list(arguments))
    from lit_symopt.study.folder import STUDIES, claimed, refuse_another
    from lit_symopt.study.process import is_disk_full
    from lit_symopt.study.reading import load
    from lit_symopt.study.running import DiskFullError, Runner, cores
    from lit_symopt.study.stop_request import StopRequest

    study = load(given.config)
    folder: Path = given.out or STUDIES / study.name
    for name in ("jobs", "threads"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value} must be at least 1")
    try:
        if given.report:
            refuse_another(study, folder)
            _write(study, folder)
            return 0
        with claimed(study, folder), StopRequest() as stop:
            from lit_symopt.study.schedule import Schedule
            from lit_symopt.study.search import Searcher

            schedule = Schedule(study, folder, Searcher(study, folder))
            runner = Runner(
                schedule=schedule, jobs=given.jobs or max(1, cores() // given.threads), threads=given.threads, stop=stop
            )
            try:
                runner.run_all()
                if schedule.results:
                    _write(study, folder)
                stop.raise_if_made()
            except KeyboardInterrupt as asked:
                number = asked.args[0] if asked.args else 2
                print("interrupted; finished runs are kept: give the same command again to go on", file=sys.stderr)
                return INTERRUPTED + int(number)
    except OSError as error:
        if is_disk_full(error):
            raise DiskFullError(folder, str(error)) from error
        raise
    for what, why in schedule.stopped.items():
        print(f"no final runs of {what}: {why}", file=sys.stderr)
    for name, why in runner.failed.items():
        print(f"\n{name} {why}", file=sys.stderr)
    if runner.failed:
        print(f"\n{len(runner.failed)} run(s) failed: {', '.join(runner.failed)}", file=sys.stderr)
    return FAILURES if runner.failed or schedule.stopped else 0


def _write(study: Study, folder: Path) -> None:
    """Tables, plots and the report of all results, made anew."""
    from lit_symopt.study.plots import write_plots
    from lit_symopt.study.report import report
    from lit_symopt.study.result import read_results
    from lit_symopt.study.table import write_tables

    results = read_results(folder)
    if not results:
        raise ConfigError(f"{folder} has no finished runs to report on; run the study first, without --report")
    tables = write_tables(results, folder)
    plots = write_plots(study, results, folder)
    page = folder / REPORT
    page.write_text(report(study, results, plots), encoding="utf-8")
    logged = {tag for result in results for tag in result.records}
    for tag in study.record:
        if tag not in logged:
            print(f"no run logged {tag}, which record lists", file=sys.stderr)
    print(f"{page}\n" + "\n".join(map(str, (*tables, *plots.values()))))


def _options() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lit-symopt study",
        description="Compare optimizers on recipes: search rates in the same number of trials each, run the best "
        "with other seeds, and report. Finished runs are not repeated: give the same command again after a stop. "
        "Exit code 1: runs failed; 2: wrong input, or a full disk.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="STUDY", help="see configs/studies")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/studies/NAME")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once (default: cores, divided by --threads)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of a run (1)")
    parser.add_argument("--report", action="store_true", help="run nothing, only rebuild tables, plots and report")
    return parser
