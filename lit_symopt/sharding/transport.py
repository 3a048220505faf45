"""The two collectives of an exchange, counted: an all-to-all that overlaps with computing, and a sum over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import sleep
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lit_symopt.errors import ConfigError

REST = 0.2
"""Seconds in which threads of a process group come to rest."""


def end_process_group() -> None:
    """Ends the process group of this process, if there is one, before the process itself ends.

    A thread of gloo's that has just finished a collective still has to let go of its tensors, and needs the
    interpreter's lock for that. Asking for it while the interpreter ends aborts the process ("terminate called without
    an active exception"), also where the group was destroyed while somebody still refers to it. So the lock is left to
    those threads for a moment.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sleep(REST)


@dataclass
class Moved:
    """What this rank has sent since it was reset.

    Attributes:
        bytes: an `all_reduce` of b bytes counts as 2 b (W − 1)/W, what each rank of a ring sends.
        collectives: number of calls.
    """

    bytes: int = 0
    collectives: int = 0


@dataclass(frozen=True, kw_only=True)
class Pending:
    """Data on their way."""

    buffer: Tensor
    work: dist.Work | None
    keep: Tensor  # what is being sent must live until it is

    def wait(self) -> Tensor:
        """The received elements; on an accelerator the stream waits and not the host."""
        if self.work is not None:
            self.work.wait()
        return self.buffer


class Transport:
    """Collectives of one process group, on the device its backend works with.

    Args:
        group: every rank of it must make the same calls in the same order.

    Raises:
        ConfigError: if the backend moves nothing between the ranks' memories.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)
        self.device = _device(group)
        self.moved = Moved()

    def all_to_all(self, send: Tensor, *, sizes_out: Sequence[int], sizes_in: Sequence[int]) -> Pending:
        """Start sending `send`, 1-D and sorted by receiver.

        Args:
            send: elements for all ranks.
            sizes_out: elements for each rank.
            sizes_in: elements from each rank.
        """
        send = send.to(self.device, non_blocking=True).contiguous()
        buffer = torch.empty(sum(sizes_in), dtype=send.dtype, device=self.device)
        work = dist.all_to_all_single(buffer, send, list(sizes_in), list(sizes_out), group=self.group, async_op=True)
        self.moved.bytes += (sum(sizes_out) - sizes_out[self.rank]) * send.dtype.itemsize
        self.moved.collectives += 1
        return Pending(buffer=buffer, work=work, keep=send)

    def all_reduce(self, x: Tensor, op: Literal["sum", "max"]) -> Tensor:
        """The sum or the largest over all ranks, the same bits on each; `x` is not written."""
        total = x.to(self.device, copy=True).contiguous()
        dist.all_reduce(total, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=self.group)
        self.moved.bytes += round(2 * total.numel() * total.dtype.itemsize * (self.world - 1) / self.world)
        self.moved.collectives += 1
        return total.to(x.device)


def _device(group: dist.ProcessGroup) -> torch.device:
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))  # by kind of device
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    # gloo takes CUDA tensors too, through the host: then the host may as well compute.
    if kind is not None and backends.get(kind.type, "gloo") != "gloo":
        return torch.device(kind.type, torch.accelerator.current_device_index())
    if "cpu" in backends:
        return torch.device("cpu")
    raise ConfigError(
        f"the process group's backend {dist.get_backend_config(group)!r} has no device here; "
        "initialize torch.distributed with gloo for CPU or nccl for CUDA"
    )
