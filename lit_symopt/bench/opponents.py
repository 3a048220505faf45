"""Who can be put against us: other optimizers, each built over the same shapes by a few lines of its own.

| `--against` | what runs |
|---|---|
| `adamw` | `torch.optim.AdamW(foreach=True)` on everything |
| `adamw_fused` | `torch.optim.AdamW(fused=True)` on everything |
| `torch_muon` | `torch.optim.Muon`, which takes 2-D parameters only: stacks of experts are cut |
| `deepspeed_muon` | DeepSpeed's `SingleDeviceMuonWithAuxAdam`: its own Muon and Adam, without ZeRO |
| `pytorch_optimizer_muon` | `pytorch_optimizer.Muon`, which would flatten a stack: stacks are cut; its own AdamW |
| `gram_newton_schulz` | the `Muon` of the package `gram-newton-schulz` |
| `dion` | `Muon` of a checkout of microsoft/dion, with its own AdamW |
| `emerging_optimizers` | `Muon` of a checkout of NVIDIA-NeMo/Emerging-Optimizers: stacks are cut |
| `paper` | Muon with Polar Express of a checkout of the paper's code (arXiv:2605.18106) |
| `symopt:<stack>` | one of our own |

Where nothing else is said, stacks of experts stay one parameter, and what is no hidden matrix gets torch's fused AdamW.
All have momentum 0.95, Nesterov's where it is theirs to choose, five iterations and a decoupled decay of 0.1; what else
they can choose is as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_symopt.bench.contest import Contestant
from lit_symopt.bench.shapes import ShapeList
from lit_symopt.bench.tensors import Numbers, as_module, cut

MOMENTUM, DECAY, STEPS = 0.95, 0.1, 5

Optimizers = list[Any]
"""What is stepped one after another."""


@dataclass(frozen=True, kw_only=True)
class Opponent:
    """An optimizer that is not ours.

    Attributes:
        name: on the command line.
        about: what runs.
        build: its optimizers over hidden matrices and all other parameters.
        stacks: whether it takes experts as a stack; `None`: it has no matrices, and gets the parameters as they are.
        package: module that must be there; `None` for a checkout.
        get: the command that gets it.
        products: dtype of its matrix products, by type of device.
        iterations: of its orthogonalization.
        scale: factor of a step by `(fan_out, fan_in)`, beside its rate.
    """

    name: str
    about: str
    build: Callable[[list[nn.Parameter], list[nn.Parameter], float], Optimizers]
    stacks: bool | None
    package: str | None = "torch"
    get: str = ""
    products: Callable[[str], torch.dtype | None] = lambda device: torch.bfloat16
    iterations: int | None = STEPS
    scale: Callable[[int, int], float] = lambda rows, columns: sqrt(max(1.0, rows / columns))

    def missing(self) -> str | None:
        """What to do about it, if it is not installed."""
        if self.package is not None and find_spec(self.package) is None:
            return f"not installed; get it with: {self.get}"
        return None

    def contestant(self, shapes: ShapeList, numbers: Numbers) -> Contestant:
        """Itself, over the shapes."""
        if self.stacks is None:
            matrices: list[nn.Parameter] = []
            others = list(as_module(shapes, numbers).parameters())
        else:
            pieces = cut(shapes, numbers, stacks=self.stacks)
            matrices, others = pieces.matrices, pieces.others
        optimizers = self.build(matrices, others, numbers.lr)

        def step() -> None:
            for optimizer in optimizers:
                optimizer.step()

        return Contestant(
            name=self.name,
            step=step,
            about=self.about,
            iterations=self.iterations if matrices else None,
            least_bytes=least_bytes(matrices, states=1) + least_bytes(others, states=2),
            products=self.products(numbers.device.type) if matrices else None,
        )


def least_bytes(parameters: Iterable[nn.Parameter], *, states: int) -> float:
    """Gradient read, states and weight read and written, all in the dtype of the parameter."""
    return float(sum(p.numel() * p.element_size() * (1 + 2 * states + 2) for p in parameters))


def aspect(rows: int, columns: int) -> float:
    """The factor of a step that takes 1 → RMS: √(fan_out/fan_in)."""
    return sqrt(rows / columns)


def adamw(parameters: list[nn.Parameter], lr: float, *, fused: bool = True) -> Optimizers:
    """torch's AdamW, if there is anything to update."""
    if not parameters:
        return []
    kind = {"fused": True} if fused else {"foreach": True}
    return [torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=DECAY, **kind)]


def _torch_muon(matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float) -> Optimizers:
    muon = [torch.optim.Muon(matrices, lr=lr, weight_decay=DECAY, momentum=MOMENTUM)] if matrices else []
    return [*muon, *adamw(others, lr)]


def _deepspeed(matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float) -> Optimizers:
    from deepspeed.runtime.zero.muon.original_muon import SingleDeviceMuonWithAuxAdam

    for matrix in matrices:
        if matrix.ndim == 3:
            matrix.is_expert_group = True  # type: ignore[attr-defined]  # how it is told that a stack is one
    groups = [
        {"params": matrices, "use_muon": True, "lr": lr, "momentum": MOMENTUM, "weight_decay": DECAY},
        {"params": others, "use_muon": False, "lr": lr, "weight_decay": DECAY},
    ]
    return [SingleDeviceMuonWithAuxAdam([group for group in groups if group["params"]])]


def _pytorch_optimizer(matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float) -> Optimizers:
    muon = import_module("pytorch_optimizer").Muon

    groups = [
        {"params": matrices, "use_muon": True, "lr": lr, "weight_decay": DECAY},
        {"params": others, "use_muon": False, "lr": lr, "weight_decay": DECAY, "betas": (0.9, 0.95)},
    ]
    return [muon([group for group in groups if group["params"]], momentum=MOMENTUM, ns_steps=STEPS)]


def _gram_newton_schulz(matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float) -> Optimizers:
    kind = import_module("gram_newton_schulz").Muon

    options = {"weight_decay": DECAY, "momentum": MOMENTUM, "adjust_lr": "spectral_norm"}
    kernels = matrices and matrices[0].is_cuda  # its own are for Hopper and newer
    restarts = [2]  # of the paper of the package, which else looks for one at every start
    muon = kind(
        matrices, lr=lr, ns_use_kernels=bool(kernels), gram_newton_schulz_restart_iterations=restarts, **options
    )
    return [muon, *adamw(others, lr)]


def opponents(checkouts: dict[str, Path] | None = None) -> dict[str, Opponent]:
    """Everybody by name.

    Args:
        checkouts: paths by name, of those that are used from one.
    """
    from lit_symopt.bench.checkouts import from_checkouts

    installed = (
        Opponent(
            name="adamw",
            about="torch.optim.AdamW(foreach=True) on everything",
            build=lambda matrices, others, lr: adamw(others, lr, fused=False),
            stacks=None,
            iterations=None,
        ),
        Opponent(
            name="adamw_fused",
            about="torch.optim.AdamW(fused=True) on everything",
            build=lambda matrices, others, lr: adamw(others, lr),
            stacks=None,
            iterations=None,
        ),
        Opponent(
            name="torch_muon",
            about="torch.optim.Muon; stacks of experts cut into 2-D parameters, which is all it takes; fused AdamW",
            build=_torch_muon,
            stacks=False,
            package="torch.optim._muon",
            get="pip install 'torch>=2.9'",
        ),
        Opponent(
            name="deepspeed_muon",
            about="DeepSpeed's SingleDeviceMuonWithAuxAdam (ns_method gram, compiled; Adam one by one)",
            build=_deepspeed,
            stacks=True,
            package="deepspeed",
            get="pip install 'lit-symopt[deepspeed]'",
            products=lambda device: torch.float16 if device == "cuda" else torch.float32,
        ),
        Opponent(
            name="pytorch_optimizer_muon",
            about="pytorch_optimizer.Muon (foreach), experts cut into 2-D parameters, which it would flatten",
            build=_pytorch_optimizer,
            stacks=False,
            package="pytorch_optimizer",
            get="pip install pytorch_optimizer",
        ),
        Opponent(
            name="gram_newton_schulz",
            about="gram_newton_schulz.Muon; torch.optim.AdamW(fused=True)",
            build=_gram_newton_schulz,
            stacks=True,
            package="gram_newton_schulz",
            get="pip install gram-newton-schulz --no-build-isolation",
            products=lambda device: torch.float16,
            scale=aspect,
        ),
    )
    return {opponent.name: opponent for opponent in (*installed, *from_checkouts(checkouts or {}))}
