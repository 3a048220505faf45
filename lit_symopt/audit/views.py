"""A block's matrices with its units as rows, whichever way they are stored.

Shape legend:  H query heads, K key and value heads, h head dimension, d residual width, I neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_symopt.audit.moves import Change
from lit_symopt.audit.sites import gates_heads
from lit_symopt.blocks import Block, Role
from lit_symopt.errors import TaxonomyError

# The side of the linear map on which a role's units lie; the other side is the residual stream.
OUTPUT_UNITS = (
    Role.QUERY,
    Role.KEY,
    Role.VALUE,
    Role.QKV,
    Role.GATE,
    Role.UP,
    Role.GATE_UP,
    Role.EXPERT_GATE_UP,
    Role.ROUTER,
    Role.LM_HEAD,
)
INPUT_UNITS = (Role.ATTENTION_OUT, Role.DOWN, Role.EXPERT_DOWN)
# Roles whose rule sees rows other than the units of the joint action: one matrix a head, as it is stored.
_TURNED = (Role.QUERY, Role.KEY, Role.VALUE, Role.QKV, Role.ATTENTION_OUT)


def read(block: Block, tensor: Tensor) -> list[Tensor]:
    """The matrices of a stored tensor as `[..., units, features]`.

    Raises:
        TaxonomyError: if the layout's rows are not the units of the block's role.
    """
    assert block.layout is not None
    matrices = block.layout.to_matrices(tensor)
    return [matrix.mT if turned else matrix for matrix, turned in zip(matrices, _turns(block), strict=True)]


def write(block: Block, matrices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """The tensor of that shape that `read` would read the matrices from."""
    assert block.layout is not None
    stored = [matrix.mT if turned else matrix for matrix, turned in zip(matrices, _turns(block), strict=True)]
    return block.layout.from_matrices(stored, shape)


def together(block: Block, change: Callable[[list[Tensor]], list[Tensor]]) -> Change:
    """`change`, which acts on all matrices `[..., units, features]` at once, as a map of the stored tensor."""
    return lambda tensor: write(block, change(read(block, tensor)), tensor.shape)


def units(block: Block, change: Change) -> Change:
    """`change`, which acts on each `[..., units, features]`, as a map of the stored tensor."""
    return together(block, lambda matrices: [change(matrix) for matrix in matrices])


def bias(block: Block, change: Callable[[list[Tensor]], list[Tensor]]) -> Change:
    """`change` as a map of the bias of a weight, which is stored as the weight's outputs are: one more feature."""
    assert block.layout is not None
    dim = -2 if block.layout.stored == "in_out" else -1

    def apply(vector: Tensor) -> Tensor:
        column = vector.unsqueeze(dim)
        return write(block, change(read(block, column)), column.shape).reshape(vector.shape)

    return apply


def sizes(block: Block) -> list[tuple[int, int]]:
    """Units and features of each part of a block.

    Raises:
        TaxonomyError: as `read`.
    """
    return [
        (part.n, part.m) if turned else (part.m, part.n)
        for part, turned in zip(block.parts, _turns(block), strict=True)
    ]


def _turns(block: Block) -> list[bool]:
    """For each part, whether its matrices have the units as columns."""
    if gates_heads(block):
        return [not rows for rows in _rows_are_outputs(block)]
    if block.role not in OUTPUT_UNITS + INPUT_UNITS:
        return [False] * len(block.parts)
    wrong = [rows != (block.role in OUTPUT_UNITS) for rows in _rows_are_outputs(block)]
    if any(wrong) and block.role not in _TURNED:
        side = "outputs" if block.role in OUTPUT_UNITS else "inputs"
        raise TaxonomyError(
            f"{block.name!r} {block.shape}: the units of role {block.role} are the {side} of the linear map, but the "
            f"rows that the layout {block.layout} gives are its {'inputs' if side == 'outputs' else 'outputs'}"
        )
    return wrong


def _rows_are_outputs(block: Block) -> list[bool]:
    """For each part, whether the rows of its matrices are outputs of the linear map."""
    assert block.layout is not None
    assert block.shape is not None
    found = []
    for part, matrix in zip(block.parts, block.layout.to_matrices(_stored_rows(block.shape)), strict=True):
        if part.m not in (part.fan_out, part.fan_in) or part.fan_out == part.fan_in or part.m == part.n:
            # The fans do not tell: follow the stored rows.
            corner = matrix[(0,) * (matrix.dim() - 2)]
            along = bool(corner[0, 0] != corner[1, 0]) if part.m > 1 else bool((corner[0] == corner[0, 0]).all())
            found.append(along == (block.layout.stored == "out_in"))
        else:
            found.append(part.m == part.fan_out)
    return found


def _stored_rows(shape: Sequence[int]) -> Tensor:
    """A view of the given shape whose entries are the number of their stored row; it takes no memory."""
    return torch.arange(shape[-2]).unsqueeze(-1).expand(*shape)
