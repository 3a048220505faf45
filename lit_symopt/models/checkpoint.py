"""Trainer checkpoints: which is the newest whole one of a run, and does it fit the model.

A checkpoint can be half-written when a run is killed. It is whole if torch can open it and it holds what a resume
needs; opening maps the file into memory, so that only its table of contents is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from lit_symopt.errors import CheckpointError

if TYPE_CHECKING:
    import lightning as L

SECTION = "lit_symopt"

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
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; --ckpt_path takes a .ckpt file, or 'last'")
    try:
        loaded: object = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError) as error:
        first = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path} is not a whole checkpoint ({first[0] if first else type(error).__name__}); it may have been cut "
            "short by a kill: use an earlier one"
        ) from error
    checkpoint: dict[str, Any] = loaded if isinstance(loaded, dict) else {}
    missing = [key for key in ("state_dict", "global_step", "loops") if key not in checkpoint]
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
        The file, and for each newer one that was passed over a sentence that says why.

    Raises:
        CheckpointError: if there is none; it says where it looked and what was passed over.
    """
    found = {file: file.stat().st_mtime_ns for base, glob in places for file in base.glob(glob) if file.is_file()}
    refuse = refuse_another_run if resume else refuse_another_architecture
    passed_over: list[str] = []
    for file in sorted(found, key=lambda file: (found[file], file.name), reverse=True):
        try:
            refuse(open_checkpoint(file), module, source=str(file))
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            return file, passed_over
    looked = ", ".join(str(base / glob) for base, glob in places)
    why = "".join(f"\n  passed over: {reason}" for reason in passed_over)
    raise CheckpointError(
        f"no checkpoint to continue from: looked for {looked}{why}\n"
        "Run without --ckpt_path to start anew, or give the path of a checkpoint."
    )


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
