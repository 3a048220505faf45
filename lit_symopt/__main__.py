"""`python -m lit_symopt ...`, and by path for launchers: `fabric run lit_symopt/__main__.py fit --config ...`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:
        # Run by path: Python put this file's folder on the import path, where `data` or `config` would mean ours.
        sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from lit_symopt.cli import main

    sys.exit(main())
