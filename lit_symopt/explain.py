"""What a parameter gets and why, in words."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch

from lit_symopt.backends import chosen
from lit_symopt.errors import ConfigError
from lit_symopt.groups import layout_of
from lit_symopt.layout import Shape
from lit_symopt.linalg.polar import METHODS, method_for
from lit_symopt.rules import get_rule, scale_factor
from lit_symopt.rules.rows import POLAR
from lit_symopt.rules.scale import NUCLEAR
from lit_symopt.whole_step import part_by_backend

if TYPE_CHECKING:
    from lit_symopt.optim import SymOpt


def explain(optimizer: SymOpt, name: str) -> str:
    """The text behind `SymOpt.explain`."""
    known: dict[str, tuple[dict[str, Any], Shape]] = {
        parameter_name: (group, tuple(shape))
        for group in optimizer.param_groups
        for parameter_name, shape in zip(group["param_names"], group["shapes"], strict=True)
    }
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.0)
        raise ConfigError(f"no parameter is called {name!r}; the nearest are {', '.join(map(repr, near))}")
    group, shape = known[name]
    rule = get_rule(group["rule"])
    lines = [
        f"{name} {list(shape)}{_dtype(group)}",
        f"  role      {group['role']}" + (f", symmetry {group['symmetry']}" if group["symmetry"] else ""),
        f"  rule      {rule.name}: {rule.equation}{_damping(group)}; commutes with {rule.group}",
        f"  matrices  {_matrices(group, shape)}",
        f"  centered  {_centering(group)}",
        f"  momentum  {_momentum(group)}",
        *_polar(group, shape),
        f"  step      {_step(group, shape)}",
        f"  backend   {_backend(group, shape)}",
        f"  source    {rule.source}",
    ]
    return "\n".join(lines)


def _dtype(group: dict[str, Any]) -> str:
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in group["params"]}
    return f" {dtypes.pop()}" if len(dtypes) == 1 else ""


def _damping(group: dict[str, Any]) -> str:
    return f" with row damping {group['row_damping']:g}" if group["row_damping"] else ""


def _matrices(group: dict[str, Any], shape: Shape) -> str:
    layout = layout_of(group, shape)
    parts = ", ".join(f"{part.count} of {part.m} × {part.n}" for part in layout.parts(shape))
    return f"{parts} (units × features), stored as {layout}"


def _centering(group: dict[str, Any]) -> str:
    if group["centered"] and "z-loss" in group["symmetry"]:
        return "yes, as asked, although a z-loss sees the shift 1aᵀ"
    if group["centered"]:
        return "yes: the loss cannot see the shift 1aᵀ, so the update is projected off it"
    if "z-loss" in group["symmetry"]:
        return "no: a z-loss sees the shift 1aᵀ, and a centered update could not follow it"
    return (
        "no: the loss sees every direction"
        if "shift" not in group["symmetry"]
        else "no, although the loss is blind to it"
    )


def _momentum(group: dict[str, Any]) -> str:
    if group["rule"] == "adamw":
        return f"betas {group['betas']}, two numbers of state an element"
    if group["momentum"] == 0.0:
        return "none, no state"
    return f"{group['momentum_kind']} with β = {group['momentum']}, one number of state an element"


def _polar(group: dict[str, Any], shape: Shape) -> list[str]:
    """How the polar factor is found, if the rule takes one: by a method that depends on shape and device."""
    if group["rule"] not in POLAR:
        return []
    device = group["params"][0].device.type
    methods = {
        METHODS[method_for(group["precision"], dtype=_computed(group), device_type=device, side=min(part.m, part.n))]
        for part in layout_of(group, shape).parts(shape)
    }
    return [f"  polar     {', '.join(sorted(methods))} (precision {group['precision']})"]


def _computed(group: dict[str, Any]) -> torch.dtype:
    """Of momentum and update."""
    dtype: torch.dtype = group["params"][0].dtype
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _step(group: dict[str, Any], shape: Shape) -> str:
    lr, decay = group["lr"], group["weight_decay"]
    factors = [f"{lr:g}"]
    factors += [f"{group['radius']:g}"] if group["radius"] != 1.0 else []
    factors += [_scale(group, shape)] if group["scale"] != "none" else []
    kept = f"(1 − {lr:g}·{decay:g}) W" if decay else "W"
    return f"W ← {kept} − {' · '.join(factors)} · U"


def _backend(group: dict[str, Any], shape: Shape) -> str:
    backend = chosen(group["backend"])
    if backend == "eager":
        return backend
    part = part_by_backend(
        group,
        layout_of(group, shape),
        shape,
        dtype=_computed(group),
        device_type=group["params"][0].device.type,
    )
    if part is None:
        return (
            f"eager: {backend} has nothing to do for this rule in precision {group['precision']}, in this layout and "
            "on this device"
        )
    return f"{backend}, for " + ("the polar factor" if part == "polar" else "the whole step")


def _scale(group: dict[str, Any], shape: Shape) -> str:
    if group["scale"] in NUCLEAR:
        size = "⟨M, U⟩" if group["scale"] == "nuclear" else "‖D(M) M‖_*"
        return f"{size}^{1.0 if group['alpha'] is None else group['alpha']:g}"
    rule, numbers = get_rule(group["rule"]), []
    for part in layout_of(group, shape).parts(shape):
        matrix = torch.empty(part.m, part.n, device="meta")
        factor = scale_factor(
            group["scale"], rule=rule, momentum=matrix, update=matrix, fan_out=part.fan_out, fan_in=part.fan_in
        )
        numbers.append(f"{float(factor):.3g}")
    return f"{' or '.join(dict.fromkeys(numbers))} (scale {group['scale']})"
