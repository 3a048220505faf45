"""Which code computes a step: what can be chosen, what each choice needs, and which part of a step it takes over.

| `backend` | polar factors in bfloat16 | a step of `row_norm` | needs |
|---|---|---|---|
| `auto` | as `eager` | as `eager` | |
| `eager` | torch's operations | torch's operations | |
| `cpp` | kernels in C++, of spectral rules the whole step | the same | a compiler; polar factors: AVX-512 BF16 |
| `compile` | the whole as one compiled graph | the whole as one, on a CPU two | a C++ compiler, or Triton on CUDA |
| `triton` | `symmetric_product` and the like for the products | the kernel `row_rule` | Triton on CUDA |
| `gram-newton-schulz` | the package of that name, in float16 | as `eager` | the package; Hopper or newer on CUDA |

Everything else is computed as `eager` does it, whatever the backend: polar factors in other precisions (they are
decompositions, or products in float64), the other rules, and AdamW, which is torch's own. A backend that finds nothing
to do in a group is no error, so that one can be chosen for a whole model; `SymOpt.explain` says what it does. A backend
that cannot run is an error where it is chosen: nothing falls back to another one.

`auto` is `eager` everywhere: it needs nothing else, so that a run gives the same bits on machines with a compiler and
without one. On a CPU (2 cores) `cpp` is faster: a step of Muon in bfloat16 takes 0.5 to 0.6 times as long, one of
`row_norm` on 50,304 x 512 0.6 to 0.7 times (`profiles/records/bench`). It computes polar factors where the CPU has
AVX-512 BF16 and no AMX; elsewhere they stay eager, and row norms are its own. `compile` takes 0.9 to 1.2 times as long
for polar factors and 1.0 to 1.2 times for a step of `row_norm`, three times if it is centered; the package takes 40
times and more, because products in float16 are slow there. On CUDA the other backends have not been measured yet.

Where rows of a matrix lie on several processes, its step is that of `eager`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from shutil import which
from typing import Any, Literal, get_args

import torch

from lit_symopt.errors import ConfigError
from lit_symopt.linalg.execution import Backend

Part = Literal["polar", "row_step", "spectral_step"]
"""What a backend takes over: polar factors in bfloat16, or a whole step of `row_norm` or of a spectral rule."""

BACKENDS: tuple[str, ...] = get_args(Backend)
INSTALL = "pip install gram-newton-schulz --no-build-isolation"
"""Gets the package `gram-newton-schulz`; with build isolation pip would fetch a torch without CUDA first."""

SPECTRAL = frozenset({"spectral", "right_spectral", "left_spectral"})
POLAR_RULES = SPECTRAL | {"row_then_spectral", "spectral_then_row"}
NUCLEAR = frozenset({"nuclear", "row_nuclear"})
"""Scales that are measured on the update."""
ANALYTIC_SCALES = frozenset({"none", "rms", "row_rms"})
"""Those after a row norm that are known before the update is."""

TAKES: Mapping[str, tuple[Part, ...]] = {
    "eager": (),
    "cpp": ("polar", "row_step", "spectral_step"),
    "compile": ("polar", "row_step"),
    "triton": ("polar", "row_step"),
    "gram-newton-schulz": ("polar",),
}


def chosen(backend: Backend) -> Backend:
    """What `auto` stands for; any other backend is itself.

    >>> chosen("auto"), chosen("triton")
    ('eager', 'triton')
    """
    return "eager" if backend == "auto" else backend


def check_backend(backend: str, where: str = "") -> None:
    """Refuse an unknown backend.

    Args:
        backend: what was asked for.
        where: in front of the message, such as `"group 'linear': "`.

    Raises:
        ConfigError: naming the known ones.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"{where}unknown backend {backend!r}; known: {', '.join(BACKENDS)}")


def check_scratch(scratch: float | None, where: str = "") -> None:
    """Refuse a bound of the borrowed memory, in MiB, that is not a positive number; `None` is no bound.

    Raises:
        ConfigError: saying so.
    """
    if scratch is not None and not float("inf") > float(scratch) > 0.0:
        raise ConfigError(f"{where}scratch={scratch} must be a positive number of MiB, such as 256")


def require_backend(backend: str, device: torch.device | str, where: str = "") -> None:
    """Make sure that a backend runs on a device. The meta device, on which nothing runs, takes every one.

    Args:
        backend: what was asked for.
        device: of the parameters.
        where: in front of a message.

    Raises:
        ConfigError: for an unknown backend, and for one that cannot run there, with what would help.

    >>> require_backend("eager", "cpu")
    """
    check_backend(backend, where)
    device = torch.device(device)
    if device.type == "meta":
        return
    try:
        if backend == "triton":
            from lit_symopt.linalg.kernels.load import require

            require(device.type)
        elif backend == "cpp":
            _require_cpp(device)
        elif backend == "compile":
            _require_compiler(device)
        elif backend == "gram-newton-schulz":
            _require_package(device)
    except ConfigError as error:
        raise ConfigError(f"{where}backend={backend!r}: {error}") from None


def takes(
    backend: Backend, options: Mapping[str, Any], *, dtype: torch.dtype, device_type: str, longest_row: int = 1
) -> Part | None:
    """The part of a step that a backend takes over from `eager` in a group; `None` for nothing.

    Args:
        backend: of the group.
        options: `rule`, `precision`, `scale`, `centered` and `eps`, as in the group.
        dtype: of the momentum and of the arithmetic, so float32 for parameters in half precision.
        device_type: where the parameters are.
        longest_row: numbers in a row of the matrices.

    >>> options = {"rule": "spectral", "precision": "auto", "scale": "rms", "centered": False, "eps": 1e-8}
    >>> takes("triton", options, dtype=torch.float32, device_type="cuda")
    'polar'
    >>> takes("triton", options, dtype=torch.float32, device_type="cpu")  # `auto` is not bfloat16 there
    """
    if options["rule"] in POLAR_RULES:
        able = _in_bfloat16(options["precision"], dtype, device_type) and (backend != "cpp" or _multiplies_bfloat16())
        whole = options["rule"] in SPECTRAL and not options["centered"] and options["scale"] not in NUCLEAR
        whole = whole and dtype == torch.float32 and "spectral_step" in TAKES[chosen(backend)]
        part: Part = "spectral_step" if whole else "polar"
    elif options["rule"] == "row_norm":
        # `exact` and `fp32` promise intermediates in float64.
        part = "row_step"
        able = dtype == torch.float32 and options["precision"] not in ("exact", "fp32")
        # The norm of a row is at least its largest entry, of which ε is a share: below 1 only zero rows see it.
        able = able and options["scale"] in ANALYTIC_SCALES and options["eps"] <= 1.0
        able = able and not (chosen(backend) == "triton" and longest_row > 1 << 16)
    else:
        return None
    return part if able and part in TAKES[chosen(backend)] else None


def _in_bfloat16(precision: str, dtype: torch.dtype, device_type: str) -> bool:
    from lit_symopt.linalg.polar import method_for

    return method_for(precision, dtype=dtype, device_type=device_type, side=1) == "bf16"  # type: ignore[arg-type]


def _multiplies_bfloat16() -> bool:
    from lit_symopt.cpp.polar import supported

    return supported()


def _require_cpp(device: torch.device) -> None:
    if device.type != "cpu":
        raise ConfigError(f"kernels in C++ run on a CPU, not on {device.type!r}; choose backend 'eager'")
    from lit_symopt.cpp.build import library

    for name in ("row_step", "polar"):  # so that a compiler that fails does so before the first step
        library(name)


def _require_compiler(device: torch.device) -> None:
    if device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if which(compiler) is None:
            raise ConfigError(
                f"torch.compile needs a C++ compiler on a CPU, and there is no {compiler!r}: install g++, or name "
                "another one in the environment variable CXX; or choose backend 'eager'"
            )
    elif device.type == "cuda":
        if find_spec("triton") is None:
            raise ConfigError(
                'torch.compile needs Triton on CUDA, and it is not installed: pip install "lit-symopt[triton]", or '
                "choose backend 'eager'"
            )
    else:
        raise ConfigError(f"it runs on CPU and CUDA, not on {device.type!r}; choose backend 'eager'")


def _require_package(device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"it runs on CPU and CUDA, not on {device.type!r}; choose backend 'eager'")
    missing = [name for name in ("gram_newton_schulz", *(["quack"] * (device.type == "cuda"))) if not find_spec(name)]
    if missing:
        raise ConfigError(f"{missing[0]} is not installed; get it with: {INSTALL}; or choose backend 'eager'")
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < (9, 0):
        raise ConfigError(
            f"its kernels need a Hopper GPU or a newer one (compute capability 9.0), and this one, "
            f"{torch.cuda.get_device_name(device)!r}, has {found[0]}.{found[1]}; "
            "choose backend 'triton' or 'eager'"
        )
