"""Opponents that are used from a checkout, given as `--checkout NAME=PATH`; nothing of them is part of this package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from lit_symopt.bench.opponents import Opponent, Optimizers

REPOSITORIES = {
    "dion": "https://github.com/microsoft/dion",
    "emerging_optimizers": "https://github.com/NVIDIA-NeMo/Emerging-Optimizers",
    "paper": "https://github.com/timlautk/equivariant_optimizers",
}
MODULES = {"dion": "dion", "emerging_optimizers": "emerging_optimizers", "paper": "optim"}
"""What is imported from each."""

Build = Callable[[list[nn.Parameter], list[nn.Parameter], float], "Optimizers"]


def from_checkouts(paths: dict[str, Path]) -> list[Opponent]:
    """The opponents of all known repositories; those without a path say how to get one.

    Args:
        paths: by name.

    Raises:
        ConfigError: for a name that is none of them, or a path without what is imported.
    """
    from lit_symopt.bench.opponents import Opponent, aspect
    from lit_symopt.errors import ConfigError

    for name, path in paths.items():
        if name not in REPOSITORIES:
            raise ConfigError(f"--checkout {name}={path}: known are {', '.join(REPOSITORIES)}")
        if not (path / MODULES[name] / "__init__.py").is_file():
            raise ConfigError(
                f"--checkout {name}={path}: there is no package {MODULES[name]!r} in it; clone {REPOSITORIES[name]} "
                "and give its folder"
            )

    def made(name: str, about: str, build: Callable[[Any], Build], *, stacks: bool, **options: Any) -> Opponent:
        def with_module(matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float) -> Optimizers:
            return build(_imported(paths[name], MODULES[name]))(matrices, others, lr)

        opponent = Opponent(name=name, about=about, build=with_module, stacks=stacks, package=None, **options)
        if name in paths:
            return opponent
        get = f"git clone {REPOSITORIES[name]} {name}, and give --checkout {name}={name}"
        return replace(opponent, package=f"not_given_{name}", get=get)

    return [
        made(
            "dion",
            "Muon of microsoft/dion (Polar Express, compiled), with its own AdamW",
            _dion,
            stacks=True,
            scale=aspect,
        ),
        made(
            "emerging_optimizers",
            "Muon of NVIDIA-NeMo/Emerging-Optimizers (quintic), experts cut; torch.optim.AdamW(fused=True)",
            _emerging,
            stacks=False,
        ),
        made(
            "paper",
            "MuonHeadsPolarExpress and BatchedExpertMuonPolarExpress of the paper's code (compiled); torch.optim.AdamW",
            _paper,
            stacks=True,
        ),
    ]


def row_norm_of_the_paper(path: Path) -> Build:
    """The paper's momentum row norm, on all parameters."""
    optim = _imported(path, MODULES["paper"])
    return lambda matrices, others, lr: [optim.RowNormM([*matrices, *others], lr=lr, beta=0.95, weight_decay=0.1)]


def _dion(dion: Any) -> Build:
    from lit_symopt.bench.opponents import DECAY, MOMENTUM

    def build(matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float) -> Optimizers:
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "algorithm": "adamw"}]
        options = {"nesterov": True, "mu": MOMENTUM, "weight_decay": DECAY}
        return [dion.Muon([group for group in groups if group["params"]], lr=lr, **options)]

    return build


def _emerging(package: Any) -> Build:
    from lit_symopt.bench.opponents import DECAY, MOMENTUM, adamw

    muon = import_module(f"{package.__name__}.orthogonalized_optimizers").Muon

    def build(matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float) -> Optimizers:
        options = {
            "nesterov": True,
            "scale_mode": "shape_scaling",
            "use_syrk": matrices[0].is_cuda if matrices else False,
        }
        return [muon(matrices, lr=lr, momentum=MOMENTUM, weight_decay=DECAY, **options), *adamw(others, lr)]

    return build


def _paper(optim: Any) -> Build:
    from lit_symopt.bench.opponents import DECAY, MOMENTUM, adamw

    def build(matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float) -> Optimizers:
        options = {"lr": lr, "momentum": MOMENTUM, "weight_decay": DECAY, "nesterov": True}
        flat, stacks = ([matrix for matrix in matrices if matrix.ndim == ndim] for ndim in (2, 3))
        made = [optim.MuonHeadsPolarExpress(flat, **options)] if flat else []
        made += [optim.BatchedExpertMuonPolarExpress(stacks, **options)] if stacks else []
        return [*made, *adamw(others, lr)]

    return build


def _imported(path: Path, module: str) -> Any:
    """A package of a checkout, which need not be installed."""
    place = str(path.resolve())
    sys.path.insert(0, place)
    try:
        return import_module(module)
    finally:
        sys.path.remove(place)
