"""DeepSpeed ZeRO 1, 2, 3 and BF16_Optimizer: which stretch of which block lies where in the flat fp32 partitions.

DeepSpeed hands the optimizer flat tensors in place of parameters, and each of its wrappers lays blocks out in them in
a way of its own. Everything below is arithmetic on sizes that every rank knows, so nothing is communicated:

- ZeRO 1 and 2: a group's blocks, one after another (in another order under `round_robin_gradients`, with gaps under
  `parameter_alignment`), padded at the end and cut into W equal partitions. A block may straddle partitions.
- BF16_Optimizer (ZeRO 1 in bf16 with fp32 accumulation): the same without gaps, in the group's order.
- ZeRO 3: every block is cut into W equal shards, the last ones padded; a partition is the shards of a sub-group's
  blocks one after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_symopt.blocks import shape_of
from lit_symopt.errors import ConfigError
from lit_symopt.optim import SymOpt
from lit_symopt.sharding.holdings import Distribution, Holding, Placement, Segment
from lit_symopt.sharding.zero_recovery import close_step, drop_gradients, undo_trial_step
from lit_symopt.sharding.zero_support import refuse_unsupported, warn_of_clipping


def partitioned(optimizer: SymOpt, engine: Any) -> Distribution:
    """The distribution of an engine's optimizer; makes the state of every partition.

    Args:
        optimizer: the one that was given to `deepspeed.initialize`.
        engine: `deepspeed.DeepSpeedEngine`. Stage 0 is data parallelism: the state is replicated.

    Raises:
        ConfigError: for settings under which updates would not be those of one device, by name.
    """
    refuse_unsupported(optimizer, engine)
    warn_of_clipping(optimizer, engine)
    if engine.zero_optimization_stage() == 0:
        from lit_symopt.sharding.replicated import replicated

        undo_trial_step(optimizer, engine)
        return _Whole(engine, replicated(optimizer, engine.seq_data_parallel_group).holdings)
    strategy, flats = _layout(engine)
    rank, names = dist.get_rank(engine.seq_data_parallel_group), _names(optimizer, engine, flats)
    holdings = [flat.holding(rank, names) for flat in flats]
    for flat, holding in zip(flats, holdings, strict=True):
        _clear_padding(holding)
        # DeepSpeed links the state it finds after the first group's first step, and saves what it finds.
        optimizer.make_state(flat.tensor, optimizer.param_groups[flat.group])
    return _Partitions(strategy, optimizer, engine, holdings)


@dataclass(frozen=True, kw_only=True)
class _Flat:
    """A flat partition and the stretches of blocks in it.

    Attributes:
        key: of its holding.
        group: index of its parameter group.
        tensor: of this rank.
        parameters: of the model, in the order of the partition.
        ordered: the same in the order of the group.
        held: by parameter, by rank: `[start, stop)` of the flattened parameter.
        offsets: by parameter, by rank: of `start` in that rank's partition.
    """

    key: str
    group: int
    tensor: Tensor
    parameters: Sequence[Tensor]
    ordered: Sequence[Tensor]
    held: Sequence[tuple[tuple[int, int], ...]]
    offsets: Sequence[tuple[int, ...]]

    def holding(self, rank: int, names: dict[Tensor, str]) -> Holding:
        """This rank's part."""
        segments = [
            Segment(name=names[parameter], start=held[rank][0], stop=held[rank][1], offset=offsets[rank])
            for parameter, held, offsets in zip(self.parameters, self.held, self.offsets, strict=True)
            if held[rank][0] < held[rank][1]
        ]
        placements = [
            Placement(name=names[parameter], shape=shape_of(parameter), held=held)
            for parameter, held in zip(self.parameters, self.held, strict=True)
        ]
        return Holding(key=self.key, tensor=self.tensor, segments=tuple(segments), placements=tuple(placements))


class _Partitions(Distribution):
    """Flat partitions of a DeepSpeed engine."""

    decides = True

    def __init__(self, strategy: str, optimizer: SymOpt, engine: Any, holdings: Sequence[Holding]) -> None:
        self.strategy, self.holdings = strategy, holdings
        self.process_group = engine.seq_data_parallel_group
        self._optimizer, self._engine, self._zero = optimizer, engine, engine.optimizer
        self._together = type(engine.optimizer).__name__ == "BF16_Optimizer"
        self._norm: Any = None
        self._finite = True
        self._groups = optimizer.param_groups
        optimizer.register_load_state_dict_post_hook(self._remember_groups)

    def calls(self) -> Sequence[Sequence[Holding]]:
        """BF16_Optimizer steps once with all groups, ZeRO once for each of its partitions."""
        return [self.holdings] if self._together else [[holding] for holding in self.holdings]

    def finite(self) -> bool:
        """DeepSpeed's global gradient norm, which all ranks share and which is there before the optimizer is called.

        A norm whose square overflows is not finite, as for DeepSpeed's own check. Under `compute_grad_norm: false`
        (ZeRO 1 and 2) there is none, and the ranks are asked once for all groups.
        """
        norm = self._zero._global_grad_norm
        if norm is None:
            if self._optimizer.param_groups[0] is self._groups[0]:
                self._finite = self._ask_ranks()
        elif norm is not self._norm:
            self._norm, self._finite = norm, bool(torch.isfinite(torch.as_tensor(norm)))
        return self._finite

    def refused(self) -> None:
        """Leave the engine as after a step that it skipped itself."""
        self._optimizer.param_groups = self._groups  # ZeRO 1 and 2 step with a list of one group in its place
        drop_gradients(self._zero)
        close_step(self._engine)

    def _ask_ranks(self) -> bool:
        """Whether the gradients of all groups are finite: the first group's is in place, the others wait in pieces."""
        pieces = [self.holdings[0].tensor.grad]
        for waiting in self._zero.averaged_gradients.values():
            pieces += waiting or []
        verdict = torch.stack([torch.isfinite(piece).all() for piece in pieces if piece is not None]).all().int()
        dist.all_reduce(verdict, dist.ReduceOp.MIN, group=self.process_group)
        return bool(verdict)

    def _remember_groups(self, optimizer: torch.optim.Optimizer) -> None:
        self._groups = optimizer.param_groups  # loading replaces the list and the groups in it


class _Whole(Distribution):
    """Stage 0: a copy of every parameter, or of its fp32 master, on each rank."""

    strategy = "DeepSpeed stage 0"

    def __init__(self, engine: Any, holdings: Sequence[Holding]) -> None:
        self.process_group, self.holdings, self._engine = engine.seq_data_parallel_group, holdings, engine

    def finite(self) -> None:
        """In fp32 DeepSpeed does not look at gradients."""
        return

    def refused(self) -> None:
        """Leave the engine as after a step that it skipped itself."""
        self._engine.zero_grad()
        for holding in self.holdings:
            holding.tensor.grad = None
        close_step(self._engine)


def _layout(engine: Any) -> tuple[str, list[_Flat]]:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    zero, stage = engine.optimizer, int(engine.zero_optimization_stage())
    world = dist.get_world_size(engine.seq_data_parallel_group)
    # Subclasses (and there are some) lay their partitions out in other ways.
    if type(zero) is DeepSpeedZeroOptimizer:
        return f"DeepSpeed ZeRO {stage}", list(_stage_1_and_2(zero, world))
    if type(zero) is BF16_Optimizer:
        return "DeepSpeed ZeRO 1 (BF16_Optimizer)", list(_bf16(zero, world))
    if type(zero) is DeepSpeedZeroOptimizer_Stage3:
        return "DeepSpeed ZeRO 3", list(_stage_3(zero, world))
    raise ConfigError(
        f"DeepSpeed wraps the optimizer in a {type(zero).__name__}, whose partitions are not known here; use ZeRO "
        f"stage 1, 2 or 3 without extensions"
    )


def _stage_1_and_2(zero: Any, world: int) -> Iterator[_Flat]:
    for index, tensor in enumerate(zero.single_partition_of_fp32_groups):
        parameters, starts = zero.round_robin_bit16_groups[index], zero.round_robin_bit16_offsets[index]
        yield _cut(zero, index, tensor, parameters, starts, world, ordered=zero.bit16_groups[index])


def _bf16(zero: Any, world: int) -> Iterator[_Flat]:
    for index, (tensor, parameters) in enumerate(
        zip(zero.fp32_groups_flat_partition, zero.bf16_groups, strict=True),
    ):
        starts = _starts(parameter.numel() for parameter in parameters)
        yield _cut(zero, index, tensor, parameters, starts, world, ordered=parameters)


def _stage_3(zero: Any, world: int) -> Iterator[_Flat]:
    counters: dict[int, Iterator[int]] = {}
    for index, (tensor, parameters) in enumerate(
        zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True),
    ):
        group = zero.sub_group_to_group_id[index]
        number = next(counters.setdefault(group, count()))
        sizes = [parameter.partition_numel() for parameter in parameters]
        yield _Flat(
            key=f"{zero.optimizer.param_groups[group]['name']}/{number}",
            group=group,
            tensor=tensor,
            parameters=parameters,
            ordered=parameters,
            held=[
                tuple((min(rank * size, whole), min((rank + 1) * size, whole)) for rank in range(world))
                for size, whole in zip(sizes, (parameter.ds_numel for parameter in parameters), strict=True)
            ],
            offsets=[(offset,) * world for offset in _starts(sizes)],
        )


def _cut(
    zero: Any,
    index: int,
    tensor: Tensor,
    parameters: Sequence[Tensor],
    starts: Sequence[int],
    world: int,
    *,
    ordered: Sequence[Tensor],
) -> _Flat:
    """Blocks that begin at `starts` of a buffer which is cut into partitions as large as `tensor`."""
    size = tensor.numel()
    held = [
        tuple(
            (min(max(rank * size - begin, 0), whole), min(max((rank + 1) * size - begin, 0), whole))
            for rank in range(world)
        )
        for begin, whole in zip(starts, (parameter.numel() for parameter in parameters), strict=True)
    ]
    offsets = [
        tuple(begin + start - rank * size for rank, (start, _) in enumerate(stretches))
        for begin, stretches in zip(starts, held, strict=True)
    ]
    return _Flat(
        key=zero.optimizer.param_groups[index]["name"],
        group=index,
        tensor=tensor,
        parameters=parameters,
        ordered=ordered,
        held=held,
        offsets=offsets,
    )


def _clear_padding(holding: Holding) -> None:
    """ZeRO 3 leaves memory there that was never written: it may be NaN, and checkpoints would not repeat."""
    flat, end = holding.tensor.detach(), 0
    for segment in sorted(holding.segments, key=lambda one: one.offset):
        flat[end : segment.offset] = 0.0
        end = segment.offset + segment.stop - segment.start
    flat[end:] = 0.0


def _starts(sizes: Iterable[int]) -> list[int]:
    return list(accumulate(sizes, initial=0))[:-1]


def _names(optimizer: SymOpt, engine: Any, flats: Sequence[_Flat]) -> dict[Tensor, str]:
    """The optimizer's own name of every parameter: DeepSpeed keeps a group's order, and leaves some of it out."""
    named: dict[Tensor, str] = {}
    for index, group in enumerate(optimizer.param_groups):
        kept = [parameter for flat in flats if flat.group == index for parameter in flat.ordered]
        known = [(name, tuple(shape)) for name, shape in zip(group["param_names"], group["shapes"], strict=True)]
        if len(known) != len(kept):  # it leaves out what is frozen or empty
            present = {engine.param_names[parameter] for parameter in kept}
            known = [(name, shape) for name, shape in known if name in present]
        if [shape for _, shape in known] != [shape_of(parameter) for parameter in kept]:
            raise ConfigError(
                f"group {group['name']!r}: DeepSpeed keeps {len(kept)} of its {len(group['param_names'])} parameters, "
                f"and which they are cannot be told from their names: leave frozen and empty parameters out of the "
                f"optimizer, and use the names of engine.module.named_parameters()"
            )
        named.update(zip(kept, (name for name, _ in known), strict=True))
    return named
