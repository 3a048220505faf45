r"""The polar factor, named after its Gram matrix on the left: for blocks with few rows, such as routers, S_E × O(d).

    U = (MMᵀ)^{-1/2} M

The same map as `spectral` (see there why it is the same function). What the name says is which Gram matrix the block
owns: MMᵀ is m × m however many features there are, and a sum over columns.

Source: Lau and Su 2026, arXiv:2605.18106.
"""

from __future__ import annotations

from lit_symopt.rules.rule import SPECTRAL_SCALES, Rule
from lit_symopt.rules.spectral import spectral as left_spectral

RULE = Rule(
    name="left_spectral",
    function=left_spectral,
    equation="(MMᵀ)^{-1/2} M",
    group="O(m) × O(n)",
    kind="spectral",
    scales=SPECTRAL_SCALES,
    source="arXiv:2605.18106",
)
