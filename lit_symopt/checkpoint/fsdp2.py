"""A distributed checkpoint folder, as Lightning's ModelParallelStrategy saves FSDP2 runs (torch's DCP).

    .metadata        every tensor's shape, and which file holds which part of it; written when all files are
    __R_N.distcp     what rank R wrote
    meta.pt          Lightning's: everything but weights and optimizer state

The keys are `state_dict.<name>` and `optimizer_0.state.<name>.<what>`; torch flattens the groups likewise.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from lit_symopt.checkpoint.folder import Folder
from lit_symopt.checkpoint.storage import Scratch, load_mapped

_RANK = re.compile(r"__(\d+)_\d+\.distcp")


class FSDP2Folder(Folder):
    """FSDP2 of any number of ranks."""

    strategy = "FSDP2"

    @staticmethod
    def is_at(path: Path) -> bool:
        """Whether a distributed checkpoint, or the beginning of one, lies there."""
        return (path / ".metadata").is_file() or (path / "meta.pt").is_file() or any(path.glob("*.distcp"))

    @property
    def world(self) -> int:
        """Ranks that wrote something; a rank that held nothing at all wrote no file."""
        return len({match[1] for file in self.path.glob("*.distcp") if (match := _RANK.fullmatch(file.name))})

    def missing(self) -> list[Path]:
        """`.metadata` and `meta.pt`, which are written last, and every file that `.metadata` points into."""
        missing = [file for name in (".metadata", "meta.pt") if not (file := self.path / name).is_file()]
        if missing:
            return missing
        needed: dict[str, int] = {}
        for part in (self._metadata.storage_data or {}).values():
            needed[part.relative_path] = max(needed.get(part.relative_path, 0), part.offset + part.length)
        return [
            file
            for name, length in sorted(needed.items())
            if not (file := self.path / name).is_file() or file.stat().st_size < length
        ]

    def refuse_incomplete(self) -> None:
        """Checks that every file is there and long enough, and that `meta.pt` can be opened.

        Raises:
            CheckpointError: naming the file.
        """
        super().refuse_incomplete()
        self.header()

    def header(self) -> dict[str, Any]:
        """What Lightning keeps in `meta.pt`."""
        header: dict[str, Any] = load_mapped(self.path / "meta.pt")
        return header

    def groups(self) -> list[dict[str, Any]]:
        """The groups of the first optimizer."""
        wanted = {
            key: None
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, BytesStorageMetadata) and key.startswith("optimizer_0.param_groups")
        }
        groups: list[dict[str, Any]] = self._read(wanted)["optimizer_0"]["param_groups"]
        return groups

    def assemble(self, scratch: Scratch) -> dict[str, Any]:
        """Reads every tensor whole, part by part."""
        wanted = {
            key: scratch.empty(entry.size, entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
            for key, entry in self._metadata.state_dict_metadata.items()
        }
        read = self._read(wanted)
        optimizers = [read[key] for key in sorted(read) if key.startswith("optimizer_")]
        return {**self.header(), "state_dict": read["state_dict"], "optimizer_states": optimizers}

    @cached_property
    def _metadata(self) -> Metadata:
        return FileSystemReader(self.path).read_metadata()

    def _read(self, wanted: dict[str, Any]) -> dict[str, Any]:
        with warnings.catch_warnings():
            # That it loads in this process alone is what is wanted.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            load(wanted, storage_reader=FileSystemReader(self.path), planner=_PlainPlanner(), no_dist=True)
        return _nested({self._metadata.planner_data[key]: value for key, value in wanted.items()})


class _PlainPlanner(DefaultLoadPlanner):
    """torch's, for keys that are flattened already; runs nothing that it reads."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def _nested(flat: dict[Sequence[str | int], Any]) -> dict[str, Any]:
    """Dictionaries and lists from `{path: value}`."""
    root: dict[Any, Any] = {}
    for path, value in flat.items():
        node = root
        for step in path[:-1]:
            node = node.setdefault(step, {})
        node[path[-1]] = value
    nested: dict[str, Any] = _listed(root)
    return nested


def _listed(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    children = {key: _listed(value) for key, value in node.items()}
    if children and all(isinstance(key, int) for key in children):
        return [children[key] for key in sorted(children)]
    return children
