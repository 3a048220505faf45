"""Triton, imported when a kernel is first asked for.

The functions that become kernels are ordinary functions at the top of their modules, in which `tl` has no meaning until
`kernels` has bound it and has handed them to `triton.jit`. So a module with kernels can be imported where Triton is not
installed, and importing one does not settle for the process whether Triton compiles or interprets: that is settled when
Triton itself is imported, by `TRITON_INTERPRET`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from lit_symopt.errors import ConfigError

SAME = {"enable_fp_fusion": True}
"""Of every launch: a·b + c is rounded once. Versions of Triton differ in what they do unasked."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One way to launch a kernel.

    Attributes:
        blocks: compile-time constants.
        warps: of 32 threads, in a program.
        stages: loads in flight of a loop.
    """

    blocks: Mapping[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3


@cache
def require(device_type: str) -> None:
    """Make sure that kernels run on devices of this type; imports Triton.

    Raises:
        ConfigError: without Triton, and on devices other than CUDA ones: a CPU is one under the interpreter alone.

    Example:
        >>> require("mps")
        Traceback (most recent call last):
        lit_symopt.errors.ConfigError: Triton kernels run on CUDA devices, not on 'mps'; choose backend 'eager'
    """
    if device_type not in ("cuda", "cpu"):
        raise ConfigError(f"Triton kernels run on CUDA devices, not on {device_type!r}; choose backend 'eager'")
    if find_spec("triton") is None:
        raise ConfigError(
            'a Triton kernel was asked for, and Triton is not installed: pip install "lit-symopt[triton]", or choose '
            "backend 'eager'"
        )
    if device_type == "cpu" and not interpreted():
        raise ConfigError(
            "Triton kernels run on CUDA devices, and the tensors are on 'cpu'; choose backend 'eager', or, to check "
            "the kernels, set TRITON_INTERPRET=1 before Triton is imported: they then run there, slowly"
        )


def interpreted() -> bool:
    """Whether this process interprets kernels on the host instead of compiling them; imports Triton.

    Raises:
        ConfigError: if `TRITON_INTERPRET` has changed since, because Triton's own functions are of one kind only.
    """
    import triton.language
    from triton.runtime.interpreter import InterpretedFunction

    library = isinstance(triton.language.sigmoid, InterpretedFunction)
    if library != bool(triton.knobs.runtime.interpret):
        raise ConfigError(
            f"TRITON_INTERPRET was {'' if library else 'not '}set when Triton was imported and is "
            f"{'not ' if library else ''}set now; set it before the process starts, or not at all"
        )
    return library


def kernels(namespace: dict[str, Any], *names: str) -> list[Any]:
    """Turn functions of a module into kernels, in place, so that they can call each other.

    Args:
        namespace: `globals()` of the module; gets `tl`.
        names: of the functions, each after those that it calls.
    """
    import triton
    import triton.language

    namespace["tl"] = triton.language
    for name in names:
        namespace[name] = triton.jit(namespace[name])
    return [namespace[name] for name in names]


def tuned(kernel: Any, tunings: Sequence[Tuning], *, key: Sequence[str], when_interpreted: Tuning) -> Any:
    """A kernel that is timed with every tuning when it first meets a key, and then keeps to the fastest.

    The first call with a key synchronizes, so that it cannot be one that a CUDA graph captures. Only for kernels that
    read nothing that they write.

    Args:
        kernel: of `kernels`.
        tunings: one is enough.
        key: arguments that decide which tuning is the fastest; their dtypes count too.
        when_interpreted: the one that the interpreter takes: small blocks, so that small matrices have several.
    """
    import triton

    chosen = [when_interpreted] if interpreted() else tunings
    configs = [triton.Config(dict(one.blocks), num_warps=one.warps, num_stages=one.stages) for one in chosen]
    return triton.autotune(configs=configs, key=list(key))(kernel)


def bucket(size: int) -> int:
    """The power of two at or above `size`: sizes that share it share a tuning.

    >>> bucket(1), bucket(600)
    (1, 1024)
    """
    return 1 << max(0, size - 1).bit_length()


def refuse_unless(holds: bool, kernel: str, problem: str) -> None:
    """Raise `ConfigError` with the way out unless something holds."""
    if not holds:
        raise ConfigError(f"kernel {kernel}: {problem}; or choose backend 'eager'")


def names_of(dtypes: Sequence[torch.dtype]) -> str:
    """Dtypes for a message.

    >>> names_of([torch.float32, torch.bfloat16])
    'float32, bfloat16'
    """
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
