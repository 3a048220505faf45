"""How far the optimizer's updates are from commuting with the group of each block.

    error = ‖U(g G₁, ..., g G_k) - g U(G₁, ..., G_k)‖ / ‖U(G₁, ..., G_k)‖

U is what k steps of the real optimizer do to a block whose weights and gradients are transformed by g; the gradients
are real ones. g is a random element of the larger of two groups: that of the block's role, and that which its rule
claims for the matrices of its layout.

| role | units | features |
|---|---|---|
| embedding, head, router | permutations; O(m) for an uncentered spectral rule | O(n) |
| position | 1; O(m) for a spectral rule | O(n) |
| attention, linear, convolution | O(m) of each matrix | O(n) |
| MLP, experts | permutations; O(m) for a spectral rule | O(n) |
| vector | permutations | 1 |

A spectral rule divides by singular values, so that a rounding of G by ε moves U by about ε·κ, κ over the singular
values it keeps. Where κ is too large for the limit to be expected of any algorithm on fp32 gradients, the gradient is
replaced by the part of it that is well conditioned, and the row says so.

Shape legend:  m units, n features of one matrix, B batch dimensions that count matrices.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lit_symopt.audit.elements import DENSE_UP_TO, haar, permutation, rotation
from lit_symopt.audit.evaluate import Evaluator
from lit_symopt.audit.laboratory import Limits
from lit_symopt.audit.points import Values
from lit_symopt.audit.report import UpdateFinding
from lit_symopt.audit.sites import VOCABULARY_ROLES
from lit_symopt.audit.vocabulary import nested
from lit_symopt.blocks import Block, Role
from lit_symopt.config import SymOptConfig
from lit_symopt.layout import Layout
from lit_symopt.optim import SymOpt
from lit_symopt.rules import get_rule
from lit_symopt.stacks import settings_for

_ROTATED = (Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUT, Role.QKV, Role.LINEAR, Role.CONV)
KEPT = 1e-3
"""Singular values below this share of the largest are left out where the condition number asks for it."""

_ROUNDING = 5e-7
"""Error of an update per unit of condition number that `precision: fp32` promises to stay below."""

_DENSE_ENTRIES = 2**24
Element = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class _Measured:
    name: str
    role: str
    rule: str
    group: str
    error: float | None
    note: str


def commuting(
    evaluator: Evaluator,
    values: Values,
    blocks: Sequence[Block],
    config: SymOptConfig,
    *,
    limits: Limits,
    elements: int,
    seed: int,
) -> list[UpdateFinding]:
    """One row for equal blocks of all layers.

    Args:
        evaluator: computes the gradients.
        values: the weights.
        blocks: the trained blocks.
        config: what the optimizer does to them; its precision is replaced by fp32, its rates by one.
        limits: what counts as commuting.
        elements: group elements tried for each block.
        seed: of the elements.
    """
    gradients = _gradients(evaluator, values, blocks, seed)
    rows: dict[tuple[str, ...], list[_Measured]] = {}
    for number, block in enumerate(blocks):
        measured = _measure(
            block, values, gradients, config, limits, [seed + 7919 * number + e for e in range(elements)]
        )
        verdict = (
            "does not apply" if measured.error is None else "pass" if measured.error <= limits.commuting else "FAIL"
        )
        key = (re.sub(r"\d+", "#", block.name), measured.role, measured.rule, measured.group, verdict)
        rows.setdefault(key, []).append(measured)
    return [_row(of, verdict=key[-1], elements=elements) for key, of in rows.items()]


def _row(of: Sequence[_Measured], *, verdict: str, elements: int) -> UpdateFinding:
    worst = max(of, key=lambda measured: -1.0 if measured.error is None else measured.error)
    notes = list(dict.fromkeys(measured.note for measured in of if measured.note))
    return UpdateFinding(
        blocks=tuple(measured.name for measured in of),
        role=worst.role,
        rule=worst.rule,
        group=worst.group,
        tried=elements,
        error=worst.error,
        worst=worst.name,
        verdict=verdict,  # type: ignore[arg-type]
        reason="; ".join(notes[:2]),
    )


def _gradients(evaluator: Evaluator, values: Values, blocks: Sequence[Block], seed: int) -> list[dict[str, Tensor]]:
    """Gradients of the batch, and of the batch with other token ids where it has a vocabulary."""
    found = [evaluator.gradients(values)[1]]
    rows = {block.parts[0].m for block in blocks if block.role in VOCABULARY_ROLES}
    if any(block.role is not Role.LM_HEAD for block in blocks if block.role in VOCABULARY_ROLES):
        for number in range(2):
            labels = nested(sorted(rows), Generator().manual_seed(seed + number))
            found.append(evaluator.gradients(values, labels=labels)[1])
    return found


def _measure(
    block: Block,
    values: Values,
    gradients: Sequence[Mapping[str, Tensor]],
    config: SymOptConfig,
    limits: Limits,
    seeds: Sequence[int],
) -> _Measured:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said once, when the optimizer's groups were made
        chosen = settings_for(block, config)
    settings = {**chosen, "precision": "fp32", "backend": "eager", "lr": 1.0, "name": block.name}
    weight = values[block.name].float()
    given = [gradient[block.name].float() for gradient in gradients if block.name in gradient]
    layout: Layout = settings["layout"]
    shown = {"name": block.name, "role": str(block.role), "rule": settings["rule"], "group": _group(block, settings)[2]}
    if not any(bool(gradient.any()) for gradient in given):
        return _Measured(**shown, error=None, note="it gets no gradient from this batch")
    draws = [_element(block, settings, Generator().manual_seed(seed)) for seed in seeds]
    error = max(_distance(weight, given, settings, element) for element in draws)
    note = ""
    if error > limits.commuting and get_rule(settings["rule"]).kind == "spectral":
        condition = _condition(given, layout, settings)
        if _ROUNDING * condition > limits.commuting:
            part = _well_conditioned(given[0], layout, settings)
            error = max(_distance(weight, [part, 0.5 * part, part], settings, element) for element in draws)
            note = f"condition number {condition:.0e}: measured on singular values above {KEPT:g} of the largest"
    return _Measured(**shown, error=error, note=note)


def _distance(weight: Tensor, gradients: Sequence[Tensor], settings: Mapping[str, Any], element: Element) -> float:
    plain = element(_moved(weight, gradients, settings).double())
    turned = _moved(element(weight.double()).float(), [element(g.double()).float() for g in gradients], settings)
    size = float(plain.norm())
    difference = float((turned.double() - plain).norm())
    return difference / size if size > 0 else difference


def _moved(weight: Tensor, gradients: Sequence[Tensor], settings: Mapping[str, Any]) -> Tensor:
    """What the steps of a real optimizer add to a weight."""
    parameter = nn.Parameter(weight.clone())
    optimizer = SymOpt([{**settings, "params": [parameter]}])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach() - weight


def _group(block: Block, settings: Mapping[str, Any]) -> tuple[str, str, str]:
    """What acts on units and on features, and how it is written."""
    if block.role is Role.VECTOR:
        return "S", "1", "S_m"
    rule = get_rule(settings["rule"])
    rotates = rule.group.startswith("O(m)") and not settings["centered"]
    if block.role in _ROTATED or rotates:
        return "O", "O", "O(m) × O(n)"
    if block.role is Role.POSITION:
        return "1", "O", "1 × O(n)"
    return "S", "O", "S_m × O(n)"


def _element(block: Block, settings: Mapping[str, Any], generator: Generator) -> Element:
    """A random element as a map of the stored tensor."""
    layout, shape = settings["layout"], block.shape
    assert shape is not None
    left, right, _ = _group(block, settings)
    if block.role is Role.VECTOR:
        order = permutation(torch.Size(shape).numel(), generator)
        return lambda x: x.flatten()[order.to(x.device)].view(x.shape)
    maps = [
        (_side(left, part.m, part.batch, generator), _side(right, part.n, part.batch, generator))
        for part in layout.parts(shape)
    ]

    def apply(x: Tensor) -> Tensor:
        matrices = [rows(columns(m).mT).mT for (rows, columns), m in zip(maps, layout.to_matrices(x), strict=True)]
        turned: Tensor = layout.from_matrices(matrices, shape)
        return turned.contiguous()

    return apply


def _side(kind: str, size: int, batch: Sequence[int], generator: Generator) -> Element:
    """A map of the last dimension of `[*batch, other, size]`, another one for each matrix unless that is too large."""
    count = torch.Size(batch).numel()
    if kind == "1":
        return torch.clone
    if kind == "S":
        orders = torch.stack([permutation(size, generator) for _ in range(count)]).view(*batch, 1, size)
        return lambda x: x.gather(-1, orders.to(x.device).expand(x.shape))
    if size <= DENSE_UP_TO and count * size * size <= _DENSE_ENTRIES:
        q = haar(size, generator, batch=batch)
        return lambda x: x @ q.mT.to(x.device)
    return rotation(size, generator)


def _condition(gradients: Sequence[Tensor], layout: Layout, settings: Mapping[str, Any]) -> float:
    """The largest condition number over kept singular values, of the matrices of any gradient."""
    worst = 1.0
    for gradient in [*gradients, torch.stack(list(gradients)).sum(0)]:
        for matrix in layout.to_matrices(gradient.double()):
            sigma = torch.linalg.svdvals(_seen(matrix, settings))
            kept = torch.where(sigma >= 3e-6 * sigma[..., :1], sigma, torch.inf).amin(-1)
            worst = max(worst, float((sigma[..., 0] / kept).max()))
    return worst


def _well_conditioned(gradient: Tensor, layout: Layout, settings: Mapping[str, Any]) -> Tensor:
    """The gradient without the singular directions below `KEPT` of the largest."""
    parts = []
    for matrix in layout.to_matrices(gradient.double()):
        u, sigma, vh = torch.linalg.svd(_seen(matrix, settings), full_matrices=False)
        parts.append((u * torch.where(sigma >= KEPT * sigma[..., :1], sigma, 0).unsqueeze(-2)) @ vh)
    return layout.from_matrices(parts, gradient.shape).float().contiguous()


def _seen(matrix: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """What the polar factor is taken of."""
    if settings["centered"]:
        matrix = matrix - matrix.mean(-2, keepdim=True)
    if settings["rule"] == "row_then_spectral":
        matrix = nn.functional.normalize(matrix, dim=-1, eps=1e-30)
    return matrix
