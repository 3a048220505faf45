r"""Coefficients of the odd quintics that drive every singular value to one.

One step applies p(σ) = a σ + b σ³ + c σ⁵ to the singular values of a matrix and leaves its singular vectors alone.

*Muon's quintic*: one fixed polynomial, steep at zero, which hovers around one instead of converging.
Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
https://kellerjordan.github.io/posts/muon/.

*Polar Express*: for singular values known to lie in [ℓ, u], the quintic that minimizes max |1 - p(σ)| over [ℓ, u];
after it they lie in [p(ℓ), 2 - p(ℓ)], which is the interval of the next step. Taking the best quintic at every step is
also the best composition. Source: Amsel, Persson, Musco and Gower 2025, "The Polar Express", arXiv:2505.16932.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

Quintic = tuple[float, float, float]

MUON_QUINTIC: Quintic = (3.4445, -4.7750, 2.0315)
"""Jordan et al. 2024: five steps bring every σ/‖M‖_F above about 5e-3 into [0.7, 1.2]."""

PUBLISHED_POLAR_EXPRESS: tuple[Quintic, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""The table of arXiv:2505.16932 (ℓ = 1e-3), against which the tests hold `polar_express`."""

PUBLISHED_CUSHION = 0.02407327424182761
"""The cushion behind the published table (arXiv:2505.16932, appendix)."""

_NARROW = 1 - 5e-6  # ℓ/u above this: the minimax quintic equals its limit to double precision (arXiv:2505.16932)


@lru_cache(maxsize=64)
def polar_express(*, lower: float, steps: int, cushion: float = 0.0, safety: float = 1.0) -> tuple[Quintic, ...]:
    """The optimal quintics for singular values in [`lower`, 1], one a step.

    `cushion` c computes each polynomial as if the lower bound were at least c·u, which keeps p well away from zero
    inside the interval at the price of a slower start; low precision needs it. `safety` s > 1 divides the argument of
    all but the last polynomial by s, so that a singular value that rounding has pushed above u does not diverge.

    Raises `ValueError` outside 0 < lower <= 1, steps >= 1, 0 <= cushion < 1 and safety >= 1.

    Source: arXiv:2505.16932, theorem 3.1 and section 3.4.

    >>> [round(a, 4) for a, b, c in polar_express(lower=1e-3, steps=5, cushion=PUBLISHED_CUSHION)]
    [8.2872, 4.1071, 3.9487, 3.3184, 2.3007]
    """
    if not (0 < lower <= 1 and steps >= 1 and 0 <= cushion < 1 and safety >= 1):
        raise ValueError(
            "polar_express needs 0 < lower <= 1, steps >= 1, 0 <= cushion < 1 and safety >= 1, "
            f"got lower={lower}, steps={steps}, cushion={cushion}, safety={safety}"
        )
    upper, quintics = 1.0, []
    for step in range(steps):
        quintic = minimax_quintic(max(lower, cushion * upper), upper)
        # With a cushion p(lower) < 1 - error: center the image of the true interval on one again.
        center = (_evaluate(quintic, lower) + _evaluate(quintic, upper)) / 2
        a, b, c = (coefficient / center for coefficient in quintic)
        lower = _evaluate((a, b, c), lower)
        upper = 2 - lower
        s = safety if step < steps - 1 else 1.0
        quintics.append((a / s, b / s**3, c / s**5))
    return tuple(quintics)


def minimax_quintic(lower: float, upper: float) -> Quintic:
    """The odd quintic with the smallest max |1 - p(σ)| over [lower, upper], by the Remez exchange in float64.

    The optimum equioscillates: 1 - p takes ±E in turn at lower < q < r < upper, where p'(q) = p'(r) = 0.
    """
    if lower >= _NARROW * upper:
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    q, r = (3 * lower + upper) / 4, (lower + 3 * upper) / 4  # exact in the limit lower -> upper
    error, previous = math.inf, -math.inf
    while abs(error - previous) > 1e-15:
        previous = error
        rows = [[x, x**3, x**5, sign] for x, sign in ((lower, 1.0), (q, -1.0), (r, 1.0), (upper, -1.0))]
        system = torch.tensor(rows, dtype=torch.float64, device="cpu")
        a, b, c, error = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64, device="cpu")).tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)  # p'(x) = a + 3 b x² + 5 c x⁴
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return a, b, c


def _evaluate(quintic: Quintic, x: float) -> float:
    a, b, c = quintic
    return a * x + b * x**3 + c * x**5
