"""What can be measured: whole steps, and three questions of their own.

| `--case` | question | against |
|---|---|---|
| `step` | what does a step cost on these shapes? | `--against` |
| `products` | what does a spectral step cost besides its matrix products? | the same products alone |
| `row_norm` | what does a row norm of a 50,304 × 512 embedding cost? | fused AdamW, a copy of its bytes, the paper's |
| `launches` | do launches grow with the number of layers? | the same with 4 and with 16 layers |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from lit_symopt.backends import check_backend
from lit_symopt.bench.contest import Contestant, short
from lit_symopt.bench.counting import launches
from lit_symopt.bench.opponents import Opponent, adamw, opponents
from lit_symopt.bench.ours import PREFIX, as_contestant, symopt
from lit_symopt.bench.products import products_of, replay
from lit_symopt.bench.shapes import ShapeList, shape_list, shape_of_block
from lit_symopt.bench.tensors import Numbers, as_module, is_hidden
from lit_symopt.blocks import Block, Role
from lit_symopt.config import RoleConfig
from lit_symopt.errors import ConfigError

EMBEDDING = (50_304, 512)
LAYERS = (4, 16)
LAUNCHES_MAY_GROW = 0.1


@dataclass(frozen=True, kw_only=True)
class Case:
    """Contestants over the same shapes.

    Attributes:
        contestants: ours first.
        shapes: what they update.
        absent: opponents that are not here, with what to do about it.
        note: what the table should be read with.
    """

    contestants: list[Contestant]
    shapes: ShapeList
    absent: dict[str, str]
    note: str = ""


def steps(
    shapes: ShapeList,
    numbers: Numbers,
    *,
    stack: str,
    against: Sequence[str],
    checkouts: dict[str, Path],
    **options: Any,
) -> Case:
    """Whole steps, ours first.

    Args:
        shapes, numbers: what everybody updates.
        stack: ours.
        against: opponents by name.
        checkouts: paths of those that have one.
        options: precision, backend and scratch of ours, as of `symopt`.

    Raises:
        ConfigError: for an unknown stack, precision, backend or opponent.
    """
    known, absent = opponents(checkouts), {}
    for name in against:
        _refuse_unknown(name, known)
    ours = as_contestant(symopt(shapes, numbers, stack=stack, **options), name=PREFIX + stack)
    found = [ours]
    for name in against:
        if name == ours.name:
            continue
        if name.startswith(PREFIX):
            found.append(as_contestant(symopt(shapes, numbers, **{**options, **named(name)}), name=name))
            continue
        if (missing := known[name].missing()) is not None:
            absent[name] = missing
            continue
        try:
            found.append(known[name].contestant(shapes, numbers))
        except Exception as error:  # noqa: BLE001  an opponent may fail in any way, and the others go on
            absent[name] = short(error)
    return Case(contestants=found, shapes=shapes, absent=absent)


def bare_products(shapes: ShapeList, numbers: Numbers, *, stack: str, **options: Any) -> Case:
    """The step on hidden matrices alone, and its products without the step.

    Raises:
        ConfigError: if the stack has no products there.
    """
    hidden = shapes.only(is_hidden, name=f"hidden matrices of {shapes.name}")
    optimizer = symopt(hidden, numbers, stack=stack, **options)
    # Kernels of a backend are no calls of torch.bmm, and may take fewer operations: what torch needs is the measure.
    watched = symopt(hidden, numbers, stack=stack, **{**options, "backend": "eager"})
    found = products_of(watched.step)
    if not found:
        raise ConfigError(f"--case products: the stack {stack} multiplies no matrices; use muon or symmetric")
    ours = as_contestant(optimizer, name=PREFIX + stack)
    kind = found[0][0][2]
    alone = Contestant(
        name="products alone",
        step=replay(found, numbers.device),
        about=f"{len(found)} calls of torch.bmm on ready buffers, the products of an eager step",
        products=kind,
    )
    return Case(
        contestants=[ours, alone],
        shapes=hidden,
        absent={},
        note="Aim: the step takes at most 1.3 times its products.",
    )


def row_norm(numbers: Numbers, *, checkouts: dict[str, Path], **options: Any) -> Case:
    """A row norm of an embedding, with the check for numbers that are not finite: that of `symmetric` and simpler ones.

    Args:
        numbers: what everybody updates.
        checkouts: paths by name; that of the paper is used.
        options: backend and scratch of ours, as of `symopt`.
    """
    embedding = Block("embedding.weight", role=Role.EMBEDDING, shape=EMBEDDING)
    shapes = ShapeList(name="embedding_50304x512", blocks=(embedding,))
    plain = RoleConfig(row_damping=0.0, momentum=0.95, momentum_kind="ema")
    kinds = {
        "row_norm": ("of the stack symmetric: Nesterov's momentum, damped", RoleConfig()),
        "row_norm, row_damping=0": ("without damping", RoleConfig(row_damping=0.0)),
        "row_norm, plain": ("without damping, momentum a mean, as the paper's", plain),
    }
    contestants = [
        as_contestant(
            symopt(shapes, numbers, stack="symmetric", roles={"embedding": role}, **options), name=name, about=about
        )
        for name, (about, role) in kinds.items()
    ]
    parameters = list(as_module(shapes, numbers).parameters())
    (fused,) = adamw(parameters, numbers.lr)
    bytes_ = 7.0 * prod(EMBEDDING) * numbers.dtype.itemsize
    contestants.append(
        Contestant(name="adamw_fused", step=fused.step, about="torch.optim.AdamW(fused=True)", least_bytes=bytes_)
    )
    contestants.append(_copy(contestants[0].least_bytes, numbers.device))
    absent = {}
    if "paper" in checkouts:
        from lit_symopt.bench.checkouts import row_norm_of_the_paper

        others = list(as_module(shapes, numbers).parameters())
        (optimizer,) = row_norm_of_the_paper(checkouts["paper"])([], others, numbers.lr)
        bytes_ = contestants[0].least_bytes
        contestants.append(Contestant(name="paper", step=optimizer.step, about="RowNormM", least_bytes=bytes_))
    else:
        absent["paper"] = opponents()["paper"].missing() or ""
    note = (
        "Aims: at most 1.15 times fused AdamW, 1.5 times the copy; 3.5 times as fast as the paper's. The copy moves as "
        "many bytes as the row norm must: gradient read, momentum and weight read and written."
    )
    return Case(contestants=contestants, shapes=shapes, absent=absent, note=note)


def count_launches(
    shapes: str, numbers: Numbers, *, stack: str, layers: Sequence[int] = LAYERS, **options: Any
) -> dict[int, int]:
    """Launches of a step by number of layers.

    On a CPU products in bfloat16 are done in pieces that fit its cache, and their number grows with the bytes of all
    matrices; with `scratch` in the options a piece is as large as that allows.

    Raises:
        ConfigError: for a list without layers.
    """
    found = {}
    for number in layers:
        optimizer = symopt(shape_list(shapes, layers=number), numbers, stack=stack, **options)
        optimizer.step()
        found[number] = launches(optimizer.step, numbers.device)
    return found


def _copy(bytes_: float, device: torch.device) -> Contestant:
    """Reads half of the bytes and writes half."""
    source = torch.ones(int(bytes_ / 8), dtype=torch.float32, device=device)
    target = source.clone()
    return Contestant(
        name="copy of as many bytes", step=lambda: target.copy_(source), about="torch.Tensor.copy_", least_bytes=bytes_
    )


def _refuse_unknown(name: str, known: dict[str, Opponent]) -> None:
    from lit_symopt.stacks import get_stack

    if name.startswith(PREFIX):
        get_stack(named(name)["stack"])
        check_backend(named(name).get("backend", "auto"), f"--against {name}: ")
    elif name not in known:
        raise ConfigError(f"--against {name}: unknown; known: {', '.join(known)}, {PREFIX}<stack>[@<backend>]")


def named(name: str) -> dict[str, str]:
    """Stack, and backend if it is not that of the others, of one of ours.

    >>> named("symopt:muon"), named("symopt:muon@eager")
    ({'stack': 'muon'}, {'stack': 'muon', 'backend': 'eager'})
    """
    stack, at, backend = name.removeprefix(PREFIX).partition("@")
    return {"stack": stack, "backend": backend} if at else {"stack": stack}


def described(shapes: ShapeList) -> dict[str, Any]:
    """What a list comes to, for a record."""
    kinds: dict[str, int] = {}
    for block in shapes.blocks:
        key = f"{block.role} {'×'.join(map(str, shape_of_block(block)))}"
        kinds[key] = kinds.get(key, 0) + 1
    return {"name": shapes.name, "layers": shapes.layers, "elements": shapes.elements, "parameters": kinds}
