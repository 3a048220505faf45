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
| (2, 3) | 8r + 28 | 44 | 52 | 60 |
| (5,) | 4r + 34 | 42 | 46 | 50 |

Counting what small matrices are bound by, the numbers that are moved, gives nearly the same: 20r + 20 and 12r + 30.

`choose_form` takes one of the first two. Between restarts the eigenvalues of G change by P G P, which carries along the
rounding of G, in bfloat16 about 2⁻⁹ of its largest eigenvalue; every step multiplies what is so lost of a small one by
another a² (about 14), and a σ that is underestimated is moved beyond the interval on which the next quintic is bounded.
Two steps from a fresh Gram matrix can be had for a larger safety of the quintics, three cannot. Largest singular values
of the result in bfloat16 with a safety of 1.08 (`polar.BF16`), over some thousand spectra of two and three clusters, of
low rank, with common directions and with heavy tails, s from 6 to 128, r from 1 to 5; with 1.01 each form diverges for
some of them:

| form | largest singular value |
|---|---|
| (1, 1, 1, 1, 1) | 1.02 |
| (2, 1, 2) | 1.03 |
| (2, 2, 1) | 1.05 |
| (2, 3) | 1.3 |
| (5,) | diverges |
"""

from __future__ import annotations

Form = tuple[int, ...]
"""Steps between restarts."""

ACCURATE: dict[int, tuple[Form, ...]] = {5: ((1, 1, 1, 1, 1), (2, 1, 2))}
"""By steps: forms that keep, in bfloat16, the errors that `polar` promises."""

SMALL = 64
"""Sides below take the plain form: there not operations count but calls, of which it has fewer (measured on a CPU)."""


def plain(steps: int) -> Form:
    """Every step on X.

    >>> plain(5)
    (1, 1, 1, 1, 1)
    """
    return (1,) * steps


def form_operations(form: Form, *, m: int, n: int) -> int:
    """Floating-point operations of the products of an iteration on a matrix m x n; a multiply-add as 2.

    >>> form_operations((2, 1, 2), m=20, n=10) == (12 * 2 + 22) * 10**3
    True
    """
    long, side = max(m, n), min(m, n)
    return sum(4 * long * side**2 + (2 * steps + 6 * (steps - 1)) * side**3 for steps in form)


def choose_form(m: int, n: int, *, steps: int) -> Form:
    """The form in which an iteration in bfloat16 is the cheapest on a matrix m x n, among those that are accurate.

    The same on every device, so that a run gives the same kind of result wherever it goes on.

    Example:
        >>> choose_form(256, 256, steps=5), choose_form(768, 256, steps=5)
        ((1, 1, 1, 1, 1), (2, 1, 2))
    """
    if min(m, n) < SMALL:
        return plain(steps)
    return min(ACCURATE.get(steps, (plain(steps),)), key=lambda form: form_operations(form, m=m, n=n))
