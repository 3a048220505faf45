"""Running a plan: from each rank's stretches of the directions to its stretches of the updates.

Every route is straight-line code with a `yield` where it waits for the network. The rounds are advanced in turn, so
that one round is computed while the next one's matrices arrive and the last one's updates leave; all ranks advance
them in the same order, and therefore make the same collectives in the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from lit_symopt.linalg.execution import Execution
from lit_symopt.pieces import piece_size
from lit_symopt.ranges import Subject, phase
from lit_symopt.rules import get_rule
from lit_symopt.rules.rows import RowShards
from lit_symopt.scratch import FRESH, Scratch
from lit_symopt.sharding.holdings import Segment
from lit_symopt.sharding.plan import Cell, Fragment, Plan, Round, Route, Stretch
from lit_symopt.sharding.transport import Pending, Transport
from lit_symopt.update import direction_to_update, matrices_to_update

Flats = Mapping[str, Tensor]
"""This rank's stretch of each block: 1-D, in the order of the flattened block."""


class Exchange:
    """A plan made ready to be run on this rank, many times.

    Args:
        plan: the same on every rank.
        transport: of the process group the plan is for.
        segments: which stretch of each block this rank holds; only start and stop are used.
        scratch: lends the memory of intermediates.
    """

    def __init__(
        self, plan: Plan, transport: Transport, segments: Mapping[str, Segment], *, scratch: Scratch = FRESH
    ) -> None:
        kinds: dict[Route, Callable[..., _Batch]] = {
            Route.LOCAL: _Local,
            Route.OWNER: _Owner,
            Route.ROWS: _Rows,
            Route.GRAM: _Rows,
        }
        rounds = [kinds[one.route](one, transport, segments, scratch) for one in plan.rounds]
        # One exchange is under way before anything is computed.
        moving = [one for one in rounds if isinstance(one, _Owner)]
        rest = [one for one in rounds if not isinstance(one, _Owner)]
        self._rounds = [*moving[:1], *rest, *moving[1:]]

    def run(self, directions: Flats, updates: Flats) -> None:
        """Fill `updates` with scale · rule(direction), both stretches of this rank, as tensors of the same sizes."""
        _advance(one.run(directions, updates) for one in self._rounds)


def _advance(tasks: Iterable[Iterator[None]]) -> None:
    """Run tasks, each up to its next `yield` whenever another one begins."""
    running: list[Iterator[None]] = []
    for task in tasks:
        started = [task] if next(task, _DONE) is not _DONE else []
        # The younger first: it computes while the older one's result is on its way.
        running = [*started, *(other for other in running if next(other, _DONE) is not _DONE)]
    while running:
        running = [other for other in running if next(other, _DONE) is not _DONE]


_DONE = object()


@dataclass(frozen=True)
class _View:
    """A stretch of a block, found in the tensor of this rank's stretch."""

    block: str
    start: int
    stop: int

    def of(self, flats: Flats) -> Tensor:
        return flats[self.block][self.start : self.stop]


class _Batch(ABC):
    """What the routes have in common."""

    at_once: int
    """How many whole cells are updated at a time, on the routes that have any."""

    def __init__(self, one: Round, transport: Transport, segments: Mapping[str, Segment], scratch: Scratch) -> None:
        self.round, self.transport, self.segments, self.scratch = one, transport, segments, scratch
        self.rank, self.device = transport.rank, transport.device
        self.options = one.named_options()
        self.how = Execution(backend=self.options["backend"], scratch=scratch)
        self.of = _subject(one)

    @abstractmethod
    def run(self, directions: Flats, updates: Flats) -> Iterator[None]:
        """Fill this rank's updates; yields where it waits for others."""

    def view(self, cell: Cell, start: int, stop: int) -> _View:
        """Where elements `[start, stop)` of a cell lie on this rank."""
        first = cell.start - self.segments[cell.block].start
        return _View(cell.block, first + start, first + stop)

    def update_of(self, flat: Tensor) -> Tensor:
        """Updates `[K, numel]` of whole cells `[K, numel]`, as many at a time as the scratch memory holds."""
        shape, dim, layout = self.round.shape, self.round.dim, self.round.layout
        stored = (shape[dim], *shape[:dim], *shape[dim + 1 :])
        updates = torch.empty_like(flat)
        for piece, updated in zip(flat.split(self.at_once), updates.split(self.at_once), strict=True):
            direction = piece.view(len(piece), *stored).movedim(1, dim + 1)
            with self.scratch.lend():
                update = direction_to_update(
                    direction, group=self.options, layout=layout, shape=shape, of=self.of, how=self.how
                )
                updated.view(len(piece), *stored).copy_(update.movedim(dim + 1, 1))
        return updates


class _Local(_Batch):
    """Cells that lie whole on this rank; for coordinate rules, what lies here of them."""

    def __init__(self, one: Round, transport: Transport, segments: Mapping[str, Segment], scratch: Scratch) -> None:
        super().__init__(one, transport, segments, scratch)
        self.coordinate = get_rule(self.options["rule"]).kind == "coordinate" and not self.options["centered"]
        if not self.coordinate:
            self.at_once = _at_once(one, transport)
        self.views: list[_View] = []
        for cell in one.cells:
            for stretch in cell.held:
                if stretch.rank == self.rank:
                    self._append(self.view(cell, stretch.start, stretch.stop))

    def _append(self, view: _View) -> None:
        """Adds a view, to the last one where it continues that: fewer and longer pieces."""
        if self.views and (last := self.views[-1]).block == view.block and last.stop == view.start:
            self.views[-1] = _View(view.block, last.start, view.stop)
        else:
            self.views.append(view)

    def run(self, directions: Flats, updates: Flats) -> Iterator[None]:
        if self.views:
            with phase(self.of, "pack"):
                flat = _joined([view.of(directions) for view in self.views], self.device)
            if self.coordinate:
                # One factor for all: such scales depend on the fans alone, which the parts of a cell share.
                part = self.round.layout.parts(self.round.shape)[0]
                update = matrices_to_update(
                    flat.view(1, -1), options=self.options, fan_out=part.fan_out, fan_in=part.fan_in, of=self.of
                )
            else:
                update = self.update_of(flat.view(-1, prod(self.round.shape)))
            with phase(self.of, "pack"):
                _deal(update.reshape(-1), [view.of(updates) for view in self.views])
        yield from ()  # nothing to wait for


class _Parcels:
    """What is sent in one exchange, in the order of the cells for each pair of ranks."""

    def __init__(self, moved: Sequence[tuple[Cell, Fragment]], transport: Transport, of: Subject) -> None:
        self.transport, self.of = transport, of
        self.any = bool(moved)  # on some rank, so that all take part
        rank = transport.rank
        self.outgoing = sorted((pair for pair in moved if pair[1].source == rank), key=lambda pair: pair[1].target)
        self.incoming = sorted((pair for pair in moved if pair[1].target == rank), key=lambda pair: pair[1].source)
        self.sizes_out = [0] * transport.world
        self.sizes_in = [0] * transport.world
        for _, fragment in self.outgoing:
            self.sizes_out[fragment.target] += fragment.stop - fragment.start
        for _, fragment in self.incoming:
            self.sizes_in[fragment.source] += fragment.stop - fragment.start

    def send(self, pieces: Sequence[Tensor], dtype: torch.dtype) -> Pending:
        """Starts sending the pieces of `outgoing`."""
        with phase(self.of, "pack"):
            flat = torch.cat(list(pieces)) if pieces else torch.empty(0, dtype=dtype)
        with phase(self.of, "communication"):
            return self.transport.all_to_all(flat, sizes_out=self.sizes_out, sizes_in=self.sizes_in)

    def receive(self, pending: Pending) -> Tensor:
        """What was sent to this rank."""
        with phase(self.of, "communication"):
            return pending.wait()


class _Owner(_Batch):
    """Cells that travel whole: lent to their owner, computed there, returned."""

    def __init__(self, one: Round, transport: Transport, segments: Mapping[str, Segment], scratch: Scratch) -> None:
        super().__init__(one, transport, segments, scratch)
        self.at_once = _at_once(one, transport)
        self.numel = prod(one.shape)
        self.mine = [cell for cell in one.cells if cell.owner == self.rank]
        place = {id(cell): index * self.numel for index, cell in enumerate(self.mine)}
        self.lend = _Parcels([(cell, fragment) for cell in one.cells for fragment in cell.lent()], transport, self.of)
        self.give = _Parcels(
            [(cell, fragment) for cell in one.cells for fragment in cell.returned()], transport, self.of
        )
        self.lent = [self.view(cell, fragment.start, fragment.stop) for cell, fragment in self.lend.outgoing]
        self.taken = [self.view(cell, fragment.start, fragment.stop) for cell, fragment in self.give.incoming]
        self.arriving = [_within(place[id(cell)], fragment) for cell, fragment in self.lend.incoming]
        self.leaving = [_within(place[id(cell)], fragment) for cell, fragment in self.give.outgoing]
        own = [(cell, stretch) for cell in self.mine for stretch in cell.held if stretch.rank == self.rank]
        self.own = [self.view(cell, stretch.start, stretch.stop) for cell, stretch in own]
        self.own_places = [_within(place[id(cell)], stretch) for cell, stretch in own]

    def run(self, directions: Flats, updates: Flats) -> Iterator[None]:
        arriving = None
        if self.lend.any:
            arriving = self.lend.send([view.of(directions) for view in self.lent], self.round.dtype)
            yield
        update = torch.empty(len(self.mine) * self.numel, dtype=self.round.dtype, device=self.device)
        received = update[:0] if arriving is None else self.lend.receive(arriving)
        if self.mine:
            with phase(self.of, "pack"):
                stack = torch.empty_like(update)
                _copy([stack[where] for where in self.own_places], [view.of(directions) for view in self.own])
                _deal(received, [stack[where] for where in self.arriving])
            update = self.update_of(stack.view(len(self.mine), self.numel)).reshape(-1)
            with phase(self.of, "pack"):
                _copy([view.of(updates) for view in self.own], [update[where] for where in self.own_places])
        if self.give.any:
            returning = self.give.send([update[where] for where in self.leaving], self.round.dtype)
            yield
            received = self.give.receive(returning)
            with phase(self.of, "pack"):
                _deal(received, [view.of(updates) for view in self.taken])


class _Rows(_Batch):
    """Row shards: every rank computes its own rows, and sums over rows are added up."""

    def __init__(self, one: Round, transport: Transport, segments: Mapping[str, Segment], scratch: Scratch) -> None:
        super().__init__(one, transport, segments, scratch)
        (self.part,) = one.layout.parts(one.shape)
        n, counts = self.part.n, [cell.rows[self.rank][1] - cell.rows[self.rank][0] for cell in one.cells]
        most = max(1, *counts)
        self.size = (len(one.cells), most, n)
        self.valid = None
        if min(counts) < most:
            rows = torch.arange(most, device=self.device)
            self.valid = (rows[None, :] < torch.tensor(counts, device=self.device)[:, None])[..., None]
        # A copy of a stretch that another rank has too is computed here again, but added up only once.
        self.is_copy = any(_is_copy(cell, self.rank) for cell in one.cells)
        # Where a cell would begin in the stack, if its first rows were there too.
        place = {id(cell): (index * most - cell.rows[self.rank][0]) * n for index, cell in enumerate(one.cells)}
        fragments = [(cell, fragment) for cell in one.cells for fragment in cell.fragments]
        self.lend = _Parcels(fragments, transport, self.of)
        self.give = _Parcels([(cell, fragment.back()) for cell, fragment in fragments], transport, self.of)
        self.lent = [self.view(cell, fragment.start, fragment.stop) for cell, fragment in self.lend.outgoing]
        self.taken = [self.view(cell, fragment.start, fragment.stop) for cell, fragment in self.give.incoming]
        self.arriving = [_within(place[id(cell)], fragment) for cell, fragment in self.lend.incoming]
        self.leaving = [_within(place[id(cell)], fragment) for cell, fragment in self.give.outgoing]
        own = [(cell, stretch) for cell in one.cells for stretch in _own_rows(cell, self.rank, n)]
        self.own = [self.view(cell, stretch.start, stretch.stop) for cell, stretch in own]
        self.own_places = [_within(place[id(cell)], stretch) for cell, stretch in own]

    def run(self, directions: Flats, updates: Flats) -> Iterator[None]:
        with phase(self.of, "pack"):
            stack = torch.zeros(prod(self.size), dtype=self.round.dtype, device=self.device)
            _copy([stack[where] for where in self.own_places], [view.of(directions) for view in self.own])
        if self.lend.any:
            arriving = self.lend.send([view.of(directions) for view in self.lent], self.round.dtype)
            yield
            received = self.lend.receive(arriving)
            with phase(self.of, "pack"):
                _deal(received, [stack[where] for where in self.arriving])
        update = matrices_to_update(
            stack.view(self.size),
            options=self.options,
            fan_out=self.part.fan_out,
            fan_in=self.part.fan_in,
            rows=RowShards(count=self.part.m, valid=self.valid, all_reduce=self._all_reduce),
            of=self.of,
        ).reshape(-1)
        with phase(self.of, "pack"):
            _copy([view.of(updates) for view in self.own], [update[where] for where in self.own_places])
        if self.give.any:
            returning = self.give.send([update[where] for where in self.leaving], self.round.dtype)
            yield
            received = self.give.receive(returning)
            with phase(self.of, "pack"):
                _deal(received, [view.of(updates) for view in self.taken])

    def _all_reduce(self, x: Tensor, op: Literal["sum", "max"]) -> Tensor:
        with phase(self.of, "communication"):
            return self.transport.all_reduce(torch.zeros_like(x) if self.is_copy else x, op)


def _at_once(one: Round, transport: Transport) -> int:
    """How many cells the scratch memory holds: asked on every rank, so that all raise the same error or none."""
    return piece_size(
        len(one.cells),
        one.named_options(),
        one.layout,
        one.shape,
        dtype=one.dtype,
        device_type=transport.device.type,
        of=one.cells[0].block,
    )


def _subject(one: Round) -> Subject:
    """What a profiler's ranges say of a round: all its cells, whoever computes them."""
    elements: dict[str, int] = {}
    for cell in one.cells:
        elements[cell.role] = elements.get(cell.role, 0) + cell.numel
    return Subject(rule=one.named_options()["rule"], elements=elements, shape=(len(one.cells), *one.shape))


def _is_copy(cell: Cell, rank: int) -> bool:
    """Whether a rank of lower number holds the same stretch of the cell."""
    own = {(stretch.start, stretch.stop) for stretch in cell.held if stretch.rank == rank}
    return any((stretch.start, stretch.stop) in own for stretch in cell.held if stretch.rank < rank)


def _own_rows(cell: Cell, rank: int, n: int) -> list[Stretch]:
    """What a rank holds of the rows it computes."""
    first, last = (row * n for row in cell.rows[rank])
    return [
        Stretch(rank=rank, start=max(stretch.start, first), stop=min(stretch.stop, last))
        for stretch in cell.held
        if stretch.rank == rank and max(stretch.start, first) < min(stretch.stop, last)
    ]


def _within(place: int, piece: Fragment | Stretch) -> slice:
    """Where a piece of a cell lies in a stack in which the cell begins at `place`."""
    return slice(place + piece.start, place + piece.stop)


def _joined(pieces: Sequence[Tensor], device: torch.device) -> Tensor:
    return (pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))).to(device, non_blocking=True)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if not targets:  # the foreach operations refuse empty lists
        return
    if sources[0].device != targets[0].device:  # offloaded: one transfer, not one a piece
        sources = torch.cat(list(sources)).to(targets[0].device).split([len(target) for target in targets])
    torch._foreach_copy_(list(targets), list(sources))


def _deal(flat: Tensor, targets: Sequence[Tensor]) -> None:
    """Copy a flat tensor into targets, one after the other."""
    _copy(targets, flat.split([len(target) for target in targets]) if targets else ())
