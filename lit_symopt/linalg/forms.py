"""Plain form, or Gram form with restarts: which one takes fewer operations, by shape.

A `Form` says how many steps of an iteration lie between one Gram matrix of X and the next; (1, 1, 1, 1, 1) is the plain
form. With the long side r·s and the short side s, in units of s³ and with a multiply-add as 2, a segment of k steps
takes

    4r + 2k + 6 (k - 1):    XᵀX and X Q, 2r each;  k squares G², 2 each;  k - 1 times Q P, P G and (P G) P, 2 each

so that five steps take

| form | operations | r = 2 | r = 3 | r = 4 |
|---|---|---|---|---|
| (1, 1, 1, 1, 1) | 20r + 10 | 50 | 70 | 90 |
| (2, 1, 2) | 12r + 22 | 46 | 58 | 70 |
| (3, 2) | 8r + 28 | 44 | 52 | 60 |
| (5,) | 4r + 34 | 42 | 46 | 50 |

Counting what small matrices are bound by, the numbers that are moved, gives nearly the same: 20r + 20 and 12r + 30.

`choose_form` takes one of the first three. Between restarts the eigenvalues of G change by P G P, which carries along
the rounding of G, about 2⁻⁹ of its largest eigenvalue in bfloat16 and 2⁻¹¹ in float16 and TF32; every step multiplies
what is so lost of a small one by another a² (about 14), and a σ that is underestimated is moved beyond the interval on
which the next quintic is bounded. For a larger safety of the quintics, two steps from a fresh Gram matrix can be had in
bfloat16, and three in the finer ones. Largest singular values of the result with a safety of 1.08
(`low_precision.QUINTICS`), over some thousand spectra of two and three clusters, of low rank, with common directions
and with heavy tails, s from 6 to 128, r from 1 to 5; with 1.01 each form diverges for some of them in bfloat16:

| form | bfloat16 | float16 | TF32 (rounded here, not on a GPU) |
|---|---|---|---|
| (1, 1, 1, 1, 1) | 1.02 | 1.014 | 1.014 |
| (2, 1, 2) | 1.03 | 1.014 | 1.014 |
| (2, 2, 1) | 1.05 | | |
| (3, 2) | diverges | 1.014 | 1.014 |
| (2, 3) | 1.3 | 1.033 | 1.037 |
| (5,) | diverges | diverges | diverges |
"""

from __future__ import annotations

from typing import Literal

import torch

Form = tuple[int, ...]
"""Steps between restarts."""

ACCURATE: dict[torch.dtype, dict[int, tuple[Form, ...]]] = {
    torch.bfloat16: {5: ((1, 1, 1, 1, 1), (2, 1, 2))},
    torch.float16: {5: ((1, 1, 1, 1, 1), (3, 2))},
    torch.float32: {5: ((1, 1, 1, 1, 1), (3, 2))},  # of whose entries TF32 reads as many digits as float16 has
}
"""By dtype and steps: forms that keep the errors that `polar` promises."""

SMALL = 64
"""Sides below take the plain form: there not operations count but calls, of which it has fewer (measured on a CPU)."""


def plain(steps: int) -> Form:
    """Every step on X.

    >>> plain(5)
    (1, 1, 1, 1, 1)
    """
    return (1,) * steps


Halved = Literal["nothing", "squares", "everything"]
"""Of which symmetric products only one half is computed: XᵀX and G², or those and Q P, P G and (P G) P."""


def form_operations(form: Form, *, m: int, n: int, halved: Halved = "nothing") -> int:
    """Floating-point operations of the products of an iteration on a matrix m x n; a multiply-add as 2.

    >>> form_operations((2, 1, 2), m=20, n=10) == (12 * 2 + 22) * 10**3
    True
    >>> form_operations((2, 1, 2), m=20, n=10, halved="everything") == (9 * 2 + 11) * 10**3
    True
    """
    long, side = max(m, n), min(m, n)
    squares, others = 2 if halved == "nothing" else 1, 3 if halved == "everything" else 6
    return sum((2 + squares) * long * side**2 + (squares * steps + others * (steps - 1)) * side**3 for steps in form)


def choose_form(m: int, n: int, *, steps: int, dtype: torch.dtype = torch.bfloat16) -> Form:
    """The form in which an iteration is the cheapest on a matrix m x n, among those that are accurate in a dtype.

    The same on every device, so that a run gives the same kind of result wherever it goes on.

    Example:
        >>> choose_form(256, 256, steps=5), choose_form(768, 256, steps=5)
        ((1, 1, 1, 1, 1), (2, 1, 2))
        >>> choose_form(768, 256, steps=5, dtype=torch.float16)
        (3, 2)
    """
    if min(m, n) < SMALL:
        return plain(steps)
    accurate = ACCURATE.get(dtype, {}).get(steps, (plain(steps),))
    return min(accurate, key=lambda form: form_operations(form, m=m, n=n))
