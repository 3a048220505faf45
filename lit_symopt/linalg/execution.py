"""With what a rule computes: by whose kernels, and in whose memory. Which numbers come out is not decided here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_symopt.scratch import FRESH, Scratch

Backend = Literal["auto", "eager", "cpp", "compile", "triton", "gram-newton-schulz"]


@dataclass(frozen=True)
class Execution:
    """How a rule is carried out.

    Attributes:
        backend: whose kernels.
        scratch: lends the memory of large intermediates; what is borrowed is given back by whoever called the rule.
    """

    backend: Backend = "eager"
    scratch: Scratch = FRESH


EAGER = Execution()
"""PyTorch's operators, in fresh memory."""
