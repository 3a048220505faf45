"""What a run ran on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any


def environment(*, threads: int) -> dict[str, Any]:
    """`torch`, `python`, `machine`, `cores`, `threads` and `commit` of a run on this machine, for its result.

    The commit is that of the package's tree, with `+` where files were changed since; `None` if git knows none.

    Args:
        threads: of a run.
    """
    return {
        "torch": version("torch"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "commit": _commit(Path(__file__).parents[1]),
    }


def _commit(package: Path) -> str | None:
    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=package, capture_output=True, text=True, check=False)
        except OSError:  # no git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:  # a package inside somebody's tree is not of it
        return None
    commit = git("rev-parse", "--short", "HEAD")
    return f"{commit}+" if commit and git("status", "--porcelain", "--untracked-files=no") else commit
