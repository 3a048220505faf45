"""The registry: DESIGN's table by name."""

from __future__ import annotations

import pytest
import torch

from lit_symopt.errors import ConfigError
from lit_symopt.rules import RULES, get_rule

NAMES = (
    "spectral", "right_spectral", "left_spectral", "row_norm", "row_then_spectral", "spectral_then_row",
    "sgd", "sign", "adamw",
)  # fmt: skip


def test_the_registry_holds_the_rules_under_their_own_names() -> None:
    assert tuple(RULES) == NAMES
    assert all(get_rule(name).name == name for name in NAMES)


def test_an_unknown_rule_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"rule 'muon' is not known; choose one of spectral, .*, adamw"):
        get_rule("muon")


def test_every_rule_says_its_equation_group_and_source() -> None:
    for rule in RULES.values():
        assert rule.equation
        assert rule.group
        assert rule.source


def test_adamw_is_not_a_function_of_the_momentum() -> None:
    with pytest.raises(ConfigError, match="rule 'adamw' is not a function of the momentum"):
        get_rule("adamw").function(torch.ones(2, 2))
