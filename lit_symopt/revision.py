"""Which commit the package is at, for records."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple


class Revision(NamedTuple):
    """A commit of the package's tree.

    Attributes:
        commit: its hash in full.
        changed: whether tracked files differ from it.
    """

    commit: str
    changed: bool


def revision() -> Revision | None:
    """The commit of the tree the package is imported from; `None` if git knows no such tree.

    Example:
        >>> found = revision()
        >>> found is None or len(found.commit) == 40
        True
    """
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:  # a package inside somebody's tree is not of it
        return None
    commit = _git("rev-parse", "HEAD")
    return None if commit is None else Revision(commit, bool(_git("status", "--porcelain", "--untracked-files=no")))


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None
