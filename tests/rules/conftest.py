"""Every rule that is a function of the momentum, by name."""

from __future__ import annotations

import pytest

from lit_symopt.rules import RULES, Rule

FUNCTIONS = [name for name in RULES if name != "adamw"]
MATRIX_RULES = [name for name in FUNCTIONS if name not in ("sgd", "sign")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`rule` runs over all functions, `matrix_rule` over those that are neither `sgd` nor `sign`."""
    for argument, names in (("rule", FUNCTIONS), ("matrix_rule", MATRIX_RULES)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, [RULES[name] for name in names], ids=names)


@pytest.fixture
def matrix_rules() -> list[Rule]:
    """All matrix rules at once."""
    return [RULES[name] for name in MATRIX_RULES]
