r"""How many floating-point operations a rule takes: pure functions of method, shape and options.

Counted as `lit_symopt.linalg` computes today, a multiply-add as 2, for a matrix of long side m and short side n:

| method | products | decomposition |
|---|---|---|
| `bf16`, 5 steps on X | 5 (4mn² + 2n³): XᵀX, G², X(bG + cG²) | |
| `bf16`, Gram form (`linalg.forms`) | 3 · 4mn² + 22n³: XᵀX, XQ; 5 for G², 2 for QP, 4 for PGP | |
| `iteration`, 9 steps | 4mn² + 80n³: XᵀX, XR; 2 for the norm, 4 a step, 2 of the filter | n³/3 Cholesky, 2n³ solve |
| `eigh` | 4mn² + 2n³: XᵀX, XR; V f(λ) Vᵀ | 14n³/3 |
| `svd` | 2mn² + 2n³: XR; V f(σ) Vᵀ | min(14mn² + 8n³, 6mn² + 20n³) |

A decomposition does not always take the same number of operations; these are nominal. `eigh` is LAPACK's divide and
conquer (`syevd`) without deflation: 4n³/3 for the tridiagonal form; n³ for the products of the last merge, whose two
blocks are n/2 × n/2, and 1/4 of that for the merges before, and so on, 4n³/3; and 2n³ to transform the vectors back.
(The QR algorithm would take 9n³.) `svd` is the cheaper of the Golub-Reinsch and the R-bidiagonalization algorithms with
U₁, Σ and V.

The backends `triton` and `cpp` compute one half of symmetric products (`HALVED`).

On a CPU a batch of `bf16` in which a norm is out of the usual range takes its first Gram matrices twice, after it was
scaled; that is not counted.

Element by element only what mathematics asks for is counted, not what a careful implementation adds: 2 an entry for a
projection or an inner product, 3 for a row norm and the division by it.

Sources: Golub and Van Loan 2013, "Matrix Computations", 4th edition, sections 4.2.5, 8.3 and figure 8.6.1; Cuppen 1981
and Gu and Eisenstat 1995 for divide and conquer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lit_symopt.linalg.forms import Halved, choose_form, form_operations
from lit_symopt.linalg.low_precision import DTYPES, STEPS
from lit_symopt.linalg.newton_schulz import GRAM_STEPS
from lit_symopt.linalg.polar import Method, method_for
from lit_symopt.rules import get_rule
from lit_symopt.rules.centering import working_dtype
from lit_symopt.rules.rows import POLAR
from lit_symopt.rules.scale import NUCLEAR

PROJECT = 2  # the mean, and its subtraction
ROW_NORM = 3  # square and add, and divide
INNER = 2  # multiply-add
ADAMW = 14  # two averages (3 and 4), root, two corrections, quotient and step (3 and 3), decay
WRITE = 3  # decay, rate, add
MOMENTUM = {"ema": 3, "nesterov": 4}


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Floating-point operations by kind.

    Attributes:
        products: matrix products, exactly.
        decompositions: eigenvalues, singular values, Cholesky factors and solves with them; nominal.
        elementwise: everything that is linear in the number of entries, at the least.
    """

    products: float = 0.0
    decompositions: float = 0.0
    elementwise: float = 0.0

    def __add__(self, other: Operations) -> Operations:
        return Operations(
            products=self.products + other.products,
            decompositions=self.decompositions + other.decompositions,
            elementwise=self.elementwise + other.elementwise,
        )

    @property
    def total(self) -> float:
        """All of them."""
        return self.products + self.decompositions + self.elementwise


HALVED: Mapping[str, Halved] = {"triton": "squares", "cpp": "everything"}
"""By backend, of a polar factor in bfloat16: symmetric products of which one half is computed."""


def polar_operations(
    method: Method, *, m: int, n: int, count: int = 1, rows: int | None = None, backend: str = "auto"
) -> Operations:
    """The polar factors of `count` matrices m x n by a method.

    Args:
        method: as `method_for` says.
        m, n: of each whole matrix; which side is the shorter one does not matter.
        count: number of matrices.
        rows: row shards: how many of the m rows are here. The n x n root is computed wherever a row may be.
        backend: of the group.

    Example:
        >>> polar_operations("eigh", m=300, n=100).products  # 4 m n² + 2 n³
        14000000.0
    """
    long, n = (max(m, n), min(m, n)) if rows is None else (rows, n)
    by_rows, cube = float(2 * long * n * n), float(n**3)
    if method in DTYPES:
        form = choose_form(long, n, steps=STEPS, dtype=DTYPES[method])
        halved = HALVED.get(backend, "nothing") if method == "bf16" else "nothing"
        return Operations(products=float(count * form_operations(form, m=long, n=n, halved=halved)))
    if method == "iteration":
        in_gram = 4 + 8 * GRAM_STEPS + 4
        return Operations(products=count * (2 * by_rows + in_gram * cube), decompositions=count * (1 / 3 + 2) * cube)
    if method == "eigh":
        return Operations(products=count * (2 * by_rows + 2 * cube), decompositions=count * 14 / 3 * cube)
    svd = min(7 * by_rows + 8 * cube, 3 * by_rows + 20 * cube)
    return Operations(products=count * (by_rows + 2 * cube), decompositions=count * svd)


def rule_operations(
    options: Mapping[str, Any],
    *,
    m: int,
    n: int,
    count: int = 1,
    rows: int | None = None,
    dtype: torch.dtype,
    device_type: str,
) -> Operations:
    """Rule and scale of `count` matrices m x n; of AdamW only what centering its step takes.

    Args:
        options: of a group: `rule`, `centered`, `scale`, `precision`, and `backend` if it is not `auto`.
        m, n: of each whole matrix; rows are units.
        count: number of matrices.
        rows: row shards: how many of the m rows are here.
        dtype: of the momentum.
        device_type: where it is computed; decides how a polar factor is found.

    Example:
        >>> options = {"rule": "row_norm", "centered": True, "scale": "rms", "precision": "auto"}
        >>> rule_operations(options, m=4, n=5, dtype=torch.float32, device_type="cpu").elementwise  # (3 + 2·2 + 1)·20
        160.0
    """
    rule, scale, centered = get_rule(options["rule"]), options["scale"], bool(options["centered"])
    entries = float(count * (m if rows is None else rows) * n)
    if rule.name == "adamw":
        return Operations(elementwise=PROJECT * entries if centered else 0.0)
    each = 1 + 2 * PROJECT * centered  # the scale, and both projections
    if rule.name in ("row_norm", "row_then_spectral", "spectral_then_row"):
        each += ROW_NORM
    if rule.name == "row_then_spectral":
        each += PROJECT * centered
    if scale in NUCLEAR:
        each += INNER
    if scale == "row_nuclear":
        each += ROW_NORM + PROJECT * centered
    if rule.name == "sign":
        each += 1
    found = Operations(elementwise=each * entries)
    if rule.name in POLAR and m and n:
        method = method_for(options["precision"], dtype=dtype, device_type=device_type, side=min(m, n))
        backend = str(options.get("backend", "auto"))
        found += polar_operations(method, m=m, n=n, count=count, rows=rows, backend=backend)
    return found


def element_operations(options: Mapping[str, Any]) -> int:
    """Operations an element of what happens before and after the rule: momentum, decay and step, or all of AdamW."""
    if options["rule"] == "adamw":
        return ADAMW
    return WRITE + (MOMENTUM[options["momentum_kind"]] if options["momentum"] else 0)


def compute_dtype(options: Mapping[str, Any], *, side: int, dtype: torch.dtype, device_type: str) -> torch.dtype:
    """In which dtype the bulk of a rule is computed: the products of a polar factor, else its intermediates.

    Args:
        options: of a group: `rule`, `precision`.
        side: the shorter side of the matrices.
        dtype: of the momentum.
        device_type: where it is computed.
    """
    if options["rule"] == "adamw":
        return dtype
    if options["rule"] not in POLAR:
        return working_dtype(dtype, options["precision"])
    method = method_for(options["precision"], dtype=dtype, device_type=device_type, side=side)
    return DTYPES.get(method, torch.float64)
