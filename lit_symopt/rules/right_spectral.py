r"""The polar factor, named after its Gram matrix on the right: for blocks whose columns are the features, S_V × O(d).

    U = M (MᵀM)^{-1/2}

The same map as `spectral` (see there why it is the same function). What the name says is which Gram matrix the block
owns: MᵀM is n × n however many rows there are, and a sum over rows, so that row shards exchange n × n numbers.

Source: Lau and Su 2026, arXiv:2605.18106.
"""

from __future__ import annotations

from lit_symopt.rules.rule import SPECTRAL_SCALES, Rule
from lit_symopt.rules.spectral import spectral as right_spectral

RULE = Rule(
    name="right_spectral",
    function=right_spectral,
    equation="M (MᵀM)^{-1/2}",
    group="O(m) × O(n)",
    kind="spectral",
    scales=SPECTRAL_SCALES,
    source="arXiv:2605.18106",
)
