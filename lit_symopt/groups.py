"""The vocabulary of a parameter group: its defaults, and what makes one invalid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch

from lit_symopt.backends import check_scratch, require_backend
from lit_symopt.blocks import shape_of
from lit_symopt.capture import require_capturable
from lit_symopt.errors import ConfigError
from lit_symopt.layout import Layout
from lit_symopt.linalg import Precision
from lit_symopt.rules import get_rule, validate_scale

DEFAULTS: dict[str, Any] = {
    "name": None,
    "role": "linear",
    "symmetry": "",
    "rule": None,
    "centered": False,
    "layout": None,
    "momentum": 0.95,
    "momentum_kind": "ema",
    "scale": "none",
    "alpha": None,
    "eps": 1e-8,
    "row_damping": 0.0,
    "precision": "auto",
    "radius": 1.0,
    "betas": (0.9, 0.95),
    "lr": 1e-3,
    "weight_decay": 0.0,
    "master_weights": True,
    "backend": "auto",
    "scratch": None,
    "capturable": False,
}

# What a checkpoint must share with the optimizer that loads it: these decide what the saved state means. The other
# keys are rates and the like, which a checkpoint brings along as with any torch optimizer.
MEANING = ("rule", "centered", "layout", "momentum_kind", "scale")


def validate_group(group: Mapping[str, Any]) -> None:
    """Check every key of a group, and its layout against its parameters.

    Raises:
        ConfigError: naming the group, the key, the value and what is allowed.
        TaxonomyError: if the layout does not fit a parameter.
    """
    where = f"group {group['name']!r}"
    unknown = sorted(set(group) - set(DEFAULTS) - {"params", "param_names", "shapes", "initial_lr"})
    if unknown:
        raise ConfigError(f"{where}: unknown key(s) {', '.join(map(repr, unknown))}; known: {', '.join(DEFAULTS)}")
    if group["rule"] is None:
        raise ConfigError(
            f"{where} has no rule. Give rule=... to the group or to SymOpt, or build the groups with SymOpt.for_module."
        )
    rule = get_rule(group["rule"])
    _range(where, "lr", group["lr"], low=0.0)
    _range(where, "weight_decay", group["weight_decay"], low=0.0)
    _range(where, "momentum", group["momentum"], low=0.0, below=1.0)
    _range(where, "eps", group["eps"], low=0.0)
    _range(where, "row_damping", group["row_damping"], low=0.0)
    _range(where, "radius", group["radius"], low=0.0)
    for beta in group["betas"]:
        _range(where, "betas", beta, low=0.0, below=1.0)
    _choice(where, "momentum_kind", group["momentum_kind"], ("ema", "nesterov"))
    _choice(where, "precision", group["precision"], get_args(Precision))
    validate_scale(group["scale"], rule=rule, alpha=group["alpha"])
    if group["row_damping"] and not rule.damped:
        raise ConfigError(
            f"{where}: row_damping={group['row_damping']} has no meaning for the rule {rule.name!r}, which divides "
            f"by no row norm; set row_damping=0 or use row_norm, row_then_spectral or spectral_then_row"
        )
    if group["layout"] is not None and not isinstance(group["layout"], Layout):
        raise ConfigError(f"{where}: layout={group['layout']!r} must be a Layout, such as Layout.matrix()")
    check_scratch(group["scratch"], f"{where}: ")
    for device in dict.fromkeys([torch.device("meta"), *(parameter.device for parameter in group["params"])]):
        require_backend(group["backend"], device, f"{where}: ")
    layouts = {}
    for parameter in group["params"]:
        if parameter.is_complex():
            raise ConfigError(
                f"{where}: complex parameters have no update here; view them as real (torch.view_as_real)"
            )
        layouts[parameter] = layout_of(group, shape_of(parameter))
        layouts[parameter].parts(shape_of(parameter))
    if not isinstance(group["capturable"], bool):
        raise ConfigError(f"{where}: capturable={group['capturable']!r} must be True or False")
    if group["capturable"]:
        require_capturable(group, layouts)


def layout_of(group: Mapping[str, Any], shape: Sequence[int]) -> Layout:
    """The group's layout; without one, a matrix is one matrix and any other tensor, for coordinate rules, a column.

    Raises:
        ConfigError: if a matrix rule meets a tensor that is not a matrix and no layout says what it holds.
    """
    if group["layout"] is not None:
        return group["layout"]  # type: ignore[no-any-return]
    if len(shape) == 2:
        return Layout.matrix()
    if get_rule(group["rule"]).kind != "coordinate":
        raise ConfigError(
            f"group {group['name']!r}: the rule {group['rule']!r} acts on matrices, and a parameter of shape "
            f"{tuple(shape)} is none. Say what it holds (Layout.experts(), Layout.flatten(), ...), "
            f"or use the rule 'adamw'."
        )
    return Layout.column()


def _range(where: str, key: str, value: Any, *, low: float, below: float | None = None) -> None:
    # `not >=` rather than `<`, so that NaN is refused too.
    if not float(value) >= low or (below is not None and not float(value) < below) or float(value) == float("inf"):
        limit = f"in [{low:g}, {below:g})" if below is not None else f"a finite number of at least {low:g}"
        raise ConfigError(f"{where}: {key}={value} must be {limit}")


def _choice(where: str, key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{where}: {key}={value!r} is unknown; known: {', '.join(map(repr, known))}")
