"""Metrics on several processes: real process groups (gloo), each rank with its share of the same data."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from lit_symopt.metrics import ExpertLoad, LogitStatistics, RouterStatistics
from lit_symopt.sharding.transport import end_process_group

EXPERTS = (6, 4)  # layers differ: states are padded
TOP_K = 2
VOCABULARY = 50
BATCHES = 6  # dealt out to the ranks in turn: six are even for 1, 2 and 3 ranks


def data() -> list[dict[str, Any]]:
    """Batches of different sizes: logits, selections and earlier selections of two routers, logits of a head."""
    generator = np.random.default_rng(7)
    batches = []
    for index in range(BATCHES):
        tokens = 5 + index
        layers = []
        for experts in EXPERTS:
            logits = 3.0 * generator.standard_normal((tokens, experts)).astype(np.float32)
            previous = np.argsort(logits + generator.standard_normal(logits.shape), 1)[:, -TOP_K:]
            layers.append({"logits": logits, "selected": np.argsort(logits, 1)[:, -TOP_K:], "previous": previous})
        head = (4.0 * generator.standard_normal((tokens, VOCABULARY)) + 2.5).astype(np.float32)
        batches.append({"layers": layers, "head": head})
    return batches


def measure(batches: list[dict[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
    """The three metrics of these batches, reduced over the process group if there is one."""
    load, stability, norms = ExpertLoad(EXPERTS), RouterStatistics(EXPERTS), LogitStatistics()
    for batch in batches:
        for layer, arrays in enumerate(batch["layers"]):
            logits, selected, previous = (torch.from_numpy(arrays[key]) for key in ("logits", "selected", "previous"))
            load.update(layer, selected, logits.softmax(-1))
            shift = torch.tensor(0.5 + layer)
            stability.update(layer, logits, logits.softmax(-1), selected, shift=shift, previous=previous)
        norms.update(torch.from_numpy(batch["head"]), shift=torch.tensor(1.5))
    return {"load": load.compute(), "stability": stability.compute(), "norms": norms.compute()}


def on_ranks(world_size: int, folder: Path) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What each of `world_size` ranks computes."""
    if world_size == 1:
        return [measure(data())]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_work, (world_size, port, str(folder)), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _work(rank: int, world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    torch.save(measure(data()[rank::world_size]), Path(folder) / f"{rank}.pt")
    end_process_group()
