"""One parameter in a step: what of it is read and written, and whom it may be updated together with."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_symopt.groups import layout_of
from lit_symopt.layout import Shape
from lit_symopt.ranges import Subject

# Options that decide what a matrix rule computes; lr, weight_decay and radius may differ within a bucket.
_RULE_OPTIONS = (
    "rule",
    "centered",
    "momentum",
    "momentum_kind",
    "scale",
    "alpha",
    "eps",
    "row_damping",
    "precision",
    "backend",
    "scratch",
)

BATCHED_BY = (*_RULE_OPTIONS, "layout", "betas", "radius", "master_weights")
"""Options of a group that decide who is updated together; rates are read at every step."""

FUSED = frozenset({"cpu", "cuda", "xpu", "mps"})
"""Types of devices on which torch has fused AdamW and SGD."""

KEPT = ("momentum_buffer", "exp_avg", "exp_avg_sq")
"""State with one number an element."""


@dataclass
class Member:
    """One parameter in a step, or some cells of one.

    Attributes:
        name: for errors.
        gradient: of this step; of the dtype of the parameter or of the weight.
        weight: what is updated: the parameter itself, or its fp32 master.
        parameter: where a master is written back.
        group: the parameter group.
        state: the optimizer state.
    """

    name: str
    gradient: Tensor
    weight: Tensor
    parameter: Tensor
    group: dict[str, Any]
    state: dict[str, Tensor]

    def bucket(self) -> Hashable:
        """What members must share to be updated together."""
        group, weight = self.group, self.weight
        where = (layout_of(group, weight.shape), tuple(weight.shape), weight.dtype, self.gradient.dtype, weight.device)
        if group["rule"] == "adamw":
            # One rate for all: and two groups that have the same one now need not have it after the next step.
            return ("adamw", id(group), *where)
        return (*(group[option] for option in _RULE_OPTIONS), *where)

    def written(self) -> list[Tensor]:
        """The weights that a step writes."""
        return [self.weight, *([] if self.weight is self.parameter else [self.parameter])]

    def touched(self) -> list[Tensor]:
        """Every tensor that a step writes."""
        return [*self.state.values(), *self.written()]

    def part(self, cells: int, shape: Shape, which: slice) -> Member:
        """Some of the `cells` equal cells, of a shape, that the tensors consist of; shares their storage."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor.view(cells, *shape)[which] if tensor.numel() == self.weight.numel() else tensor

        weight = cut(self.weight)
        return replace(
            self,
            gradient=cut(self.gradient),
            weight=weight,
            parameter=weight if self.parameter is self.weight else cut(self.parameter),
            state={key: cut(value) for key, value in self.state.items()},
        )


def subject_of(members: Sequence[Member]) -> Subject:
    """What a range says of members of one rule: elements by role, and the shape of the batch."""
    elements: dict[str, int] = {}
    for member in members:
        role = str(member.group["role"])
        elements[role] = elements.get(role, 0) + member.weight.numel()
    first = members[0]
    alike = all(member.weight.shape == first.weight.shape for member in members)
    shape = (len(members), *first.weight.shape) if alike else (sum(elements.values()),)
    return Subject(rule=first.group["rule"], elements=elements, shape=shape)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; shares its storage."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def make_state(member: Member) -> None:
    """Create the state a rule keeps: nothing, one momentum an element, or AdamW's two."""
    state, weight, group = member.state, member.weight, member.group
    if group["rule"] == "adamw":
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        if weight.device.type != "cpu" and state["step"].device != weight.device:
            # The step counter lies on the device, so that a refused step can be masked without asking. A checkpoint
            # brings it back on the host.
            state["step"] = state["step"].to(weight.device)
    elif group["momentum"] > 0.0 and "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)


def fusable(member: Member) -> bool:
    """Whether torch's fused operations can be used: they walk through memory and do not look at strides."""
    weight, kept = member.weight, [member.state[key] for key in KEPT if key in member.state]
    # The state of a model that was moved to another dtype keeps its own.
    return (
        weight.device.type in FUSED
        and all(tensor.is_contiguous() for tensor in (member.gradient, weight, *kept))
        and all(tensor.dtype == weight.dtype for tensor in kept)
    )
