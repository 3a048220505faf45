r"""How long a step is, apart from the learning rate.

| scale | factor | after |
|---|---|---|
| `none` | 1 | every rule |
| `spectral` | max(1, fan_out/fan_in)^{1/2} | a polar factor |
| `aspect` | (fan_out/fan_in)^{1/2} | a polar factor |
| `rms` | 0.2·√max(m, n) after a polar factor, 0.2·√n after a row norm | both |
| `row_rms` | √n: each row has root mean square one | a row norm |
| `inverse_fan_in` | 1/fan_in | `sign` |
| `nuclear` | ν^α, ν = max(⟨M, U⟩, 0) of each matrix | both |
| `row_nuclear` | ν^α, ν = ‖D(M) M‖_* of each matrix, which does not know the size of M | `row_then_spectral` |

Here m × n is the matrix whose rows are units, fan_out × fan_in the matrix as a linear map. A polar factor of full rank
has Frobenius norm √min(m, n), so `rms` makes the root mean square of an entry 0.2, about that of an AdamW update; it is
analytic, never measured, so a low-rank momentum gives a smaller step. Row shards add up 1 number for a nuclear scale,
and for `row_nuclear` what its D(M) M takes; the others are the same on every rank anyway.

Sources: `spectral` Jordan et al. 2024 (Muon); `aspect`, `row_rms` and `inverse_fan_in` Pethick et al. 2025,
arXiv:2502.07529 (Scion: its norms for hidden layers, one-hot inputs and the last layer); `rms` Liu et al. 2025,
arXiv:2502.16982 (Moonlight); `nuclear` Lau et al. 2025, arXiv:2505.21799 (PolarGrad), and Carlson et al. 2015
(stochastic spectral descent); `row_nuclear` the published code of Lau & Su 2026, arXiv:2605.18106 (its hybrid rule).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_symopt.errors import ConfigError
from lit_symopt.linalg import WHOLE, Rows
from lit_symopt.rules.centering import project
from lit_symopt.rules.row_norm import unit_rows
from lit_symopt.rules.rule import Rule

NUCLEAR = ("nuclear", "row_nuclear")
"""The scales with an exponent α."""

ADAMW_RMS = 0.2
"""The root mean square of an AdamW update's entries, as measured by Liu et al. 2025, arXiv:2502.16982."""


def validate_scale(scale: str, *, rule: Rule, alpha: float | None = None) -> None:
    """Check that `scale` makes sense after `rule`, and that `alpha` belongs to a nuclear scale and is not negative.

    Raises `ConfigError` that names the rule, the scale and those that are allowed.
    """
    if scale not in rule.scales:
        raise ConfigError(
            f"scale {scale!r} makes no sense after rule {rule.name!r}; choose one of {', '.join(sorted(rule.scales))}"
        )
    if alpha is not None and scale not in NUCLEAR:
        raise ConfigError(f"alpha={alpha} belongs to scale 'nuclear', not {scale!r}; drop it or set scale: nuclear")
    if alpha is not None and not (math.isfinite(alpha) and alpha >= 0):
        raise ConfigError(f"alpha={alpha} must be a finite number >= 0")


def scale_factor(
    scale: str,
    *,
    rule: Rule,
    momentum: Tensor,
    update: Tensor,
    fan_out: int,
    fan_in: int,
    alpha: float = 1.0,
    centered: bool = False,
    eps: float = 1e-8,
    row_damping: float = 0.0,
    rows: Rows = WHOLE,
) -> float | Tensor:
    """The factor of `update` [..., m, n]: a number, or for a nuclear scale a tensor [..., 1, 1], one number a matrix.

    `centered`, `eps` and `row_damping` are those of the rule; only `row_nuclear` asks for them. `rows` says where the
    rows of each matrix lie: the factor is that of the whole matrix on every rank.

    Raises `ConfigError` for a scale that makes no sense after `rule`.

    >>> from lit_symopt.rules import get_rule
    >>> u = torch.eye(2)
    >>> scale_factor("aspect", rule=get_rule("spectral"), momentum=u, update=u, fan_out=4, fan_in=1)
    2.0
    >>> scale_factor("nuclear", rule=get_rule("spectral"), momentum=3 * u, update=u, fan_out=2, fan_in=2)
    tensor([[6.]])
    """
    validate_scale(scale, rule=rule)
    m, n = rows.count(update), update.shape[-1]
    if scale == "none" or rows.empty(update):
        return 1.0
    if scale == "spectral":
        return math.sqrt(max(1.0, fan_out / fan_in))
    if scale == "aspect":
        return math.sqrt(fan_out / fan_in)
    if scale == "rms":
        return ADAMW_RMS * math.sqrt(n if rule.kind == "row" else max(m, n))
    if scale == "row_rms":
        return math.sqrt(n)
    if scale == "inverse_fan_in":
        return 1 / fan_in
    if scale == "row_nuclear":
        # U is the polar factor of the scaled rows, up to the last projection, which they are orthogonal to anyway.
        projected = project(momentum, rows=rows) if centered else momentum
        momentum = unit_rows(projected, eps=eps, damping=row_damping, rows=rows)
    return nuclear_norm(momentum, update, rows=rows).pow(alpha).to(update.dtype)


def nuclear_norm(momentum: Tensor, update: Tensor, *, rows: Rows = WHOLE) -> Tensor:
    """ν = max(⟨M, U⟩, 0) of each matrix, float64 [..., 1, 1]; for U = polar(M) it is the nuclear norm of M."""
    # No entry of U exceeds one, so the products cannot overflow; their sum could, in less than float64.
    here = torch.sum(rows.keep(momentum * update), dim=(-2, -1), keepdim=True, dtype=torch.float64)
    return rows.total(here).clamp(min=0)
