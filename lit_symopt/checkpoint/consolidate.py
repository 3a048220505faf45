"""Any checkpoint as one ordinary file, and what a checkpoint is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_symopt.checkpoint.folder import Folder
from lit_symopt.checkpoint.masters import in_full_precision
from lit_symopt.checkpoint.named import keyed_by_name, prefix_between
from lit_symopt.checkpoint.storage import load_mapped, save_whole, scratch_beside
from lit_symopt.errors import CheckpointError


@torch.no_grad()
def consolidate(source: str | Path, target: str | Path, *, force: bool = False) -> Path:
    """Write one ordinary Trainer file from a checkpoint of any strategy and number of ranks.

    The weights are whole and, where there are fp32 masters, those; the optimizer's state is whole and keyed by
    parameter name; everything else that the Trainer keeps comes along. `--ckpt_path` resumes the file on one device,
    under DDP and FSDP2, and under DeepSpeed with the strategies of `lit_symopt.strategies`.

    It needs about the memory of the largest tensor, and for a folder room for two copies of the result on the disk of
    `target` while it runs: what is put together lies in mapped files that the system can write out.

    Args:
        source: a `.ckpt` file, or a folder of DeepSpeed or FSDP2.
        target: the file to write; it is there whole, or not at all.
        force: replace `target`.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: if the source is not whole or of no known kind, or the target exists.
    """
    source, target = Path(source), Path(target)
    if target.is_dir() or (target.exists() and not force):
        raise CheckpointError(
            f"{target} exists{' and is a folder' if target.is_dir() else ' (--force replaces it)'}; give another path"
        )
    if source.is_dir():
        folder = Folder.at(source)
        folder.refuse_incomplete()
        with scratch_beside(target) as scratch:
            save_whole(normalized(folder.assemble(scratch)), target)
    else:
        save_whole(normalized(read_file(source)), target)
    return target


def read_file(path: Path) -> dict[str, Any]:
    """An ordinary Trainer file, mapped.

    Raises:
        CheckpointError: if it is missing, not whole or something else.
    """
    loaded: object = load_mapped(path)
    if not isinstance(loaded, dict) or "state_dict" not in loaded:
        raise CheckpointError(f"{path} is not a Trainer checkpoint: it has no state_dict")
    return loaded


def normalized(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The same checkpoint with full-precision weights and the state of every `SymOpt` keyed by parameter name."""
    # DeepSpeed saves some tensors as parts of a graph.
    weights, optimizers = {name: weight.detach() for name, weight in checkpoint["state_dict"].items()}, []
    for optimizer in checkpoint.get("optimizer_states", ()):
        if any(group.get("param_names") is None for group in optimizer["param_groups"]):
            optimizers.append(optimizer)  # another optimizer's: as it is
        else:
            optimizers.append(keyed_by_name(_paired(optimizer, list(weights)), weights))
            _refuse_misfits(optimizers[-1], weights)
    return in_full_precision({**checkpoint, "state_dict": weights, "optimizer_states": optimizers})


def _paired(optimizer: Mapping[str, Any], weights: list[str]) -> Mapping[str, Any]:
    """A state dict whose numbers stand beside their names, where FSDP2's full file has sorted them.

    torch numbers parameters group by group. Lightning's full file of an FSDP2 run has their places in
    `model.parameters()` instead, sorted within each group; the names keep the order of the group. Both follow the
    order of the weights once the names are sorted by it.
    """
    keys = [key for group in optimizer["param_groups"] for key in group["params"]]
    if keys == list(range(len(keys))) or not all(isinstance(key, int) for key in keys):
        return optimizer
    names = [name for group in optimizer["param_groups"] for name in group["param_names"]]
    prefix = prefix_between(names, weights)
    places = {name: place for place, name in enumerate(weights)}
    groups = []
    for group in optimizer["param_groups"]:
        in_order = sorted(group["param_names"], key=lambda name: places[prefix + name])
        key_of = dict(zip(in_order, sorted(group["params"]), strict=True))
        groups.append({**group, "params": [key_of[name] for name in group["param_names"]]})
    return {**optimizer, "param_groups": groups}


def _refuse_misfits(optimizer: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    for name, state in optimizer["state"].items():
        for what, value in state.items():
            if value.ndim > 0 and value.shape != weights[name].shape:
                raise CheckpointError(
                    f"the {what} of {name!r} has the shape {tuple(value.shape)} and its weight "
                    f"{tuple(weights[name].shape)}: the checkpoint contradicts itself"
                )
