"""Trainer checkpoints: which is the newest whole one of a run, and does it fit the model.

A checkpoint can be half-written when a run is killed. A file is whole if torch can open it and it holds what a resume
needs; opening maps it into memory, so that only its table of contents is read. A folder, which the ranks of a sharded
run write together, is whole if the files of all of them are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_symopt.checkpoint.folder import Folder
from lit_symopt.checkpoint.storage import load_mapped
from lit_symopt.errors import CheckpointError

if TYPE_CHECKING:
    import lightning as L

SECTION = "lit_symopt"
_NEEDED = ("global_step", "loops")

# Entries of a transformers configuration that do not change the function the weights stand for.
_NOT_ARCHITECTURE = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "max_position_embeddings",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "transformers_version",
        "use_cache",
    }
)
_SHOWN = 8


def open_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Trainer checkpoint, its tensors mapped from the file and not yet read.

    Raises:
        CheckpointError: if there is no such file, or it is not a whole Trainer checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder that the ranks of a run wrote together; make one file of it first: "
            f"lit-symopt checkpoint consolidate {path} DST"
        )
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; --ckpt_path takes a .ckpt file or folder, or 'last'")
    loaded: object = load_mapped(path)
    return _of_a_trainer(loaded if isinstance(loaded, dict) else {}, path, needed=("state_dict", *_NEEDED))


def open_header(path: str | Path) -> dict[str, Any]:
    """What a checkpoint, file or folder, says of itself; of a folder that is everything but tensors.

    Raises:
        CheckpointError: if there is none, or it is not whole, naming the missing file.
    """
    path = Path(path)
    if not path.is_dir():
        return open_checkpoint(path)
    folder = Folder.at(path)
    folder.refuse_incomplete()
    return _of_a_trainer(folder.header(), path, needed=_NEEDED)


def _of_a_trainer(checkpoint: dict[str, Any], path: Path, *, needed: Sequence[str]) -> dict[str, Any]:
    missing = [key for key in needed if key not in checkpoint]
    if missing:
        raise CheckpointError(f"{path} is not a Trainer checkpoint: it has no {', '.join(missing)}")
    return checkpoint


def newest_checkpoint(
    places: Sequence[tuple[Path, str]], module: L.LightningModule, *, resume: bool = True
) -> tuple[Path, list[str]]:
    """The newest whole checkpoint that belongs to a module, by the time it was written.

    Args:
        places: where to look, as folders with a glob pattern each.
        module: what the checkpoint is for; those of another architecture are passed over.
        resume: training continues, so that those of another stack are passed over too.

    Returns:
        The file or folder, and for each newer one that was passed over a sentence that says why.

    Raises:
        CheckpointError: if there is none; it says where it looked and what was passed over.
    """
    found = {path: _written(path) for base, glob in places for path in base.glob(glob)}
    refuse = refuse_another_run if resume else refuse_another_architecture
    passed_over: list[str] = []
    for path in sorted(found, key=lambda path: (found[path], path.name), reverse=True):
        try:
            refuse(open_header(path), module, source=str(path))
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            return path, passed_over
    looked = ", ".join(str(base / glob) for base, glob in places)
    why = "".join(f"\n  passed over: {reason}" for reason in passed_over)
    raise CheckpointError(
        f"no checkpoint to continue from: looked for {looked}{why}\n"
        "Run without --ckpt_path to start anew, or give the path of a checkpoint."
    )


def _written(path: Path) -> int:
    """When a checkpoint was written; of a folder, when the last of its files was."""
    files = path.rglob("*") if path.is_dir() else [path]
    return max((file.stat().st_mtime_ns for file in files if file.is_file()), default=0)


def refuse_another_run(
    checkpoint: Mapping[str, Any], module: L.LightningModule, *, source: str = "the checkpoint"
) -> None:
    """Checks that training can continue from a checkpoint: the same architecture and the same stack.

    Raises:
        CheckpointError: naming what differs.
    """
    refuse_another_architecture(checkpoint, module, source=source)
    saved = checkpoint.get(SECTION, {}).get("stack")
    configured = getattr(getattr(module, "symopt", None), "stack", None)
    if saved is not None and configured is not None and saved != configured:
        raise CheckpointError(
            f"{source} was made with the stack {saved!r}, this run uses {configured!r}: the optimizer's state does not "
            f"carry over; continue with the stack {saved!r}, or start a new run"
        )


def refuse_another_architecture(
    checkpoint: Mapping[str, Any], module: L.LightningModule, *, source: str = "the checkpoint"
) -> None:
    """Checks that the weights of a checkpoint fit a module.

    Raises:
        CheckpointError: naming the entries of the configuration, or else the parameters, that differ.
    """
    saved = checkpoint.get(SECTION, {}).get("architecture")
    describe = getattr(module, "architecture", None)
    current = describe() if callable(describe) else None
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        differences = _entries(saved, current)
    else:
        differences = _tensors(checkpoint.get("state_dict", {}), module.state_dict())
    if differences:
        more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise CheckpointError(
            f"{source} is of another architecture: {'; '.join(differences[:_SHOWN])}{more}. Give the model the "
            "architecture of the checkpoint, or start a new run"
        )


def _entries(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    names = sorted((saved.keys() | current.keys()) - _NOT_ARCHITECTURE)
    return [
        f"{name} is {saved.get(name)!r} there and {current.get(name)!r} here"
        for name in names
        if _plain(saved.get(name)) != _plain(current.get(name))
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tensors(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    # A sharded checkpoint keeps its weights elsewhere, and a module may build its layers later: the strategy compares.
    if not saved or not current:
        return []
    differences = [f"{name} is only there" for name in saved if name not in current]
    differences += [f"{name} is only here" for name in current if name not in saved]
    differences += [
        f"{name} is {tuple(saved[name].shape)} there and {tuple(current[name].shape)} here"
        for name in saved
        if name in current and saved[name].shape != current[name].shape
    ]
    return differences
