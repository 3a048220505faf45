"""What a run is measured on, as its record says it."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import torch


def describe(device: torch.device) -> dict[str, Any]:
    """Name, type, threads of a process for operators, and versions.

    Example:
        >>> sorted(describe(torch.device("cpu")))
        ['cores', 'name', 'python', 'threads', 'torch', 'type']
    """
    import os

    return {
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "type": device.type,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **({"cuda": torch.version.cuda} if device.type == "cuda" else {}),
    }


def _processor() -> str:
    """The model of the processor where the system says it, else the architecture."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
