"""What a step that a CUDA graph captures must not do, seen on a CPU: let the host wait for the device.

    with NoSynchronization():
        optimizer.step()        # raises at the operation that would wait

On a CPU the results of all operations are there at once, so nothing waits; but the operations that would are the same.

And what a graph does with a step, on a CPU: `Recording` repeats its operations, on the same memory and without Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

READ_BY_THE_HOST = {
    aten._local_scalar_dense,  # item(), tolist(), bool(), float(), and a 0-dimensional tensor in the place of a number
    aten.is_nonzero,
    aten.equal,
    aten.allclose,
    aten._assert_async,  # not a wait, but an error that comes from the device kills its context
}
"""Give the host what was computed, or let it decide."""

OF_A_SIZE_THAT_DEPENDS_ON_DATA = {
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.repeat_interleave,
    aten.bincount,
    aten.histc,
}
"""The host must know the size of their results."""

DECOMPOSED_ON_THE_HOST = {
    aten.linalg_eigh,
    aten._linalg_eigh,
    aten._linalg_svd,
    aten.linalg_svd,
    aten.linalg_inv_ex,
    aten._linalg_check_errors,
    aten.linalg_cholesky,
}
"""Look at the error code of a solver, or run on the host."""

REFUSED = READ_BY_THE_HOST | OF_A_SIZE_THAT_DEPENDS_ON_DATA | DECOMPOSED_ON_THE_HOST

COPIES = {aten.copy_, aten._to_copy}


READ_DIRECTLY = (Tensor.tolist, Tensor.numpy, Tensor.cpu)
"""Reach memory without an operation on a CPU."""


class Synchronizes(AssertionError):
    """An operation would let the host wait."""


class NoSynchronization(TorchDispatchMode):
    """Raises `Synchronizes` at every operation that would let the host wait for the device.

    Args:
        host: tensors that are on the host on purpose, such as AdamW's counters of steps; to read them is no wait.
        record: collect what would wait in `found` instead of raising.
    """

    def __init__(self, *, host: Iterable[Tensor] = (), record: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._host = {tensor.untyped_storage().data_ptr() for tensor in host}
        self._record = record
        self._direct = _DirectReads(self)
        self.found: list[str] = []

    def __enter__(self) -> NoSynchronization:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._direct.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._direct.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def report(self, what: str, problem: str) -> None:
        """Raise, or note."""
        if not self._record:
            raise Synchronizes(f"{what} lets the host wait for the device: {problem}")
        self.found.append(f"{what}: {problem}")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        problem = self._problem(func, args, kwargs)
        if problem is not None:
            self.report(str(func), problem)
        return func(*args, **kwargs)

    def _problem(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        packet = func.overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if packet in REFUSED and not self.all_on_the_host(tensors):
            return "it gives the host what the device has computed"
        if packet in COPIES and not kwargs.get("non_blocking", len(args) > 2 and args[2]):
            devices = {tensor.device.type for tensor in tensors}
            device = kwargs.get("device")
            devices |= {torch.device(device).type} if device is not None else set()
            if len(devices) > 1:
                return f"it copies between {' and '.join(sorted(devices))} and waits for it"
        if packet in (aten.index, aten.index_put_, aten.index_put) and any(
            isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1])
        ):
            return "an index of booleans has a size that depends on data"
        return None

    def all_on_the_host(self, tensors: list[Tensor]) -> bool:
        return bool(tensors) and all(tensor.untyped_storage().data_ptr() in self._host for tensor in tensors)


class _DirectReads(TorchFunctionMode):
    def __init__(self, mode: NoSynchronization) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in READ_DIRECTLY and args[0].ndim and not self._mode.all_on_the_host(list(args[:1])):
            self._mode.report(func.__name__, "it reads what the device has computed")
        return func(*args, **(kwargs or {}))


def synchronizations(function: Callable[[], object], *, host: Iterable[Tensor] = ()) -> list[str]:
    """The operations of a call that would let the host wait, in order."""
    with NoSynchronization(host=host, record=True) as mode:
        function()
    return mode.found


class Recording(TorchDispatchMode):
    """The operations of what is run inside, as a CUDA graph captures them; numbers that Python made are constants."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, Any, list[Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # A copy of all lists in them: whoever called may change his own.
        given = tree_map(lambda leaf: leaf, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, given, tree_leaves(result)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """All operations once more, with what is now in the tensors that they read, into those that they wrote."""
        for func, (args, kwargs), results in self._calls:
            read = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
            for old, new in zip(results, tree_leaves(func(*args, **kwargs)), strict=True):
                if _is_tensor(new) and new.untyped_storage().data_ptr() not in read:  # it is no view
                    old.copy_(new)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)
