"""Steps in CUDA graphs: the option `capturable`, which makes tensors of the rates.

A graph replays what the device did in one step, with the same memory and without Python. So whatever changes from step
to step must be read from the device (learning rate and weight decay are 0-dimensional float32 tensors there), nothing
may wait for the device, and what is found out there, such as a gradient that is not finite, waits until it is asked
for. Gradients must be at the same addresses at every replay: capture the backward pass too, or keep the gradients and
zero them in place.

    optimizer = SymOpt.for_module(model, config=SymOptConfig(capturable=True))
    ...                                          # at least one step, on a side stream, as for any capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for batch in data:
        ...                                      # new gradients in the same tensors
        optimizer.param_groups[0]["lr"].fill_(1e-3)      # or a scheduler of torch, which does the same
        graph.replay()
    optimizer.check()                            # raises if a replayed step met a gradient that was not finite

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_symopt.blocks import shape_of
from lit_symopt.errors import ConfigError
from lit_symopt.layout import Layout
from lit_symopt.linalg.polar import method_for
from lit_symopt.rules.rows import POLAR

RATES = ("lr", "weight_decay")
"""Options of a group that are tensors on the device if it is capturable."""

WAITING = {"svd": "a singular value decomposition", "eigh": "an eigenvalue decomposition"}
"""Methods of polar factors that let the host wait for the device."""

_HALF = (torch.bfloat16, torch.float16)


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def require_capturable(group: Mapping[str, Any], layouts: Mapping[Tensor, Layout]) -> None:
    """Refuse what a graph cannot hold. A CPU is taken for a GPU, so that what runs here can be captured there.

    Args:
        group: of the optimizer, with `capturable` set.
        layouts: of its parameters.

    Raises:
        ConfigError: naming the group, the option and what to choose.
    """
    where = f"group {group['name']!r}: capturable=True"
    device_of(group)
    if group["backend"] == "gram-newton-schulz":
        raise ConfigError(f"{where}: backend 'gram-newton-schulz' cannot be captured; choose 'eager' or 'triton'")
    if group["rule"] not in POLAR:
        return
    for parameter, layout in layouts.items():
        dtype = torch.float32 if parameter.dtype in _HALF else parameter.dtype
        for part in layout.parts(shape_of(parameter)):
            method = method_for(group["precision"], dtype=dtype, device_type="cuda", side=min(part.m, part.n))
            if method in WAITING:
                raise ConfigError(
                    f"{where}: polar factors of {part.m} × {part.n} matrices in precision {group['precision']!r} and "
                    f"{dtype} take {WAITING[method]}, which waits for the device and cannot be captured; choose "
                    "precision 'bf16' or 'auto'" + (" and float32 parameters" if dtype == torch.float64 else "")
                )


def device_of(group: Mapping[str, Any]) -> torch.device:
    """The one device of the parameters of a capturable group.

    Raises:
        ConfigError: for several, for the meta device, and for one without CUDA graphs.
    """
    devices: list[torch.device] = list(dict.fromkeys(parameter.device for parameter in group["params"]))
    where = f"group {group['name']!r}: capturable=True"
    if len(devices) > 1:
        raise ConfigError(
            f"{where} keeps one rate for all parameters on their device, and they are on "
            f"{' and '.join(map(str, devices))}; make a group for each device"
        )
    device = devices[0] if devices else torch.device("cpu")
    if device.type == "meta":
        raise ConfigError(f"{where} keeps rates beside the parameters; build the optimizer once these have memory")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{where} is for CUDA graphs, and the parameters are on {device.type!r}; leave it out")
    return device


def rates_to_device(group: dict[str, Any]) -> None:
    """Make tensors of the rates of a capturable group; those that are already, where they should be, stay the same."""
    device = device_of(group)
    for key in RATES:
        rate = torch.as_tensor(group[key], dtype=torch.float32, device=device)
        group[key] = rate if rate.ndim == 0 else rate.reshape(())


def rates_to_numbers(group: dict[str, Any]) -> None:
    """Make numbers of the rates of a group that is to be saved."""
    for key in (*RATES, "initial_lr"):
        if isinstance(group.get(key), Tensor):
            group[key] = shortest(group[key])


def shortest(rate: Tensor) -> float:
    """The number of a 0-dimensional float32 tensor, with the fewest digits that round to it.

    >>> shortest(torch.tensor(0.01)), torch.tensor(0.01).item()
    (0.01, 0.009999999776482582)
    """
    return float(str(np.float32(rate.item())))


def refuse_to_capture(group: Mapping[str, Any], *, ready: bool) -> None:
    """Say why a step of a group that a graph captures would not be the same when it is replayed.

    Args:
        group: of the optimizer.
        ready: whether the same step has been taken before.

    Raises:
        ConfigError: if it is not capturable, or not ready.
    """
    if not group["capturable"]:
        raise ConfigError(
            f"group {group['name']!r}: a CUDA graph captures this step, in which the rates would stay what they are; "
            "build the optimizer with capturable=True"
        )
    if not ready:
        raise ConfigError(
            "a CUDA graph captures this step before one like it was taken, and would make the state anew at every "
            "replay; take a step with the same gradients, devices and dtypes first"
        )
