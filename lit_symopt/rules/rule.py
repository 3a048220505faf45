"""What the optimizer and a reader need to know of a rule: the noun the registry is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from lit_symopt.linalg import EAGER, WHOLE, Execution, Precision, Rows

Scale = Literal["none", "spectral", "aspect", "rms", "row_rms", "inverse_fan_in", "nuclear", "row_nuclear"]
Kind = Literal["spectral", "row", "coordinate"]

SPECTRAL_SCALES: frozenset[Scale] = frozenset({"none", "spectral", "aspect", "rms", "nuclear"})
ROW_SCALES: frozenset[Scale] = frozenset({"none", "rms", "row_rms", "nuclear"})


class RuleFunction(Protocol):
    """momentum [..., m, n] → update [..., m, n], same dtype; pure: the momentum is never written.

    `rows` says where the rows of each matrix lie: with row shards [K, k, n], the update of the rows that are here.
    `how` says by whose kernels and in whose memory it is computed; the result may lie in memory that `how` lends.
    """

    def __call__(
        self,
        momentum: Tensor,
        *,
        centered: bool = False,
        precision: Precision = "auto",
        eps: float = 1e-8,
        row_damping: float = 0.0,
        rows: Rows = WHOLE,
        how: Execution = EAGER,
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A map from momentum to update, with the group it commutes with.

    `kind` says what the last step leaves behind: singular values of one (`spectral`), rows of norm one (`row`), or
    neither (`coordinate`). `scales` are the scales that make sense after it, `damped` whether it divides by row norms,
    so that `row_damping` means something.
    """

    name: str
    function: RuleFunction
    equation: str
    group: str
    kind: Kind
    scales: frozenset[Scale]
    source: str
    damped: bool = False
