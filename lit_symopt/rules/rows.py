"""What a rule exchanges when the rows of its matrices lie on several ranks.

With `rows=RowShards(...)` every rule gives on each rank its own rows of what it would give on the whole matrix. For
that it adds up, over the ranks and in float64, in this order, for each matrix m x n of a batch:

| step | numbers | when |
|---|---|---|
| `project` the momentum | n | centered |
| `row_norm`, `row_then_spectral`: mean square of the row norms | 1 | `row_damping` > 0 |
| `row_then_spectral`: `project` the scaled rows | n | centered |
| spectral rules, `row_then_spectral`, `spectral_then_row`: Gram matrix, its upper triangle | n(n+1)/2 | always |
| `spectral_then_row`: mean square of the row norms | 1 | `row_damping` > 0 |
| `project` the update (`adamw`: this alone) | n | centered |
| scale `row_nuclear`: `project` the momentum, mean square of the row norms | n, 1 | centered, damped |
| scales `nuclear`, `row_nuclear`: ⟨M, U⟩ | 1 | these scales |

`row_norm` without damping, `sgd` and `sign` exchange nothing unless centered. A float64 momentum exchanges 2n numbers
for each projection, which takes two means, and the largest entry, 1 number, before each mean square; it has no polar
factor on row shards, because that of the whole matrix is found from its singular values.
"""

from __future__ import annotations

import torch

from lit_symopt.errors import ConfigError
from lit_symopt.linalg import WHOLE, Precision, Rows, RowShards
from lit_symopt.linalg.low_precision import DTYPES
from lit_symopt.rules.centering import passes_on_shards
from lit_symopt.rules.registry import get_rule
from lit_symopt.rules.rule import Scale
from lit_symopt.rules.scale import NUCLEAR, validate_scale

__all__ = ["POLAR", "SPECTRAL", "WHOLE", "RowShards", "Rows", "payload"]

POLAR = frozenset({"spectral", "right_spectral", "left_spectral", "row_then_spectral", "spectral_then_row"})
"""The rules that take a polar factor, and so add up a Gram matrix."""

SPECTRAL = frozenset({"spectral", "right_spectral", "left_spectral"})
"""The rules that are a polar factor and nothing else."""


def payload(
    rule_name: str,
    *,
    n: int,
    centered: bool,
    scale: Scale,
    row_damping: float,
    dtype: torch.dtype,
    precision: Precision,
) -> int:
    """Bytes that one matrix of n columns puts into `all_reduce` on row shards: rule and scale, sums and maxima.

    Args:
        rule_name: the rule; for `adamw`, what centering its step takes.
        n: number of columns; the number of rows does not matter.
        centered, scale, row_damping, precision: options of the group.
        dtype: of the momentum.

    Raises:
        ConfigError: for a scale that makes no sense after the rule, and for a polar factor of row shards in a precision
            that needs the whole matrix.

    Example:
        >>> options = {"n": 64, "centered": True, "scale": "none", "row_damping": 0.0, "dtype": torch.float32}
        >>> payload("row_norm", precision="auto", **options)  # two rows of 64 numbers in float64
        1024
    """
    rule = get_rule(rule_name)
    validate_scale(scale, rule=rule)
    polar = rule_name in POLAR
    if polar and (precision in ("exact", *DTYPES) or dtype == torch.float64):
        raise ConfigError(
            f"rule {rule_name!r} in precision {precision!r} on {dtype} needs whole matrices, not row shards; "
            f"choose precision 'fp32' on float32, or put the matrices together"
        )
    projection = passes_on_shards(dtype) * n if centered else 0
    damping = (2 if dtype == torch.float64 else 1) if rule.damped and row_damping else 0

    numbers = projection + damping
    if rule_name != "adamw":
        numbers += projection
    if rule_name == "row_then_spectral":
        numbers += projection
    if polar:
        numbers += n * (n + 1) // 2
    if scale == "row_nuclear":
        numbers += projection + damping
    if scale in NUCLEAR:
        numbers += 1
    return numbers * torch.float64.itemsize
