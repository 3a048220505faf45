"""The plan: who computes the update of what, and what has to move for that. A pure function of shapes and boundaries.

A block is cut into *cells*, the contiguous pieces of storage on which its layout acts alone: an expert, a head, the
gate half. Every cell takes the route that moves the fewest bytes while computing what one device would compute:

| route | what moves | for |
|---|---|---|
| `local` | nothing | cells that lie whole on a rank; coordinate rules |
| `owner` | the cell to one of its holders, the update back | everything else |
| `rows` | sums over rows: a few scalars, one row for each centering; rows cut in two | row rules on row shards |
| `gram` | a Gram matrix n × n, half of it, in float64, and what `rows` moves | polar factors of row shards, n ≤ m |

Copies (DDP, FSDP2's Replicate) share the work: a polar factor is computed by one rank and sent to the others.

Units: bytes are counted where they are sent, work in multiply-adds m·n·min(m, n) for a polar factor, m·n otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import prod
from typing import Any

import torch

from lit_symopt.layout import Layout, Shape
from lit_symopt.linalg.polar import method_for
from lit_symopt.rules import get_rule
from lit_symopt.rules.rows import POLAR, payload
from lit_symopt.sharding.holdings import Placement

OPTIONS = ("rule", "centered", "scale", "alpha", "eps", "row_damping", "precision", "backend", "scratch")
"""What decides an update besides layout and shape: these keys of a group."""

SHARE_FROM = 256
"""Smaller side from which copies of a matrix share a polar factor in bf16 or fp16.

Five steps of Polar Express take about 30·m·n·side operations and sending the update 4·m·n bytes: at 4e14 operations and
1e11 to 4e11 bytes a second (an H100 with InfiniBand or NVLink) the two are level at a side of 130 to 530. An estimate
from data sheets, not a measurement.
"""

_ROWS_CONTIGUOUS = (Layout.matrix(), Layout.matrix(stored="in_out"), Layout.column(), Layout.flatten())


class Route(Enum):
    """How a cell gets its update; the table of the module says what each moves."""

    LOCAL = "local"
    OWNER = "owner"
    ROWS = "rows"
    GRAM = "gram"


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block as the plan sees it.

    Attributes:
        placement: shape, and who holds what.
        role: for the report.
        layout: how the block holds its matrices.
        options: the values of `OPTIONS`, in that order.
        dtype: of the arithmetic and of what is sent.
    """

    placement: Placement
    role: str
    layout: Layout
    options: tuple[Any, ...]
    dtype: torch.dtype = torch.float32

    def named_options(self) -> dict[str, Any]:
        """The options by name."""
        return dict(zip(OPTIONS, self.options, strict=True))


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Elements `[start, stop)` of a cell, held by `rank`."""

    rank: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Elements `[start, stop)` of a cell that `source` sends to `target`."""

    source: int
    target: int
    start: int
    stop: int

    def back(self) -> Fragment:
        """The same elements on their way back."""
        return replace(self, source=self.target, target=self.source)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A piece of a block that is updated alone.

    Attributes:
        block: full parameter name.
        role: of the block.
        start: of the cell in the flattened block.
        shape: of the cell.
        layout: how the cell holds its matrices.
        held: the non-empty stretches, by rank.
        owner: the rank that computes it, on the route `owner`.
        rows: on the routes `rows` and `gram`: by rank `[first, last)`, the rows it computes.
        fragments: on the same routes: what is lent for that.
    """

    block: str
    role: str
    start: int
    shape: Shape
    layout: Layout
    held: tuple[Stretch, ...]
    owner: int = -1
    rows: tuple[tuple[int, int], ...] = ()
    fragments: tuple[Fragment, ...] = ()

    @property
    def numel(self) -> int:
        """Elements of the cell."""
        return prod(self.shape)

    def lent(self) -> list[Fragment]:
        """On the route `owner`: what the owner needs from others, each element from the nearest that has it."""
        own = next(stretch for stretch in self.held if stretch.rank == self.owner)
        if len(own) == self.numel:
            return []
        nearest: dict[tuple[int, int], int] = {}
        for stretch in sorted(self.held, key=lambda stretch: (abs(stretch.rank - self.owner), stretch.rank)):
            nearest.setdefault((stretch.start, stretch.stop), stretch.rank)
        return [
            Fragment(source=rank, target=self.owner, start=start, stop=stop)
            for (start, stop), rank in sorted(nearest.items())
            if rank != self.owner
        ]

    def returned(self) -> list[Fragment]:
        """On the route `owner`: what the others get back."""
        return [
            Fragment(source=self.owner, target=stretch.rank, start=stretch.start, stop=stretch.stop)
            for stretch in self.held
            if stretch.rank != self.owner
        ]


@dataclass(frozen=True, kw_only=True)
class Round:
    """Equal cells that take the same route: computed as one batch, moved in one exchange.

    Attributes:
        route: how.
        options, layout, shape, dim, dtype: what the cells share.
        cells: in the same order on every rank.
    """

    route: Route
    options: tuple[Any, ...]
    layout: Layout
    shape: Shape
    dim: int
    dtype: torch.dtype
    cells: tuple[Cell, ...]

    def named_options(self) -> dict[str, Any]:
        """The options by name."""
        return dict(zip(OPTIONS, self.options, strict=True))

    def reduced_bytes(self) -> int:
        """Bytes of the sums over ranks for one cell, as given to `all_reduce`."""
        if self.route not in (Route.ROWS, Route.GRAM):
            return 0
        return _reduced_bytes(self.named_options(), self.layout, self.shape, self.dtype)

    def sent(self, world: int) -> dict[str, list[int]]:
        """Bytes that each rank sends, by role. An `all_reduce` of b bytes counts as the ring's 2 b (W − 1)/W a rank."""
        traffic: dict[str, list[int]] = {}
        size, reduced = self.dtype.itemsize, 2 * self.reduced_bytes() * (world - 1) / world
        for cell in self.cells:
            by_rank = traffic.setdefault(cell.role, [0] * world)
            moved = [*cell.lent(), *cell.returned()] if self.route is Route.OWNER else []
            for fragment in moved:
                by_rank[fragment.source] += (fragment.stop - fragment.start) * size
            for fragment in cell.fragments:  # there and back
                by_rank[fragment.source] += (fragment.stop - fragment.start) * size
                by_rank[fragment.target] += (fragment.stop - fragment.start) * size
            for rank in range(world):
                by_rank[rank] += round(reduced)
        return traffic


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every rank does in one step, and what it costs.

    Attributes:
        world: number of ranks.
        rounds: in the order in which all ranks run them.
    """

    world: int
    rounds: tuple[Round, ...]

    def without(self, blocks: Collection[str]) -> Plan:
        """The same less some blocks of which nothing moves (route `local`)."""
        kept = [
            replace(one, cells=tuple(cell for cell in one.cells if cell.block not in blocks)) for one in self.rounds
        ]
        return replace(self, rounds=tuple(one for one in kept if one.cells))

    def sent(self) -> dict[str, list[int]]:
        """Bytes that each rank sends in one step, by role."""
        total: dict[str, list[int]] = {}
        for one in self.rounds:
            for role, by_rank in one.sent(self.world).items():
                known = total.setdefault(role, [0] * self.world)
                total[role] = [a + b for a, b in zip(known, by_rank, strict=True)]
        return total

    def work(self) -> list[int]:
        """Multiply-adds of each rank in one step."""
        loads = [0] * self.world
        for one in self.rounds:
            for cell in one.cells:
                cost = _cost(one.named_options(), cell)
                if one.route is Route.OWNER:
                    loads[cell.owner] += cost
                elif one.route is Route.LOCAL:
                    for stretch in cell.held:
                        loads[stretch.rank] += cost * len(stretch) // max(cell.numel, 1)
                else:
                    for rank, (first, last) in enumerate(cell.rows):
                        loads[rank] += cost * (last - first) // max(cell.shape[0], 1)
        return loads


def make_plan(
    blocks: Iterable[Block], *, world: int, device_type: str = "cpu", carried: Sequence[int] | None = None
) -> Plan:
    """The plan of one call of `step()`.

    Args:
        blocks: what is updated, in the same order on every rank.
        world: number of ranks.
        device_type: where updates are computed; it decides how `precision: auto` finds polar factors.
        carried: work of each rank in the other calls of the same training step: among ranks that are level in this
            call and hold equally much of a matrix, the one with the least gets it.

    Example:
        >>> from lit_symopt.sharding.holdings import Placement
        >>> halves = Placement(name="w", shape=(4, 6), held=((0, 12), (12, 24)))
        >>> spectral = ("spectral", False, "none", None, 1e-8, 0.0, "auto", "auto", None)
        >>> block = Block(placement=halves, role="linear", layout=Layout.matrix(), options=spectral)
        >>> plan = make_plan([block], world=2)
        >>> [(one.route.value, cell.owner) for one in plan.rounds for cell in one.cells]
        [('owner', 0)]
        >>> plan.sent()  # rank 1 lends its half, 48 bytes, and rank 0 sends as much back
        {'linear': [48, 48]}
    """
    rounds: dict[Hashable, tuple[dict[str, Any], list[Cell]]] = {}
    blocks = list(blocks)
    coarse = _coarse(blocks, world)
    for block in blocks:
        for piece in _cells(block, world, whole=block.placement.name in coarse):
            route, cell = _route(block, piece, world, device_type)
            shared: dict[str, Any] = {
                "route": route,
                "options": block.options,
                "layout": cell.layout,
                "shape": cell.shape,
                "dim": block.placement.dim,
                "dtype": block.dtype,
            }
            rounds.setdefault(tuple(shared.values()), (shared, []))[1].append(cell)
    everything = [(shared, cell) for shared, cells in rounds.values() for cell in cells]
    owned = _owners(everything, world, carried or [0] * world)
    finished = []
    for shared, cells in rounds.values():
        finished.append(Round(**shared, cells=tuple(owned.get((cell.block, cell.start), cell) for cell in cells)))
    return Plan(world=world, rounds=tuple(finished))


def _cells(block: Block, world: int, *, whole: bool) -> list[Cell]:
    """The cells of a block with the stretches of each."""
    placement = block.placement
    # Where another dimension comes first in storage, or parts would only be cut small, the block is one cell.
    pieces = ((block.layout, placement.shape),) if whole or placement.dim else block.layout.cells(placement.shape)
    cells, start = [], 0
    for layout, shape in pieces:
        stop = start + prod(shape)
        held = []
        for rank, (first, last) in enumerate(placement.held):
            low, high = max(first, start), min(last, stop)
            if low < high:
                held.append(Stretch(rank=rank, start=low - start, stop=high - start))
        cells.append(
            Cell(block=placement.name, role=block.role, start=start, shape=shape, layout=layout, held=tuple(held))
        )
        start = stop
    return [cell for cell in cells if cell.held]


def _coarse(blocks: Sequence[Block], world: int) -> set[str]:
    """The replicated blocks that are small enough to be given to one rank as a whole: fewer pieces to move."""
    copies = [block for block in blocks if all(held == (0, block.placement.numel) for held in block.placement.held)]
    costs = {
        block.placement.name: sum(_cost(block.named_options(), cell) for cell in _cells(block, world, whole=True))
        for block in copies
    }
    share = sum(costs.values()) / (4 * world)
    return {name for name, cost in costs.items() if cost <= share}


def _route(block: Block, cell: Cell, world: int, device_type: str) -> tuple[Route, Cell]:
    """The cheapest route of a cell; on routes by rows, with the rows of each rank."""
    options = block.named_options()
    rule = get_rule(options["rule"])
    everywhere = all(len(stretch) == cell.numel for stretch in cell.held)
    if rule.kind == "coordinate" and not options["centered"]:
        return Route.LOCAL, cell
    if everywhere and (len(cell.held) == 1 or not _pays_to_share(block, cell, device_type)):
        return Route.LOCAL, cell
    if everywhere or block.placement.dim or cell.layout not in _ROWS_CONTIGUOUS:
        return Route.OWNER, cell
    (part,) = cell.layout.parts(cell.shape)
    by_rows = Route.ROWS
    if options["rule"] in POLAR:
        by_rows = Route.GRAM
        method = method_for(options["precision"], dtype=block.dtype, device_type=device_type, side=min(part.m, part.n))
        # A Gram matrix gives the same numbers only where one device would form it too.
        if part.n > part.m or method not in ("eigh", "iteration"):
            return Route.OWNER, cell
    rows = _rows(cell, m=part.m, n=part.n, world=world)
    if rows is None:
        return Route.OWNER, cell
    moved = 2 * sum(fragment.stop - fragment.start for fragment in rows.fragments) * block.dtype.itemsize
    moved += 2 * (world - 1) * _reduced_bytes(options, cell.layout, cell.shape, block.dtype)
    largest = max(len(stretch) for stretch in cell.held)
    copies = sum(len(stretch) for stretch in cell.held) - cell.numel
    whole = (2 * (cell.numel - largest) + copies) * block.dtype.itemsize
    return (by_rows, rows) if moved < whole else (Route.OWNER, cell)


def _pays_to_share(block: Block, cell: Cell, device_type: str) -> bool:
    """Whether copies of a cell are better computed by one rank and sent than by all."""
    options = block.named_options()
    if options["rule"] not in POLAR:
        return False
    for part in cell.layout.parts(cell.shape):
        side = min(part.m, part.n)
        method = method_for(options["precision"], dtype=block.dtype, device_type=device_type, side=side)
        if method not in ("bf16", "fp16") or side >= SHARE_FROM:
            return True
    return False


def _rows(cell: Cell, *, m: int, n: int, world: int) -> Cell | None:
    """The cell with whole rows for every rank: a row that a boundary cuts goes to the holder of its largest part.

    `None` if copies of a stretch exist together with cut rows, which no strategy makes.
    """
    distinct = {(stretch.start, stretch.stop) for stretch in cell.held}
    if len(distinct) < len(cell.held):
        if any(edge % n for stretch in distinct for edge in stretch):
            return None
        by_rank = {stretch.rank: (stretch.start // n, stretch.stop // n) for stretch in cell.held}
        return _with_rows(cell, by_rank, (), world)
    pieces: dict[int, list[Stretch]] = {}  # of every row that is cut
    for stretch in cell.held:
        for row in {stretch.start // n, (stretch.stop - 1) // n}:
            low, high = max(stretch.start, row * n), min(stretch.stop, (row + 1) * n)
            if high - low < n:
                pieces.setdefault(row, []).append(Stretch(rank=stretch.rank, start=low, stop=high))
    fragments, keeper = [], {}
    for row, parts in sorted(pieces.items()):
        keeper[row] = max(parts, key=lambda part: (len(part), -part.rank)).rank
        fragments += [
            Fragment(source=part.rank, target=keeper[row], start=part.start, stop=part.stop)
            for part in parts
            if part.rank != keeper[row]
        ]
    by_rank = {}
    for stretch in cell.held:
        first, last = stretch.start // n, -(-stretch.stop // n)
        while first < last and keeper.get(first, stretch.rank) != stretch.rank:
            first += 1
        while last > first and keeper.get(last - 1, stretch.rank) != stretch.rank:
            last -= 1
        by_rank[stretch.rank] = (first, last)
    return _with_rows(cell, by_rank, tuple(fragments), world)


def _with_rows(cell: Cell, by_rank: Mapping[int, tuple[int, int]], fragments: tuple[Fragment, ...], world: int) -> Cell:
    rows = tuple(by_rank.get(rank, (0, 0)) for rank in range(world))
    return replace(cell, rows=rows, fragments=fragments)


def _reduced_bytes(options: Mapping[str, Any], layout: Layout, shape: Shape, dtype: torch.dtype) -> int:
    (part,) = layout.parts(shape)
    return payload(
        options["rule"],
        n=part.n,
        centered=options["centered"],
        scale=options["scale"],
        row_damping=options["row_damping"],
        dtype=dtype,
        precision=options["precision"],
    )


def _cost(options: Mapping[str, Any], cell: Cell) -> int:
    """Multiply-adds of a cell's update, up to a constant."""
    parts = cell.layout.parts(cell.shape)
    if options["rule"] in POLAR:
        return sum(part.count * part.m * part.n * min(part.m, part.n) for part in parts)
    return sum(part.count * part.m * part.n for part in parts)


def _owners(
    cells: Sequence[tuple[Mapping[str, Any], Cell]], world: int, carried: Sequence[int]
) -> dict[tuple[str, int], Cell]:
    """Owners for the cells of the route `owner`: the costliest first, each to its holder with the least work so far."""
    loads = [0] * world
    waiting: list[tuple[int, Cell]] = []
    for shared, cell in cells:
        cost = _cost(dict(zip(OPTIONS, shared["options"], strict=True)), cell)
        if shared["route"] is Route.OWNER:
            waiting.append((cost, cell))
        elif shared["route"] is Route.LOCAL:
            for stretch in cell.held:
                loads[stretch.rank] += cost * len(stretch) // max(cell.numel, 1)
    owned = {}
    for cost, cell in sorted(waiting, key=lambda pair: -pair[0]):  # stable: equal on every rank
        owner = min(cell.held, key=lambda held: (loads[held.rank], -len(held), carried[held.rank], held.rank)).rank
        loads[owner] += cost
        owned[cell.block, cell.start] = replace(cell, owner=owner)
    return owned
