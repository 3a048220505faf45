"""Named ranges inside `SymOpt.step`: what a profiler sees of roles, rules and phases.

    symopt/step                          one call of `step()`, without the closure
    symopt/<roles>/<rule>/<phase>        a phase of a batch of equal blocks; `query+key` where a batch holds two roles

| phase | what happens |
|---|---|
| `momentum` | state ← gradient; casts of gradients, masters of half precision |
| `pack` | copies between parameters and the batch that a rule is applied to |
| `rule` | the rule: polar factors, row norms, centering; all of AdamW |
| `scale` | the scale of the step |
| `write` | decay, the step itself, masters to parameters |
| `communication` | collectives, and waiting for them |
| `check` | whether the gradients are finite; undoing a step that they forbid |
| `prepare` | what the host does besides: finding gradients, forming batches |

Ranges nest: `prepare` of a batch holds its other phases, and `rule` its communication; the innermost one counts. What
belongs to no block in particular is `symopt/all/step/prepare` and `symopt/all/finite/check`.

A range carries as arguments the number of elements of each of its roles, in the order of the name, and the shape of
the batch; a profiler shows them with `record_shapes=True`.

Without a profiler a range costs a look at a flag. NVTX ranges, for Nsight, are asked for: `with nvtx_ranges(): ...`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lit_symopt.errors import ConfigError

Phase = Literal["momentum", "pack", "rule", "scale", "write", "communication", "check", "prepare"]

PREFIX = "symopt"
STEP = f"{PREFIX}/step"
JOIN = "+"
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a range is about.

    Attributes:
        rule: one rule.
        elements: number of elements by role; of the places to be updated, whatever a phase does with them.
        shape: of the batch.
    """

    rule: str
    elements: dict[str, int]
    shape: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """`<roles>/<rule>`, with what would end a part of the name replaced."""
        roles = (role.replace("/", "_").replace(JOIN, "_") for role in self.elements)
        return f"{JOIN.join(roles) or ALL}/{self.rule}"


EVERYTHING = Subject(rule="step", elements={ALL: 1})
FINITE = Subject(rule="finite", elements={ALL: 1})

_NOTHING: AbstractContextManager[None] = nullcontext()
_nvtx = 0  # how many contexts ask for it
# Private; but `torch.profiler.record_function` takes 5 μs when nobody listens, and asking first 0.03 μs.
_profiler_enabled: Callable[[], bool] = torch.autograd._profiler_enabled  # type: ignore[attr-defined]


def phase(of: Callable[..., Subject] | Subject, name: Phase, *arguments: object) -> AbstractContextManager[None]:
    """The range of a phase, to be entered with `with`; must not span the `yield` of a generator.

    Args:
        of: the subject, or what makes it of `arguments`; called only if somebody listens.
        name: of the phase.
    """
    if not (_nvtx or _profiler_enabled()):
        return _NOTHING
    subject = of if isinstance(of, Subject) else of(*arguments)
    return _Range(f"{PREFIX}/{subject.name}/{name}", subject)


def step() -> AbstractContextManager[None]:
    """The range of one call of `step()`."""
    return _Range(STEP) if _nvtx or _profiler_enabled() else _NOTHING


def named(name: str) -> AbstractContextManager[None]:
    """A range of any name, such as a stage of a training step."""
    return _Range(name) if _nvtx or _profiler_enabled() else _NOTHING


@contextmanager
def nvtx_ranges() -> Iterator[None]:
    """Emits the ranges as NVTX too, with or without a profiler of torch, as Nsight Systems shows them.

    Raises:
        ConfigError: if torch was built without CUDA.
    """
    global _nvtx  # noqa: PLW0603
    if not torch.cuda.is_available():
        raise ConfigError(
            "NVTX ranges need a CUDA device, and torch sees none here; leave nvtx out, the profiler of torch shows the "
            "same ranges"
        )
    _nvtx += 1
    try:
        yield
    finally:
        _nvtx -= 1


class _Range:
    """A range to be entered once; a class, because a generator would cost the profiled step more than its ranges do."""

    __slots__ = ("_arguments", "_handle", "_name", "_nvtx")

    def __init__(self, name: str, subject: Subject | None = None) -> None:
        self._name = name
        # Below is what `record_function` is made of, which takes arguments as text only, and no trace shows that.
        self._arguments = () if subject is None else (*subject.elements.values(), _of_shape(subject.shape))
        self._nvtx = _nvtx > 0

    def __enter__(self) -> None:
        if self._nvtx:
            torch.cuda.nvtx.range_push(self._name)
        self._handle = torch.autograd._record_function_with_args_enter(self._name, *self._arguments)  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        torch.autograd._record_function_with_args_exit(self._handle)  # type: ignore[attr-defined]
        if self._nvtx:
            torch.cuda.nvtx.range_pop()


@lru_cache(maxsize=4096)
def _of_shape(shape: tuple[int, ...]) -> Tensor:
    """A tensor of a shape and no memory: a range shows the dimensions of its tensors."""
    return torch.empty(shape, device="meta")
