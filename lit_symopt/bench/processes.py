"""The same contest in several processes, one after another: how memory is laid out differs from one to the next."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lit_symopt.bench.contest import Times
from lit_symopt.bench.folder import RESULT
from lit_symopt.bench.result import Result
from lit_symopt.errors import ProfileError


def in_processes(arguments: Sequence[str], count: int) -> Result:
    """Runs `lit-symopt bench` with the same arguments, and joins what the processes found.

    Args:
        arguments: of the command.
        count: how many processes.

    Raises:
        ProfileError: if one of them ends with an error, which it has printed.
    """
    results = []
    with tempfile.TemporaryDirectory(prefix="lit-symopt-bench-") as folder:
        for number in range(1, count + 1):
            print(f"process {number} of {count}", flush=True)
            output = Path(folder) / str(number)
            own = ["--processes", "1", "--output", str(output)]  # the last word on both counts
            done = subprocess.run([sys.executable, "-m", "lit_symopt", "bench", *arguments, *own], check=False)
            if done.returncode:
                raise ProfileError(f"process {number} of {count} ended with exit code {done.returncode}; see above")
            results.append(Result.load(output / RESULT))
    return joined(results)


def joined(results: Sequence[Result]) -> Result:
    """One result of several: all rounds, of those who took part in every process; the rest is of the first.

    The ratio of each process is kept beside.
    """
    first, times = results[0], [{row.name: row.times for row in result.rows} for result in results]
    everywhere = [row for row in first.rows if all(row.name in of_one for of_one in times)]
    rows = [
        replace(row, times=Times(tuple(round_ for of_one in times for round_ in of_one[row.name].rounds)))
        for row in everywhere
    ]
    ours = first.rows[0].name if first.rows else ""
    by_process = {
        row.name: tuple(of_one[row.name].over(of_one[ours]).value for of_one in times) for row in everywhere[1:]
    }
    absent = {name: why for result in results for name, why in result.absent.items()}
    return replace(
        first,
        rows=tuple(rows),
        absent=absent,
        by_process=by_process,
        settings={**first.settings, "processes": len(results)},
    )
