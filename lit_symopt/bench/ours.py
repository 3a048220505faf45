"""Our own stacks as contestants: `symopt:<stack>`, grouped as `SymOpt.for_module` groups a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from lit_symopt.bench.contest import Contestant
from lit_symopt.bench.shapes import ShapeList
from lit_symopt.bench.tensors import Numbers, as_module
from lit_symopt.config import RoleConfig, StackName, SymOptConfig
from lit_symopt.linalg import Backend, Precision
from lit_symopt.linalg.low_precision import STEPS
from lit_symopt.rules.rows import POLAR

if TYPE_CHECKING:
    from lit_symopt.optim import SymOpt
    from lit_symopt.profiling.run import Work

PREFIX = "symopt:"


def symopt(
    shapes: ShapeList,
    numbers: Numbers,
    *,
    stack: str,
    precision: str = "auto",
    backend: str = "auto",
    scratch: float | None = None,
    roles: dict[str, RoleConfig] | None = None,
) -> SymOpt:
    """An optimizer over the shapes, with gradients in place.

    Raises:
        ConfigError: for an unknown stack, precision or backend, and for a backend that cannot run here.
    """
    from lit_symopt.optim import SymOpt, groups_for

    config = SymOptConfig(
        stack=cast(StackName, stack),
        lr=numbers.lr,
        precision=cast(Precision, precision),
        backend=cast(Backend, backend),
        scratch=scratch,
        roles=roles or {},
    )
    return SymOpt(groups_for(shapes.blocks, as_module(shapes, numbers), config))


def as_contestant(optimizer: SymOpt, *, name: str, about: str = "") -> Contestant:
    """A contestant that steps an optimizer."""
    from lit_symopt.profiling.expected import expected_work

    work = expected_work(optimizer)
    device = optimizer.param_groups[0]["params"][0].device
    return Contestant(
        name=name,
        step=optimizer.step,
        about=about or _about(optimizer),
        iterations=iterations_of(work),
        least_bytes=sum(one.bytes for one in work),
        products=products_of(work),
        kept=lambda: optimizer.kept_scratch(device),
    )


def iterations_of(work: tuple[Work, ...]) -> int | None:
    """Steps of the iteration in low precision; `None` where polar factors are found otherwise, or there are none."""
    return STEPS if any(one.dtype != "float64" and one.rule in POLAR for one in work) else None


def products_of(work: tuple[Work, ...]) -> torch.dtype | None:
    """The dtype of the matrix products of a step."""
    found = [getattr(torch, one.dtype) for one in work if one.rule in POLAR]
    return found[0] if found else None


def _about(optimizer: Any) -> str:
    rules: dict[str, int] = {}
    for group in optimizer.param_groups:
        rules[group["rule"]] = rules.get(group["rule"], 0) + len(group["params"])
    return ", ".join(f"{rule} on {count}" for rule, count in rules.items())
