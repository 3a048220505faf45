"""The heads of one attention, however its projections are stored.

Shape legend:  H query heads, K key and value heads, h size of a head, d features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_symopt.audit.moves import Change, Edit
from lit_symopt.audit.sites import Site, Vector
from lit_symopt.audit.views import bias, sizes, together, units
from lit_symopt.blocks import HEADS, Block, Role
from lit_symopt.errors import TaxonomyError

Part = Literal["q", "k", "v", "o"]
Maps = Mapping[Part, Change]

_SEPARATE: dict[Role, Part] = {Role.QUERY: "q", Role.KEY: "k", Role.VALUE: "v", Role.ATTENTION_OUT: "o"}
_GAINS: dict[str, Part] = {str(Role.QUERY): "q", str(Role.KEY): "k", str(Role.VALUE): "v"}


class Heads:
    """Queries, keys, values and outputs of a site as `[heads, h, d]` each.

    Attributes:
        counts: heads of each part.
        widths: size of one head of each part.
        whole_keys: false where only a part of each key is a parameter of its own (latent attention).

    Raises:
        TaxonomyError: naming two blocks whose heads do not fit each other.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self.counts: dict[Part, int] = {}
        self.widths: dict[Part, int] = {}
        self.owners: dict[Part, Block] = {}
        self.whole_keys = True
        for block in site.blocks:
            for part, (count, width) in _heads(block).items():
                if part in self.owners:
                    raise TaxonomyError(f"{self.owners[part].name!r} and {block.name!r} both hold the {_NAMES[part]}")
                self.owners[part], self.counts[part], self.widths[part] = block, count, width
            self.whole_keys &= not _latent(block)
        self._same(self.counts, "k", "v", "heads")
        self._same(self.counts, "q", "o", "heads")
        self._same(self.widths, "v", "o", "dimensions a head")
        if self.whole_keys:
            self._same(self.widths, "q", "k", "dimensions a head")
        if self.queries % self.keys:
            raise TaxonomyError(f"{self._said('o')}, which the heads of {self._said('v')} do not divide")

    @property
    def queries(self) -> int:
        """H."""
        return self.counts["o"]

    @property
    def keys(self) -> int:
        """K."""
        return self.counts["v"]

    def gains(self, *parts: Part) -> list[Vector]:
        """The vectors along these parts that are not biases of their projections."""
        return [
            vector for vector in self.site.vectors if vector.weight is None and _GAINS.get(vector.along or "") in parts
        ]

    def edits(self, maps: Maps) -> dict[str, Edit]:
        """What each weight and bias becomes when each part is mapped; gains and sinks are left alone."""
        edits = {}
        for block in self.site.blocks:
            if maps.keys() & _heads(block).keys():
                edits[block.name] = Edit(source=block.name, change=together(block, _Mapped(block, maps)))
        for vector in self.site.vectors:
            weight = vector.weight
            if weight is None or weight.role is Role.ATTENTION_OUT or weight in self.site.gates:
                continue
            if maps.keys() & _heads(weight).keys():
                edits[vector.block.name] = Edit(source=vector.block.name, change=bias(weight, _Mapped(weight, maps)))
        return edits

    def reordered(self, orders: Mapping[Part, Tensor]) -> dict[str, Edit]:
        """What everything becomes when heads change places: new head i is old head `order[i]`."""

        def along(part: Part, size: int) -> Change:
            order = orders[part]
            return lambda x: x.unflatten(-1, (len(order), size))[..., order.to(x.device), :].flatten(-2)

        edits = self.edits({part: _taken(order) for part, order in orders.items()})
        for vector in self.site.vectors:
            name, entries = vector.block.name, vector.block.shape or ()
            if vector.weight in self.site.gates:
                continue
            if vector.along == HEADS:
                if entries[-1:] != (self.queries,):
                    raise TaxonomyError(f"{name!r} {entries} lies along the heads, and {self._said('o')}")
                edits[name] = Edit(source=name, change=along("q", 1))
            elif vector.weight is None and (part := _GAINS.get(vector.along or "")) in orders and part is not None:
                width = self.widths[part]
                if entries == (self.counts[part] * width,) and self.counts[part] > 1:
                    edits[name] = Edit(source=name, change=along(part, width))
                elif entries != (width,):
                    raise TaxonomyError(f"{name!r} {entries} lies along the {_NAMES[part]}, and {self._said(part)}")
        return edits | self._gates(orders["q"])

    def _gates(self, order: Tensor) -> dict[str, Edit]:
        """What linear maps with rows for each query head become, and their biases."""
        edits = {}
        for gate in self.site.gates:
            shapes = sizes(gate)
            if len(shapes) != 1 or shapes[0][0] * gate.parts[0].count % self.queries:
                raise TaxonomyError(
                    f"{gate.name!r} {gate.shape} as {gate.layout} lies along the heads and has no equal number of rows "
                    f"for each, and {self._said('o')}"
                )
            edits[gate.name] = Edit(source=gate.name, change=units(gate, _rows_taken(order)))
            moved = bias(gate, lambda matrices: [_rows_taken(order)(matrix) for matrix in matrices])
            for vector in (vector for vector in self.site.vectors if vector.weight == gate):
                edits[vector.block.name] = Edit(source=vector.block.name, change=moved)
        return edits

    def _same(self, numbers: Mapping[Part, int], one: Part, other: Part, what: str) -> None:
        if one in numbers and other in numbers and numbers[one] != numbers[other]:
            raise TaxonomyError(f"{self._said(one)}, but {self._said(other)}: their {what} must be equal")

    def _said(self, part: Part) -> str:
        block = self.owners[part]
        return (
            f"{block.name!r} {block.shape} as {block.layout} has {self.counts[part]} heads of {self.widths[part]} "
            f"{_NAMES[part]}"
        )


_NAMES: dict[Part, str] = {"q": "queries", "k": "keys", "v": "values", "o": "outputs"}


class _Mapped:
    """Acts on the parts that the matrices of a block hold."""

    def __init__(self, block: Block, maps: Maps) -> None:
        self.block, self.maps = block, maps

    def __call__(self, matrices: list[Tensor]) -> list[Tensor]:
        block = self.block
        if _latent(block):
            for offset, part in ((0, "k"), (1, "v")):
                if part in self.maps:
                    matrices[offset::2] = list(self.maps[part](torch.stack(matrices[offset::2])).unbind())  # type: ignore[index]
            return matrices
        (matrix,) = matrices
        if block.role is not Role.QKV:
            change = self.maps[_SEPARATE[block.role]]
            return [change(matrix) if matrix.dim() == 3 else change(matrix.unsqueeze(0)).squeeze(0)]
        moved = matrix.clone()
        for part, index in _members(block).items():
            if part in self.maps:
                moved[index] = self.maps[part](matrix[index])
        return [moved]


def _taken(order: Tensor) -> Change:
    return lambda x: x[order.to(x.device)]


def _rows_taken(order: Tensor) -> Change:
    """x `[..., d]` whose rows are equally many for each head, in their order → the rows of head `order[i]`."""
    return lambda x: x.reshape(len(order), -1, x.shape[-1])[order.to(x.device)].reshape(x.shape)


def _heads(block: Block) -> dict[Part, tuple[int, int]]:
    """Number and size of the heads of each part that a block holds."""
    shapes = sizes(block)
    if _latent(block):
        return {"k": (len(shapes) // 2, shapes[0][0]), "v": (len(shapes) // 2, shapes[1][0])}
    if len(shapes) != 1 or len(block.parts[0].batch) > 1:
        raise TaxonomyError(
            f"{block.name!r} {block.shape}: the layout {block.layout} does not hold one matrix a head, as role "
            f"{block.role} needs it"
        )
    count, width = block.parts[0].count, shapes[0][0]
    if block.role is not Role.QKV:
        return {_SEPARATE[block.role]: (count, width)}
    return {part: (len(index), width) for part, index in _members(block).items()}


def _latent(block: Block) -> bool:
    """Whether a block holds a piece of the key and the value of each head by turns."""
    if block.role is not Role.QKV or len(block.parts) < 2 or len(block.parts) % 2:
        return False
    shapes = sizes(block)
    return shapes[0::2] == shapes[:1] * (len(shapes) // 2) and shapes[1::2] == shapes[1:2] * (len(shapes) // 2)


def _members(block: Block) -> dict[Part, Tensor]:
    """The places of queries, keys and values among the heads of a fused projection, in the order of the heads."""
    layout = block.layout
    q, kv, order = (getattr(layout, name, None) for name in ("q", "kv", "order"))
    if q is None or kv is None:
        raise TaxonomyError(
            f"{block.name!r}: role qkv needs Layout.qkv(...), or Layout.split with a key and a value piece for each "
            f"head, not {layout}"
        )
    if order == "stacked":
        places: Sequence[Tensor] = torch.arange(q + 2 * kv).split([q, kv, kv])
    else:
        grouped = torch.arange(q + 2 * kv).view(kv, q // kv + 2)
        places = [grouped[:, :-2].flatten(), grouped[:, -2], grouped[:, -1]]
    return dict(zip(("q", "k", "v"), places, strict=True))
