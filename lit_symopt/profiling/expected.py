"""What one step of `SymOpt` must at least do, by role and rule: operations and bytes on this rank.

On one device it follows from groups and layouts, elsewhere from the plan: this rank's operations are those of the
cells and rows that it computes, its bytes those of the elements that it holds. Nothing is counted for communication,
for the copies that form batches, or for passes over the same data after the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lit_symopt.groups import layout_of
from lit_symopt.layout import Layout
from lit_symopt.profiling.operations import Operations, compute_dtype, element_operations, rule_operations
from lit_symopt.profiling.run import Work
from lit_symopt.ranges import Subject
from lit_symopt.rules import get_rule
from lit_symopt.sharding.plan import Cell, Plan, Round, Route

if TYPE_CHECKING:
    from lit_symopt.optim import SymOpt
    from lit_symopt.sharding.step import DistributedStep

Kind = tuple[str, str, str]
"""Role and rule, as ranges name them, and the dtype of the products."""

_HALF = (torch.bfloat16, torch.float16)


def expected_work(optimizer: SymOpt) -> tuple[Work, ...]:
    """The work of one step on this rank: one entry for each role, rule and dtype of the products.

    Parameters that need no gradient or have no elements are left out. An optimizer that follows a strategy counts what
    this rank holds and computes, which may be operations without bytes: of a matrix held by others.

    Args:
        optimizer: attached to its strategy, if it has one.

    Example:
        >>> from lit_symopt import SymOpt
        >>> weight = torch.nn.Parameter(torch.zeros(6, 4))
        >>> (work,) = expected_work(SymOpt([("w", weight)], rule="row_norm", role="embedding"))
        >>> work.bytes  # gradient read, momentum and weight read and written: 5 numbers of 4 bytes for 24 elements
        480.0
        >>> work.dtype, work.flops  # momentum and step 6, row norm 3, scale 1, for 24 elements
        ('float32', 240.0)
    """
    return tuple(
        Work(
            role=role,
            rule=rule,
            flops=done.operations.total,
            bytes=done.bytes,
            dtype=dtype,
            blocks=done.blocks,
            elements=done.elements,
        )
        for (role, rule, dtype), done in _expected(optimizer).items()
    )


def expected_operations(optimizer: SymOpt) -> dict[Kind, Operations]:
    """The operations of `expected_work`, by what they are."""
    return {kind: done.operations for kind, done in _expected(optimizer).items()}


def planned_operations(plan: Plan, *, rank: int, device_type: str) -> dict[Kind, Operations]:
    """Rules and scales that a rank computes in one call of `step()`.

    Of rows that lie on several ranks, each computes its own; the root of a Gram matrix is computed by all.

    Args:
        plan: of all ranks.
        rank: which one.
        device_type: where updates are computed.
    """
    found: dict[Kind, Operations] = {}
    for one in plan.rounds:
        options = one.named_options()
        for cell in one.cells:
            kind = _kind(cell.role, options, layout=one.layout, shape=one.shape, dtype=one.dtype, on=device_type)
            done = _of_cell(one, cell, options, rank=rank, on=device_type)
            if done.total:
                found[kind] = found.get(kind, Operations()) + done
    return found


def bytes_per_element(options: Mapping[str, Any], *, dtype: torch.dtype) -> int:
    """Least bytes an element: the gradient read, state and weight read and written.

    Of a parameter in half precision with an fp32 master, the master is the weight, and the parameter is only written.

    Args:
        options: of a group: `rule`, `momentum`, `master_weights`.
        dtype: of the parameter, which its gradient shares.

    Example:
        >>> options = {"rule": "adamw", "master_weights": True}
        >>> bytes_per_element(options, dtype=torch.float32), bytes_per_element(options, dtype=torch.bfloat16)
        (28, 28)
    """
    size, wide = dtype.itemsize, torch.float32.itemsize if dtype in _HALF else dtype.itemsize
    states = 2 if options["rule"] == "adamw" else int(options["momentum"] > 0)
    weight = 2 * wide + size if dtype in _HALF and options["master_weights"] else 2 * size
    return size + 2 * states * wide + weight


@dataclass
class _Sum:
    operations: Operations = Operations()  # noqa: RUF009  frozen
    bytes: float = 0.0
    blocks: int = 0
    elements: int = 0

    def hold(self, options: Mapping[str, Any], numel: int, dtype: torch.dtype) -> None:
        """A block, or as much of it as this rank holds, and what is done with each element wherever its rule runs."""
        self.operations += Operations(elementwise=float(element_operations(options) * numel))
        self.bytes += bytes_per_element(options, dtype=dtype) * numel
        self.blocks += 1
        self.elements += numel


def _expected(optimizer: SymOpt) -> dict[Kind, _Sum]:
    optimizer._find_strategy()
    found: dict[Kind, _Sum] = {}
    if optimizer._distributed is not None:
        _distributed(found, optimizer, optimizer._distributed)
    else:
        _on_one_device(found, optimizer)
    return found


def _on_one_device(found: dict[Kind, _Sum], optimizer: SymOpt) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.requires_grad or not parameter.numel():
                continue
            dtype, shape, on = _arithmetic(parameter.dtype), tuple(parameter.shape), parameter.device.type
            layout = layout_of(group, shape)
            kind = _kind(str(group["role"]), group, layout=layout, shape=shape, dtype=dtype, on=on)
            done = found.setdefault(kind, _Sum())
            done.hold(group, parameter.numel(), parameter.dtype)
            done.operations += _of_whole(group, layout=layout, shape=shape, dtype=dtype, on=on)


def _distributed(found: dict[Kind, _Sum], optimizer: SymOpt, step: DistributedStep) -> None:
    group_of = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    rank, on = step.transport.rank, step.transport.device.type
    for holding in step.distribution.holdings:
        shapes = {placement.name: placement.shape for placement in holding.placements}
        for segment in holding.segments:
            group, shape, dtype = group_of[segment.name], shapes[segment.name], holding.tensor.dtype
            layout = layout_of(group, shape)
            kind = _kind(str(group["role"]), group, layout=layout, shape=shape, dtype=_arithmetic(dtype), on=on)
            found.setdefault(kind, _Sum()).hold(group, segment.stop - segment.start, dtype)
    for plan in step.plans():
        for kind, operations in planned_operations(plan, rank=rank, device_type=on).items():
            found.setdefault(kind, _Sum()).operations += operations


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of momentum and weight for a parameter of that dtype."""
    return torch.float32 if dtype in _HALF else dtype


def _kind(
    role: str, options: Mapping[str, Any], *, layout: Layout, shape: Sequence[int], dtype: torch.dtype, on: str
) -> Kind:
    name = Subject(rule=options["rule"], elements={role: 1}).name.rsplit("/", 1)[0]
    # A method depends on the side where accelerators decompose small matrices: both are computed in float64.
    part = layout.parts(shape)[0]
    computed = compute_dtype(options, side=min(part.m, part.n), dtype=dtype, device_type=on)
    return name, str(options["rule"]), str(computed).removeprefix("torch.")


def _of_whole(
    options: Mapping[str, Any], *, layout: Layout, shape: Sequence[int], dtype: torch.dtype, on: str
) -> Operations:
    """Rule and scale of everything that a layout finds in a tensor."""
    done = Operations()
    for part in layout.parts(shape):
        done += rule_operations(options, m=part.m, n=part.n, count=part.count, dtype=dtype, device_type=on)
    return done


def _of_cell(one: Round, cell: Cell, options: Mapping[str, Any], *, rank: int, on: str) -> Operations:
    """What a rank computes of a cell."""
    if one.route in (Route.ROWS, Route.GRAM):
        (part,) = one.layout.parts(one.shape)
        first, last = cell.rows[rank]
        return rule_operations(options, m=part.m, n=part.n, rows=last - first, dtype=one.dtype, device_type=on)
    if one.route is Route.OWNER:
        here = cell.numel if cell.owner == rank else 0
    else:
        here = sum(len(stretch) for stretch in cell.held if stretch.rank == rank)
    if here in (0, cell.numel):
        return _of_whole(options, layout=one.layout, shape=one.shape, dtype=one.dtype, on=on) if here else Operations()
    assert get_rule(options["rule"]).kind == "coordinate"  # whose matrices may be cut anywhere
    return rule_operations(options, m=here, n=1, dtype=one.dtype, device_type=on)
