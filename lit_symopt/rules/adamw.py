r"""AdamW, coordinate by coordinate.

    U = m̂ / (√v̂ + ε)   with bias-corrected averages m̂ of G and v̂ of G²

Commutes with signed permutations only: right for norms, biases and other vectors, wrong for matrices. It keeps two
averages and a step count, so it is not a function of the momentum: the optimizer takes torch's own AdamW step, and the
function here only says so.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101; `torch.optim.AdamW`.
"""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from lit_symopt.errors import ConfigError
from lit_symopt.linalg import EAGER, WHOLE, Execution, Precision, Rows
from lit_symopt.rules.rule import Rule


def adamw(
    momentum: Tensor,
    *,
    centered: bool = False,
    precision: Precision = "auto",
    eps: float = 1e-8,
    row_damping: float = 0.0,
    rows: Rows = WHOLE,
    how: Execution = EAGER,
) -> NoReturn:
    """Raises `ConfigError`: AdamW is a step of `SymOpt` or of `torch.optim.AdamW`, not a function of the momentum."""
    raise ConfigError(
        "rule 'adamw' is not a function of the momentum; use SymOpt or torch.optim.AdamW to take its step"
    )


RULE = Rule(
    name="adamw",
    function=adamw,
    equation="m̂ / (√v̂ + ε)",
    group="signed permutations",
    kind="coordinate",
    scales=frozenset({"none"}),
    source="arXiv:1711.05101; torch.optim.AdamW",
)
