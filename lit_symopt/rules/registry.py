"""The rules by name."""

from __future__ import annotations

from lit_symopt.errors import ConfigError
from lit_symopt.rules import (
    adamw,
    left_spectral,
    right_spectral,
    row_norm,
    row_then_spectral,
    sgd,
    sign,
    spectral,
    spectral_then_row,
)
from lit_symopt.rules.rule import Rule

RULES: dict[str, Rule] = {
    module.RULE.name: module.RULE
    for module in (
        spectral,
        right_spectral,
        left_spectral,
        row_norm,
        row_then_spectral,
        spectral_then_row,
        sgd,
        sign,
        adamw,
    )
}


def get_rule(name: str) -> Rule:
    """The rule called `name`.

    Raises `ConfigError` for an unknown name, listing the known ones.

    >>> get_rule("row_norm").group
    'S_m × O(n)'
    """
    if name not in RULES:
        raise ConfigError(f"rule {name!r} is not known; choose one of {', '.join(RULES)}")
    return RULES[name]
