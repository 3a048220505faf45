"""Optimizer state by parameter name: out of any `SymOpt.state_dict()` of whole tensors, into any distribution."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_symopt.checkpoint.stretches import put, take
from lit_symopt.errors import CheckpointError
from lit_symopt.groups import MEANING
from lit_symopt.member import local_part

if TYPE_CHECKING:
    from lit_symopt.optim import SymOpt
    from lit_symopt.sharding.holdings import Distribution, Holding

# Keys of a group that say what the optimizer is, not how it is set: a checkpoint does not bring them along.
_OWN = frozenset({"params", "param_names", "shapes", "layout", "name"})
_SHOWN = 8


class NamedState(dict[str, dict[str, Tensor]]):
    """State tensors of every parameter by its name, and the groups they were saved with.

    Attributes:
        groups: as saved, with the options of each and the `param_names` it holds.
    """

    def __init__(self, state: Mapping[str, dict[str, Tensor]], groups: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(state)
        self.groups = tuple(groups)


def named_state(state_dict: Mapping[str, Any]) -> NamedState:
    """State by parameter name of the `state_dict` of a `SymOpt` on one device or under DDP.

    Args:
        state_dict: with one entry of `params` for each of `param_names` in every group.

    Raises:
        CheckpointError: if it has no names, or was saved by one rank of several and holds only that rank's share.

    Example:
        >>> from lit_symopt import SymOpt
        >>> weight = torch.nn.Parameter(torch.eye(2))
        >>> optimizer = SymOpt([("layer.weight", weight)], rule="spectral")
        >>> weight.grad = torch.ones(2, 2)
        >>> optimizer.step()
        >>> {name: list(state) for name, state in named_state(optimizer.state_dict()).items()}
        {'layer.weight': ['momentum_buffer']}
    """
    groups = state_dict["param_groups"]
    _refuse_nameless(groups)
    state = state_dict["state"]
    named = {
        name: {what: value.detach() for what, value in state.get(key, {}).items()}
        for group in groups
        for key, name in zip(group["params"], group["param_names"], strict=True)
    }
    return NamedState(named, groups)


def keyed_by_name(state_dict: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The same `state_dict` with names in place of torch's numbers, which depend on the order of the groups.

    `load_state_dict` takes either. FSDP2 under Lightning does not: it would read the numbers as places in
    `model.parameters()`, and give a block the momentum of another.

    Args:
        state_dict: of a `SymOpt`, whole tensors.
        names: of the weights saved with it; where the optimizer was built for a submodule, they say which.
    """
    named = named_state(state_dict)
    prefix = prefix_between(list(named), names)
    groups = [{**group, "params": [prefix + name for name in group["param_names"]]} for group in named.groups]
    return {**state_dict, "state": {prefix + name: state for name, state in named.items()}, "param_groups": groups}


def load_named(
    optimizer: SymOpt,
    distribution: Distribution,
    state: Mapping[str, Mapping[str, Tensor]],
    weights: Mapping[str, Tensor],
) -> None:
    """Copy whole tensors into what this rank holds: weights, state, and the options of the groups.

    Every rank calls it with the same arguments; nothing is communicated. Weights that the strategy keeps beside what
    the optimizer holds (16-bit copies, frozen parameters, buffers) are the caller's.

    Args:
        optimizer: a `SymOpt`.
        distribution: who holds what.
        state: of `named_state`; a block without an entry of a key starts with zeros there.
        weights: by parameter name. An fp32 master among the state, being more precise, wins over the weight.

    Raises:
        CheckpointError: naming every block whose shape, rule or layout differs, or that only one side has. Nothing
            has been changed then.
    """
    placements = {placement.name: placement for one in distribution.holdings for placement in one.placements}
    own_groups = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    prefix = prefix_between(list(placements), weights)
    saved_groups = getattr(state, "groups", ())
    differences = _differing_shapes(placements, prefix, state, weights)
    if saved_groups:
        differences += _differing_groups({name: own_groups[name] for name in placements}, saved_groups)
    if differences:
        more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise CheckpointError(
            f"the checkpoint is of another model or stack: {'; '.join(differences[:_SHOWN])}{more}. "
            "Resume with the configuration it was saved with, or load only the weights."
        )
    if saved_groups:
        _adopt(optimizer.param_groups, saved_groups)
    with torch.no_grad():
        for holding in distribution.holdings:
            if holding.placements:
                optimizer.make_state(holding.tensor, own_groups[holding.placements[0].name])
                _fill(holding, optimizer.state[holding.tensor], prefix, state, weights)


def prefix_between(names: Sequence[str], known: Collection[str]) -> str:
    """What comes before the optimizer's names in those of the weights: nothing, or `"net."` if it was built for `net`.

    Raises:
        CheckpointError: naming what is missing, if no prefix fits all.

    Example:
        >>> prefix_between(["weight"], ["net.weight", "net.bias"])
        'net.'
    """
    present = set(known)
    ends = [name[: -len(names[0])] for name in known if name.endswith("." + names[0])] if names else []
    for prefix in ("", *ends):
        if all(prefix + name in present for name in names):
            return prefix
    missing = [name for name in names if name not in present]
    raise CheckpointError(
        f"the checkpoint has no weights for {len(missing)} parameter(s) of the optimizer: {_listed(missing)}; it is of "
        "another model"
    )


def _refuse_nameless(groups: Iterable[Mapping[str, Any]]) -> None:
    for group in groups:
        names = group.get("param_names")
        if names is None:
            raise CheckpointError(
                "the optimizer's state has no parameter names: it was not saved by SymOpt, and cannot be moved"
            )
        if len(names) != len(group["params"]):
            raise CheckpointError(
                f"group {group.get('name')!r} holds {len(group['params'])} tensor(s) for {len(names)} parameters: this "
                "is one rank's share of a sharded state; make an ordinary file of the whole checkpoint first "
                "(lit-symopt checkpoint consolidate SRC DST)"
            )


def _differing_shapes(
    placements: Mapping[str, Any], prefix: str, state: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, Tensor]
) -> list[str]:
    differences = []
    for name, placement in placements.items():
        here = tuple(placement.shape)
        tensors = [weights[prefix + name], *(value for value in state.get(name, {}).values() if value.ndim > 0)]
        there = next((tuple(tensor.shape) for tensor in tensors if tuple(tensor.shape) != here), None)
        if there is not None:
            differences.append(f"{name!r} has the shape {there} there and {here} here")
    return differences


def _differing_groups(own: Mapping[str, Mapping[str, Any]], saved_groups: Iterable[Mapping[str, Any]]) -> list[str]:
    saved = {name: group for group in saved_groups for name in group["param_names"]}
    differences = [f"{name!r} is only there" for name in saved if name not in own]
    differences += [f"{name!r} is only here" for name in own if name not in saved]
    for name in (name for name in own if name in saved):
        differences += [
            f"{name!r}: {key} is {str(saved[name].get(key))!r} there and {str(own[name].get(key))!r} here"
            for key in MEANING
            if str(saved[name].get(key)) != str(own[name].get(key))
        ]
    sources: dict[str, set[str]] = {}
    for name in (name for name in own if name in saved):
        sources.setdefault(str(own[name]["name"]), set()).add(str(saved[name].get("name")))
    differences += [
        f"the group {name!r} here is made of the groups {', '.join(map(repr, sorted(parts)))} there"
        for name, parts in sources.items()
        if len(parts) > 1
    ]
    return differences


def _fill(
    holding: Holding,
    own: dict[str, Tensor],
    prefix: str,
    state: Mapping[str, Mapping[str, Tensor]],
    weights: Mapping[str, Tensor],
) -> None:
    """Copies what a held tensor and its state share with whole tensors; what nobody saved becomes zero."""
    dims = {placement.name: placement.dim for placement in holding.placements}
    for segment in holding.segments:
        saved, dim = state.get(segment.name, {}), dims[segment.name]
        master = saved.get("master", weights[prefix + segment.name])
        for target, whole in (
            (holding.tensor, master),
            *((own[key], master if key == "master" else saved.get(key)) for key in own if key != "step"),
        ):
            piece = (
                torch.zeros(segment.stop - segment.start)
                if whole is None
                else take(whole, dim=dim, start=segment.start, stop=segment.stop)
            )
            put(local_part(target), piece, dim=dim, start=segment.offset)
    if "step" in own:
        own["step"].fill_(_steps([placement.name for placement in holding.placements], state))


def _steps(names: Sequence[str], state: Mapping[str, Mapping[str, Tensor]]) -> float:
    """AdamW's count of steps, of which a tensor that holds many parameters has one."""
    values = {name: float(state[name]["step"]) for name in names if "step" in state.get(name, {})}
    most = max(values.values(), default=0.0)
    behind = [name for name, value in values.items() if value < most]
    if behind:
        warnings.warn(
            f"{_listed(behind)} had fewer steps than others that now share one tensor with them: AdamW's bias "
            f"correction counts {most:g} steps for all",
            stacklevel=4,
        )
    return most


def _adopt(own_groups: Iterable[dict[str, Any]], saved_groups: Iterable[Mapping[str, Any]]) -> None:
    """Rates, decay and the like come along, as with any torch optimizer."""
    saved = {name: group for group in saved_groups for name in group["param_names"]}
    for group in own_groups:
        source = saved[group["param_names"][0]]
        group.update({key: value for key, value in source.items() if key not in _OWN})
        group["betas"] = tuple(group["betas"])  # torch's distributed checkpoints make lists of tuples


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
