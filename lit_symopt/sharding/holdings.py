"""Who holds which elements of which block: what an adapter tells of its strategy, and all that a plan needs to know.

A block is flattened, with one chosen dimension moved to the front (the one it is sharded along; 0 for flat shards).
Every rank holds one stretch `[start, stop)` of the result, possibly empty; equal stretches are copies. The tensor in
which a rank keeps its stretches is what the optimizer updates: a parameter, the local part of a `DTensor`, or a flat
partition that holds stretches of many blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A block and the stretch of it that each rank holds; the same on every rank.

    Attributes:
        name: full parameter name.
        shape: of the whole parameter.
        held: `[start, stop)` in the flattened block, by rank.
        dim: the dimension that is moved to the front before flattening.
    """

    name: str
    shape: tuple[int, ...]
    held: tuple[tuple[int, int], ...]
    dim: int = 0

    @property
    def numel(self) -> int:
        """Elements of the whole block."""
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of a block inside a tensor that this rank holds.

    Attributes:
        name: full parameter name.
        start, stop: in the flattened block.
        offset: of `start` in the flattened held tensor.
    """

    name: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Holding:
    """A tensor that the optimizer holds, and what lies in it.

    Attributes:
        key: the same on every rank, unique: a parameter's name, a group's name, or "group/k" for its k-th sub-group.
        tensor: what a step finds in `param_groups`.
        segments: of this rank, without overlap; what no segment covers is padding.
        placements: of all blocks that this tensor, or its counterpart on any other rank, has a segment of; in the
            same order on every rank.
    """

    key: str
    tensor: Tensor
    segments: tuple[Segment, ...]
    placements: tuple[Placement, ...]


class Distribution(ABC):
    """How a strategy has distributed the blocks of one optimizer over the ranks of a process group.

    Attributes:
        strategy: what reports call it, e.g. "DeepSpeed ZeRO 2".
        process_group: the ranks among which blocks are distributed.
        holdings: of this rank; the same keys in the same order on every rank.
        decides: the strategy itself knows whether the gradients of a step are finite (`finite`).
    """

    strategy: str
    decides: bool = False
    process_group: dist.ProcessGroup
    holdings: Sequence[Holding]

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return dist.get_rank(self.process_group)

    @property
    def world(self) -> int:
        """Number of ranks in the group."""
        return dist.get_world_size(self.process_group)

    def calls(self) -> Sequence[Sequence[Holding]]:
        """The holdings by the calls of `step()` that one training step makes; here one call with all of them."""
        return [self.holdings]

    @abstractmethod
    def finite(self) -> bool | None:
        """Whether every gradient of the current step is finite, on all ranks alike; `None` if the strategy cannot say.

        Called at the start of every `step()`, more than once a training step where the strategy steps by groups.
        `None` makes the optimizer ask the ranks.
        """

    def refused(self) -> None:  # noqa: B027  most strategies have nothing to put in order
        """Put the strategy's own bookkeeping in order before a step ends with an error, nothing changed."""
