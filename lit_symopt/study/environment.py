"""What a run ran on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

from lit_symopt.revision import revision


def environment(*, threads: int) -> dict[str, Any]:
    """`torch`, `python`, `machine`, `cores`, `threads` and `commit` of a run on this machine, for its result.

    The commit is that of the package's tree, with `+` where files were changed since; `None` if git knows none.

    Args:
        threads: of a run.
    """
    found = revision()
    return {
        "torch": version("torch"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "commit": None if found is None else f"{found.commit[:7]}{'+' if found.changed else ''}",
    }
