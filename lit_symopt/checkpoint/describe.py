"""What a checkpoint is, in a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_symopt.checkpoint.consolidate import read_file
from lit_symopt.checkpoint.folder import Folder


def describe(path: str | Path) -> str:
    """Who saved a checkpoint at which step, of which model, and the rule of every group of its optimizer.

    Raises:
        CheckpointError: if it is not whole, naming what is missing, or of no known kind.
    """
    path = Path(path)
    groups: list[Mapping[str, Any]]
    if path.is_dir():
        folder = Folder.at(path)
        folder.refuse_incomplete()
        saved_by = f"{folder.strategy}, {folder.world} rank(s); one file of it: lit-symopt checkpoint consolidate"
        header, groups = folder.header(), list(folder.groups())
    else:
        header = read_file(path)
        groups = [group for optimizer in header.get("optimizer_states", ()) for group in optimizer["param_groups"]]
        saved_by = "one ordinary file"
    section = header.get("lit_symopt", {})
    lines = {
        "saved as": saved_by,
        "step": str(header.get("global_step", "not said")),
        "model": str(section.get("architecture", {}).get("model_type", "not said")),
        "stack": str(section.get("stack", "not said")),
    }
    described = [f"{path} is whole", *(f"  {name:<10}{value}" for name, value in lines.items())]
    for group in groups:
        tensors = len(group.get("param_names") or group["params"])
        what = f"{group.get('rule', 'a rule that is not said')}, lr {float(group['lr']):g}, {tensors} parameter(s)"
        described.append(f"  {group.get('name', 'group'):<18}{what}")
    return "\n".join(described)
