"""A folder under its name is whole, whatever was there and whatever happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_symopt.strategies.whole_folder import whole_folder


def nothing() -> None:
    """The barrier of one process."""


def write(path: Path, text: str) -> None:
    with whole_folder(path, leads=True, barrier=nothing) as partial:
        assert not partial.exists()  # DeepSpeed makes it
        partial.mkdir()
        (partial / "shard").write_text(text)


@pytest.mark.parametrize("before", ["nothing", "file", "folder", "link", "remains", "replaced"])
def test_the_folder_takes_the_place_of_whatever_was_there(tmp_path: Path, before: str) -> None:
    path, other = tmp_path / "below" / "one.ckpt", tmp_path / "other"
    other.mkdir()
    if before != "nothing":
        path.parent.mkdir()
    if before == "file":
        path.write_text("an ordinary checkpoint")
    elif before == "folder":
        write(path, "old")
    elif before == "link":
        path.symlink_to(other)
    elif before == "remains":
        (path.parent / ".one.ckpt.partial").mkdir()
        (path.parent / ".one.ckpt.partial" / "stray").touch()
    elif before == "replaced":  # a kill between the two renames
        (path.parent / ".one.ckpt.replaced").mkdir()
    write(path, "new")
    assert [entry.name for entry in path.parent.iterdir()] == ["one.ckpt"]
    assert [entry.name for entry in path.iterdir()] == ["shard"]
    assert (path / "shard").read_text() == "new"
    assert other.is_dir()


def test_an_error_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    write(path, "old")
    with pytest.raises(FileNotFoundError), whole_folder(path, leads=True, barrier=nothing) as partial:
        (partial / "shard").write_text("into a folder that is not there")
    assert [entry.name for entry in tmp_path.iterdir()] == ["one.ckpt"]
    assert (path / "shard").read_text() == "old"


def test_who_does_not_lead_only_waits(tmp_path: Path) -> None:
    waited: list[int] = []
    with whole_folder(tmp_path / "one.ckpt", leads=False, barrier=lambda: waited.append(1)) as partial:
        partial.mkdir()
    assert [entry.name for entry in tmp_path.iterdir()] == [".one.ckpt.partial"]
    assert len(waited) == 3
