"""The folder of a benchmark: `result.json`, and a page with command, commit, device and spread."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_symopt.bench.result import HEAD, PARTS, Result, cells, lines, part_cells
from lit_symopt.errors import ProfileError
from lit_symopt.profiling.folder import RECORDS, device_slug, refuse_unwritable, unused

RESULT = "result.json"
BENCH = RECORDS / "bench"


def refuse_existing(folder: Path) -> None:
    """Refuses to write where something is, or where nothing can be written.

    Raises:
        ProfileError: if the folder exists and is not empty, is a file, or cannot be made.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ProfileError(f"{folder} is there already; a benchmark replaces nothing, so give --output another folder")
    refuse_unwritable(folder)


def default_folder(*, date: str, device: Mapping[str, Any], shapes: str) -> Path:
    """`profiles/records/bench/<date>-<device>-<shapes>`, with a number if there is one already."""
    return unused(BENCH / f"{date[:10]}-{device_slug(device)}-{Path(shapes).stem}")


def write(folder: Path, result: Result, *, command: str, date: str, commit: str, circumstances: str = "") -> None:
    """Writes both files, as a whole or not at all.

    Args:
        folder: to write to; see `refuse_existing`.
        result: what was measured.
        command: as it was given.
        date: UTC.
        commit: of the package.
        circumstances: what else the machine did, by whoever measured.
    """
    half = folder.with_name(f".{folder.name}.half")
    half.mkdir(parents=True, exist_ok=True)
    said = {"command": command, "date": date, "commit": commit, "circumstances": circumstances}
    (half / RESULT).write_text(json.dumps({**said, **result.to_json()}, indent=1) + "\n", encoding="utf-8")
    (half / "README.md").write_text(page(result, **said), encoding="utf-8")
    if folder.is_dir():
        folder.rmdir()  # empty
    os.replace(half, folder)


def page(result: Result, *, command: str, date: str, commit: str, circumstances: str) -> str:
    """The page of a record, in Markdown."""
    device = result.device
    facts = [
        f"- command: `{command}`",
        f"- date: {date}; commit: {commit}",
        f"- device: {device.get('name')} ({device.get('type')}), {device.get('threads')} thread(s) of "
        f"{device.get('cores')} cores, torch {device.get('torch')}, Python {device.get('python')}",
        "- settings: " + ", ".join(f"{key} {value}" for key, value in result.settings.items()),
        *([f"- circumstances: {circumstances}"] if circumstances else []),
    ]
    title = f"# Optimizer step on {result.shapes.get('name', 'shapes')}: {result.case}"
    blocks = [title, "\n".join(facts)]
    if result.rows:
        blocks.append(_markdown(HEAD, [cells(row, result) for row in result.rows]))
        blocks.append("\n".join(f"- `{row.name}`: {row.about}" for row in result.rows if row.about))
    if result.launches:
        blocks.append(
            _markdown(("layers", "launches of a step"), [(str(a), str(b)) for a, b in result.launches.items()])
        )
    blocks += ["\n".join(f"- {line.removeprefix('- ')}" for line in lines(result))]
    if result.parts:
        blocks += ["## Where our time goes", _markdown(PARTS, [part_cells(part) for part in result.parts])]
    if kinds := result.shapes.get("parameters"):
        rows_of: list[tuple[str, ...]] = [(str(kind), str(count)) for kind, count in kinds.items()]
        blocks += [
            f"## Shapes: {result.shapes['elements']:,} numbers",
            _markdown(("role and shape", "parameters"), rows_of),
        ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in (head, tuple("---" for _ in head), *rows)])
