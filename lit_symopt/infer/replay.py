"""Moving labels as an operation moves entries: the views, copies and selections of a graph, done again on integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_symopt.infer.operations import COPIES, RESHAPES
from lit_symopt.trace import Node, Ref, Trace, Value


class CannotReplay(Exception):
    """The operation needs something that was not kept, such as the entries of a large index."""


def mover(node: Node, trace: Trace, output: int = 0) -> Callable[[Tensor], Tensor]:
    """What a view does to a label of its first argument, to make a label of one of its outputs.

    Raises:
        CannotReplay: (when called) if an index was not kept or the operation refuses the label.
    """
    source, target = _value(node.args[0], trace), trace.values[node.outputs[output]]
    if node.op in COPIES:
        return lambda label: label
    if node.op in RESHAPES:
        return lambda label: label.reshape(target.shape)
    if node.op == "constant_pad_nd":
        return lambda label: torch.constant_pad_nd(label, node.args[1], -1)
    if node.op == "as_strided":
        return lambda label: reread(source, [(source, label)], target)

    others = [_data(argument, trace) for argument in node.args[1:]]
    keywords = {key: _data(argument, trace) for key, argument in node.kwargs.items()}

    def move(label: Tensor) -> Tensor:
        try:
            moved = node.call(label, *others, **keywords)
        except (RuntimeError, TypeError, IndexError) as error:
            raise CannotReplay(str(error)) from error
        chosen: Tensor = moved[output] if isinstance(moved, (tuple, list)) else moved
        return chosen

    return move


def reread(base: Value, written: list[tuple[Value, Tensor | None]], target: Value) -> Tensor:
    """The label of memory after writes: each value's label is put in its place, and the target's place is read.

    Args:
        base: whose memory it is.
        written: values in this memory in the order of writing, with their labels (None: entries of another origin).
        target: what to read.
    """
    values = [base, target, *(value for value, _ in written)]
    size = 1 + max(
        value.offset + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride, strict=True))
        for value in values
    )
    memory = torch.full((max(size, 1),), -1, dtype=torch.int32)
    for value, label in written:
        place = memory.as_strided(value.shape, value.stride, value.offset)
        if label is None:
            place.fill_(-1)
        else:
            place.copy_(label)
    return memory.as_strided(target.shape, target.stride, target.offset).clone()


def _value(argument: Any, trace: Trace) -> Value:
    assert isinstance(argument, Ref)
    return trace.values[argument.index]


def _data(argument: Any, trace: Trace) -> Any:
    if isinstance(argument, Ref):
        data = trace.values[argument.index].data
        if data is None:
            raise CannotReplay(f"the entries of an index of shape {trace.values[argument.index].shape} were not kept")
        return data
    if isinstance(argument, (list, tuple)):
        return [_data(entry, trace) for entry in argument]
    return argument
