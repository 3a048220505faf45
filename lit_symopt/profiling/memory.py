"""What one process holds in memory, and what a step of the optimizer takes besides."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_symopt.member import local_part
from lit_symopt.profiling.events import ANNOTATION, MEMORY, Trace
from lit_symopt.profiling.run import MemoryUse
from lit_symopt.ranges import ALL, STEP

MASTER = "master"
"""The entry of `SymOpt`'s state that is no state: the fp32 copy of a parameter in half precision."""

_CUDA = 1  # the profiler's number for the kind of device


def memory_use(
    optimizer: torch.optim.Optimizer, module: nn.Module, *, rank: int, scratch: int | None = None
) -> MemoryUse:
    """What this process holds for a module and its optimizer, and the most it had at any time so far.

    Counted are the bytes of storage behind the tensors, each once and in this order: parameters, gradients, masters,
    state. Of distributed tensors it is the local part, with padding. What a strategy has put in the place of the
    parameters (DeepSpeed's fp32 partitions) counts as masters; its own buffers, such as those in which it collects
    gradients, are seen in `peak` only.

    Call it between backward and the next `zero_grad`, else there are no gradients; and before `measure_ceilings`, whose
    buffers would be in the peak.

    Args:
        optimizer: any; state is told apart by the `role` of its groups, and is all in role `all` without one.
        module: that the optimizer updates.
        rank: of this process.
        scratch: as of `scratch_bytes`; what a `SymOpt` keeps to be borrowed by its steps is added.

    Example:
        >>> linear = nn.Linear(4, 3, bias=False)
        >>> memory_use(torch.optim.AdamW(linear.parameters()), linear, rank=0).parameters
        48
    """
    parameters = list(module.parameters())
    roles = _roles(optimizer)
    known = {id(parameter) for parameter in parameters}
    states = {id(tensor): state for tensor, state in optimizer.state.items()}
    tensors = [tensor for tensor, _ in roles.values()]
    tensors += [tensor for tensor in optimizer.state if id(tensor) not in roles]
    count = _Counter()
    held = count(part for parameter in parameters for part in (parameter, getattr(parameter, "ds_tensor", None)))
    gradients = count(tensor.grad for tensor in [*parameters, *tensors])
    masters = count(tensor for tensor in tensors if id(tensor) not in known)
    masters += count(states.get(id(tensor), {}).get(MASTER) for tensor in tensors)
    state: dict[str, int] = {}
    for tensor in tensors:
        role = roles[id(tensor)][1] if id(tensor) in roles else ALL
        state[role] = state.get(role, 0) + count(states.get(id(tensor), {}).values())
    device = next((tensor.device for tensor in [*parameters, *tensors]), torch.device("cpu"))
    if scratch is not None and hasattr(optimizer, "kept_scratch"):
        scratch += optimizer.kept_scratch(device)
    return MemoryUse(
        rank=rank,
        parameters=held,
        gradients=gradients,
        masters=masters,
        state=state,
        scratch=scratch,
        peak=peak_bytes(device),
    )


def peak_bytes(device: torch.device) -> int | None:
    """The most this process has had so far: of torch's allocator on a GPU, of resident memory on a CPU.

    The latter is that of the whole process, Python and libraries included. `None` on Windows, which does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # kilobytes elsewhere


def scratch_bytes(trace: Trace) -> int | None:
    """The most that a step of the optimizer had allocated at once, over what there was when it began.

    The largest of all steps in the trace (`symopt/step`). A GPU's memory if any was allocated on one, else the host's.
    In the first step of a run this includes the state, which is made there.

    Args:
        trace: recorded with `profile_memory=True`.

    Returns:
        Bytes; `None` if there is no step of the optimizer in it, or no allocation.
    """
    steps = [
        (event.start_us, event.end_us) for event in trace.events if event.category == ANNOTATION and event.name == STEP
    ]
    changes = [
        (event.start_us, int(event.args.get("Bytes", 0)), int(event.args.get("Device Type", 0)))
        for event in trace.events
        if event.name == MEMORY
    ]
    return most_at_once(changes, steps)


def most_at_once(changes: Iterable[tuple[float, int, int]], steps: Iterable[tuple[float, float]]) -> int | None:
    """The highest running sum of changes within a step, the largest over the steps.

    Args:
        changes: time, bytes (negative for a release) and kind of device (0 host, 1 CUDA), in any order.
        steps: start and end in the same time.

    Returns:
        Bytes; `None` without changes or steps.

    Example:
        >>> most_at_once([(0, 50, 0), (1, 8, 0), (2, -8, 0), (3, 4, 0), (4, 6, 0), (9, 99, 0)], [(1, 5)])
        10
    """
    changes = sorted(changes, key=lambda change: change[0])
    kind = max((device for _, _, device in changes if device == _CUDA), default=0)
    moments = [(at, size) for at, size, device in changes if device == kind]
    most: int | None = None
    for start, end in steps if moments else ():
        # The profiler's own total counts from where it was started, and on a CPU releases of older memory too.
        level = highest = 0
        for at, size in moments:
            if start <= at <= end:
                level += size
                highest = max(highest, level)
        most = highest if most is None else max(most, highest)
    return most


class _Counter:
    """Bytes of storages that were not counted before."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, int]] = set()

    def __call__(self, values: Iterable[Any]) -> int:
        total = 0
        for value in values:
            if not isinstance(value, Tensor):
                continue
            local = local_part(value)
            if local.is_meta:
                continue
            storage = local.untyped_storage()
            place = (str(local.device), storage.data_ptr())
            if storage.nbytes() and place not in self._seen:
                self._seen.add(place)
                total += storage.nbytes()
        return total


def _roles(optimizer: torch.optim.Optimizer) -> dict[int, tuple[Tensor, str]]:
    """Every tensor that the optimizer updates, with its role."""
    found = {id(tensor): (tensor, _role(group)) for group in optimizer.param_groups for tensor in group["params"]}
    distribution = getattr(optimizer, "distribution", None)
    if distribution is not None:  # DeepSpeed's stage 3 fills its groups only while it steps
        roles = {name: _role(group) for group in optimizer.param_groups for name in group["param_names"]}
        for holding in distribution.holdings:
            role = next((roles[placement.name] for placement in holding.placements if placement.name in roles), ALL)
            found[id(holding.tensor)] = (holding.tensor, role)
    return found


def _role(group: Mapping[str, Any]) -> str:
    return str(group.get("role") or ALL)
