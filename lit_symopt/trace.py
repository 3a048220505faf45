"""One pass of a module as a graph: every tensor operation, with what it read and what it wrote.

A tensor is recognized by its place in memory, so that views, copies and writes in place are all followed. Only shapes
and the small integer tensors that index others are kept: activations are freed as in any pass without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["WRITE", "Node", "Ref", "Trace", "Value", "record"]

# Integer tensors up to this size are kept where they index another tensor: which rows they take is part of the graph.
KEPT_INDICES = 1 << 22
_INDEXING = ("index", "index_select", "gather", "index_put", "take", "take_along_dim")

# The operation of a node that reads a tensor after others wrote to its memory.
WRITE = "write"

_Geometry = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Ref:
    """In the arguments of a node: the tensor with this index in `Trace.values`."""

    index: int


@dataclass
class Value:
    """One version of one tensor.

    Attributes:
        origin: `parameter`, `buffer`, `batch`, `constant` for a tensor that no operation of the pass made, else `op`.
        name: of the parameter or buffer, or the path in the batch.
        data: the entries of a small integer tensor that indexed another one.
    """

    index: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    origin: str
    name: str = ""
    data: Tensor | None = None


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        op: name without namespace, overload and the mark of writing in place: `add` for `aten::add_.Tensor`.
        call: the operation itself; None for `WRITE`.
        args, kwargs: as it was called, with a `Ref` in place of every tensor.
        outputs: the tensors it made, flat.
    """

    op: str
    call: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]

    def refs(self) -> Iterator[Ref]:
        """Every tensor it read."""
        yield from _refs((self.args, self.kwargs))


@dataclass
class Trace:
    """The graph: nodes in the order they ran.

    Attributes:
        outputs: what the pass returned, path to tensor: `{"logits": 12}`; a lone tensor has the path `""`.
    """

    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outputs: dict[str, int] = field(default_factory=dict)


def record(run: Callable[[], object], module: nn.Module, batch: object) -> Trace:
    """Run once, without gradients, and record every operation.

    Args:
        run: calls the module on the batch.
        module: whose parameters and buffers are recognized by name.
        batch: whose tensors are recognized by their path.

    Example:
        >>> layer, x = nn.Linear(3, 2), torch.ones(1, 3)
        >>> [node.op for node in record(lambda: layer(x), layer, x).nodes]
        ['t', 'addmm']
    """
    recorder = _Recorder()
    for name, parameter in module.named_parameters():
        recorder.leaf(parameter, "parameter", name)
    for name, buffer in module.named_buffers():
        recorder.leaf(buffer, "buffer", name)
    for path, tensor in _tensors(batch):
        recorder.leaf(tensor, "batch", path)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation in place of a whole encoder layer
    try:
        with torch.no_grad(), recorder:
            result = run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    recorder.trace.outputs = {path: recorder.find(tensor) for path, tensor in _tensors(result)}
    return recorder.trace


@dataclass
class _Memory:
    """What is known of one storage. The weak reference keeps its address from being used again, not its bytes."""

    alive: StorageWeakRef
    first: int
    known: dict[_Geometry, tuple[int, int]] = field(default_factory=dict)  # value and time
    writes: list[tuple[int, int]] = field(default_factory=list)  # time and value


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self._memory: dict[int, _Memory] = {}
        self._odd: dict[int, tuple[Tensor, int]] = {}  # tensors without ordinary memory, kept alive
        self._time = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = func._schema.name.split("::")[-1]
        op = op[:-1] if op.endswith("_") and not op.endswith("__") else op
        recorded_args, recorded_kwargs = self._recorded(args, op), self._recorded(kwargs, op)
        written = [
            kwargs[argument.name] if argument.name in kwargs else args[position]
            for position, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None
            and argument.alias_info.is_write
            and (argument.name in kwargs or position < len(args))
        ]
        result = func(*args, **kwargs)
        self._time += 1
        outputs = [self._wrote(tensor) for target in written for tensor in _flat(target)]
        if not written:
            outputs = [self._made(tensor) for tensor in _flat(result)]
        self.trace.nodes.append(Node(op, func, tuple(recorded_args), recorded_kwargs, tuple(outputs)))
        return result

    def leaf(self, tensor: Tensor, origin: str, name: str) -> int:
        """A tensor that was there before."""
        value = self._value(tensor, origin, name)
        if _is_odd(tensor):
            self._odd[id(tensor)] = (tensor, value)
        else:
            self._memory_of(tensor, value).known[_geometry(tensor)] = (value, self._time)
        return value

    def find(self, tensor: Tensor) -> int:
        """The index of a tensor as it is now."""
        if _is_odd(tensor):
            known = self._odd.get(id(tensor))
            return self.leaf(tensor, "constant", "") if known is None else known[1]
        memory = self._memory.get(tensor.untyped_storage()._cdata)
        if memory is None:
            return self.leaf(tensor, "constant", "")
        geometry = _geometry(tensor)
        base, since = memory.known.get(geometry, (memory.first, -1))
        later = [value for time, value in memory.writes if time > since and value != base]
        if geometry in memory.known and not later:
            return base
        read = self._value(tensor, "op", "")
        self.trace.nodes.append(Node(WRITE, None, (Ref(base), *map(Ref, later)), {}, (read,)))
        memory.known[geometry] = (read, self._time)
        return read

    def _made(self, tensor: Tensor) -> int:
        value = self._value(tensor, "op", "")
        if _is_odd(tensor):
            self._odd[id(tensor)] = (tensor, value)
        else:
            self._memory_of(tensor, value).known[_geometry(tensor)] = (value, self._time)
        return value

    def _wrote(self, tensor: Tensor) -> int:
        value = self._made(tensor)
        if not _is_odd(tensor):
            self._memory_of(tensor, value).writes.append((self._time, value))
        return value

    def _memory_of(self, tensor: Tensor, value: int) -> _Memory:
        storage = tensor.untyped_storage()
        return self._memory.setdefault(storage._cdata, _Memory(StorageWeakRef(storage), value))

    def _value(self, tensor: Tensor, origin: str, name: str) -> int:
        offset, shape, stride, dtype = (
            (0, tuple(tensor.shape), (), tensor.dtype) if _is_odd(tensor) else _geometry(tensor)
        )
        index = len(self.trace.values)
        self.trace.values.append(Value(index, shape, stride, offset, dtype, origin, name))
        return index

    def _recorded(self, item: Any, op: str) -> Any:
        if isinstance(item, Tensor):
            index = self.find(item)
            value = self.trace.values[index]
            whole = not (item.is_floating_point() or item.is_complex())
            if value.data is None and whole and op in _INDEXING and item.numel() <= KEPT_INDICES:
                value.data = item.detach().clone().cpu()
            return Ref(index)
        if isinstance(item, Mapping):
            return {key: self._recorded(entry, op) for key, entry in item.items()}
        if isinstance(item, (tuple, list)):
            return [self._recorded(entry, op) for entry in item]
        return item


def _geometry(tensor: Tensor) -> _Geometry:
    return int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _is_odd(tensor: Tensor) -> bool:
    return tensor.layout is not torch.strided or tensor.is_nested or tensor.is_mkldnn


def _refs(item: Any) -> Iterator[Ref]:
    if isinstance(item, Ref):
        yield item
    elif isinstance(item, (tuple, list)):
        for entry in item:
            yield from _refs(entry)
    elif isinstance(item, dict):
        for entry in item.values():
            yield from _refs(entry)


def _flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [tensor for entry in result for tensor in _flat(entry)]
    return []


def _tensors(item: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested mappings and sequences, with their paths."""
    if isinstance(item, Tensor):
        yield path, item
    elif isinstance(item, Mapping):
        for key, entry in item.items():
            yield from _tensors(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(item, (tuple, list)):
        for position, entry in enumerate(item):
            yield from _tensors(entry, f"{path}.{position}" if path else str(position))
