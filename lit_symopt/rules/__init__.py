"""Rules: pure functions from the momentum [..., m, n] of a batch of matrices to their update, one rule a file."""

from lit_symopt.rules.centering import project
from lit_symopt.rules.momentum import ema_, nesterov_
from lit_symopt.rules.registry import RULES, get_rule
from lit_symopt.rules.rule import Rule, RuleFunction, Scale
from lit_symopt.rules.scale import scale_factor, validate_scale

__all__ = [
    "RULES",
    "Rule",
    "RuleFunction",
    "Scale",
    "ema_",
    "get_rule",
    "nesterov_",
    "project",
    "scale_factor",
    "validate_scale",
]
