"""A whole step of row_norm by the backend asked for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_symopt.backends.choice import chosen, require_backend
from lit_symopt.errors import ConfigError
from lit_symopt.linalg.execution import Execution


def row_step_by_backend(
    weight: Tensor, gradient: Tensor, momentum: Tensor | None = None, *, how: Execution, **options: Any
) -> None:
    """A step of row_norm on each matrix of `weight` [..., m, n], rows being units; writes weight and momentum.

    Ask `takes` before: it says for which groups this is the step.

    Args:
        weight, gradient, momentum: as of `lit_symopt.row_step.row_step`.
        how: the backend; `eager` and `cpp` borrow from its scratch memory.
        options: `lr`, `weight_decay`, `beta`, `nesterov`, `scale`, `row_damping`, `centered`, `admitted` and
            `parameter`, as of `lit_symopt.row_step.row_step`. For `compile` and `triton`, `lr` and `weight_decay` may
            be tensors of one number on the device.

    Raises:
        ConfigError: if the backend does not run on the device of `weight`, or has no step of row_norm.
    """
    backend = chosen(how.backend)
    require_backend(backend, weight.device)
    if backend == "compile":
        from lit_symopt.backends.compiled import row_step as compiled

        compiled(weight, gradient, momentum, **options)
    elif backend == "triton":
        from lit_symopt.linalg.kernels import row_rule

        row_rule(weight, gradient, momentum, **options)
    elif backend == "cpp":
        from lit_symopt.cpp.row_step import row_step as in_cpp

        in_cpp(weight, gradient, momentum, scratch=how.scratch, **options)
    elif backend == "eager":
        from lit_symopt.row_step import row_step

        row_step(weight, gradient, momentum, scratch=how.scratch, **options)
    else:
        raise ConfigError(f"backend={backend!r} has no step of row_norm; choose eager, cpp, compile or triton")
