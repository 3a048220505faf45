"""The folder of a record: the summary, every kernel, pictures, a page to read, and traces beside them."""

from __future__ import annotations

import csv
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_symopt.errors import ProfileError
from lit_symopt.profiling.costs import TraceCosts
from lit_symopt.profiling.events import read_trace
from lit_symopt.profiling.page import page
from lit_symopt.profiling.record import SUMMARY, Record
from lit_symopt.profiling.samples import Rounds
from lit_symopt.profiling.table import kernel_rows

if TYPE_CHECKING:
    from lit_symopt.profiling.roofline import RooflinePoint

RECORDS = Path("profiles") / "records"


def refuse_existing(folder: Path, *, overwrite: bool) -> None:
    """Refuses to write where something is, unless it is a record that may be replaced, or where nothing can be written.

    Raises:
        ProfileError: if the folder is not empty, is a file, or cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise ProfileError(f"{folder} is a file; give --output a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / SUMMARY).is_file():
            raise ProfileError(f"{folder} is not empty, and no record; give --output another folder")
        if not overwrite:
            raise ProfileError(f"{folder} holds a record; give --output another folder, or --overwrite")
    refuse_unwritable(folder)


def refuse_unwritable(folder: Path) -> None:
    """Refuses a folder that could not be made.

    Raises:
        ProfileError: naming it.
    """
    try:
        there = next(parent for parent in folder.absolute().parents if parent.exists())
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ProfileError(
            f"the record cannot be written to {folder}: {error.strerror or error}; give --output another folder"
        ) from error


def unused(folder: Path) -> Path:
    """The folder, with a number behind its name if there is one of that name already."""
    found, number = folder, 2
    while found.exists():
        found, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return found


def default_folder(*, date: str, device: Mapping[str, Any], recipe: str) -> Path:
    """`profiles/records/<date>-<device>-<recipe>`, with a number if there is one already."""
    return unused(RECORDS / f"{date[:10]}-{device_slug(device)}-{_slug(recipe)}")


def device_slug(device: Mapping[str, Any]) -> str:
    """A device as part of a name.

    Example:
        >>> device_slug({"type": "cpu", "name": "Xeon", "threads": 2})
        'cpu-2threads'
        >>> device_slug({"type": "cuda", "name": "NVIDIA H100 80GB HBM3", "threads": 8})
        'nvidia-h100-80gb-hbm3'
    """
    if device.get("type") == "cpu":
        return f"cpu-{device.get('threads')}threads"
    return _slug(str(device.get("name") or device.get("type") or "device"))


def write_folder(
    folder: Path,
    record: Record,
    *,
    rounds: Mapping[str, Rounds],
    points: Mapping[str, Sequence[RooflinePoint]],
    traces: Mapping[str, Sequence[Path]],
) -> None:
    """Writes everything, as a whole or not at all; what is in the folder is replaced.

    Args:
        folder: to write to.
        record: the summary.
        rounds: of each stack.
        points: of each stack's roofline.
        traces: of each stack, the files to keep; they are moved.

    Raises:
        ProfileError: if that fails, as on a full disk.
    """
    folder = folder.resolve()
    half = folder.with_name(f".{folder.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    try:
        half.mkdir(parents=True)
        _fill(half, record, rounds=rounds, points=points, traces=traces)
        if folder.is_dir():
            shutil.rmtree(folder)
        os.replace(half, folder)
    except OSError as error:
        raise ProfileError(
            f"the record could not be written to {folder}: {error.strerror or error}; give --output another folder, or "
            "make room"
        ) from error
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _fill(
    folder: Path,
    record: Record,
    *,
    rounds: Mapping[str, Rounds],
    points: Mapping[str, Sequence[RooflinePoint]],
    traces: Mapping[str, Sequence[Path]],
) -> None:
    windows = {name: _windows(of_stack) for name, of_stack in rounds.items()}
    _write_kernels(folder / "kernels.csv", windows)
    drawn = dict(_draw(folder, windows=windows, rounds=rounds, points=points, traces=traces))
    for name, files in traces.items():
        for file in files:
            (folder / "traces" / name).mkdir(parents=True, exist_ok=True)
            shutil.move(file, folder / "traces" / name / file.name)
    text = page(record, windows=windows, points=points, drawn=drawn)
    (folder / "README.md").write_text(text, encoding="utf-8")
    record.save(folder)


def _windows(rounds: Rounds) -> list[TraceCosts]:
    return [window for ranks in rounds for rank in ranks for window in rank.windows]


def _write_kernels(path: Path, windows: Mapping[str, Sequence[TraceCosts]]) -> None:
    rows = [{"stack": name, **row} for name, own in windows.items() for row in kernel_rows(own)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["stack"])
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")


def _draw(
    folder: Path,
    *,
    windows: Mapping[str, Sequence[TraceCosts]],
    rounds: Mapping[str, Rounds],
    points: Mapping[str, Sequence[RooflinePoint]],
    traces: Mapping[str, Sequence[Path]],
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Writes the pictures; of each stack, and of all under the name ``, their titles and files."""
    from matplotlib.image import imsave

    from lit_symopt.profiling import pictures

    def written(name: str, image: Any) -> str:
        imsave(folder / name, image)
        return name

    if len(windows) > 1:
        yield "", [("What the stacks cost", written("stacks.png", pictures.compare_bars(windows)))]
    for stack, own in windows.items():
        first = rounds[stack][0][0]
        found = [("What each update costs", written(f"{stack}-costs.png", pictures.cost_bars(own)))]
        if traces.get(stack):
            image = pictures.timeline(read_trace(traces[stack][0]))
            found.append(("One step", written(f"{stack}-timeline.png", image)))
        if points.get(stack) and first.ceilings is not None:
            image = pictures.roofline_plot(points[stack], first.ceilings)
            found.append(("How near to the limits of the machine", written(f"{stack}-roofline.png", image)))
        if first.memory:
            found.append(("Memory", written(f"{stack}-memory.png", pictures.memory_bars(first.memory))))
        yield stack, found
