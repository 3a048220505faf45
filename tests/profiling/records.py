"""Records made of numbers, for tests of what is said of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lit_symopt.profiling.costs import STAGES
from lit_symopt.profiling.record import Record, StackRecord
from lit_symopt.profiling.samples import Samples


def samples_of(
    us: float,
    *,
    rounds: int = 3,
    windows: int = 4,
    steps: int = 6,
    noise: float = 0.0,
    seed: int = 0,
) -> Samples:
    """Samples around a time: lognormal noise of each step, and half as much of each round."""
    random = np.random.default_rng(seed)
    processes = np.exp(noise / 2 * random.standard_normal((rounds, 1, 1)))
    each = np.exp(noise * random.standard_normal((rounds, windows, steps)))
    return tuple(tuple(tuple(map(float, window)) for window in round_) for round_ in us * processes * each)


def stack_of(
    blocks: Mapping[str, float],
    *,
    forward: float = 20_000.0,
    attributed_share: float = 0.99,
    noise: float = 0.0,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    **shape: int,
) -> StackRecord:
    """A stack whose blocks, forward and backward pass take these times in μs."""
    many = {name: samples_of(us, noise=noise, seed=seed + n, **shape) for n, (name, us) in enumerate(blocks.items())}
    whole = samples_of(sum(blocks.values()), **shape)
    times = {"forward": forward, "backward": 2 * forward, "optimizer": sum(blocks.values())}
    return StackRecord(
        attributed_share=attributed_share,
        blocks=many,
        stages={
            stage: samples_of(times.get(stage, 0.0), noise=noise, seed=seed + 100 + n, **shape)
            for n, stage in enumerate(STAGES)
        },
        control={
            kernel: samples_of(share * forward, noise=noise, seed=seed + 200 + n, **shape)
            for n, (kernel, share) in enumerate({"aten::mm": 2.0, "aten::add": 1.0}.items())
        },
        wall=samples_of(3 * forward + sum(blocks.values()), **shape),
        update=whole,
        settings=settings or {},
    )


def record_of(stacks: Mapping[str, StackRecord], **changed: Any) -> Record:
    """A record of a CPU with these stacks."""
    given: dict[str, Any] = {
        "command": "lit-symopt profile --config tiny.yaml",
        "commit": {"commit": "0" * 40, "dirty": False},
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.13.0"},
        "device": {"type": "cpu", "name": "here", "threads": 1},
        "recipe": {"name": "tiny", "essentials": {"model.init_args.hidden_size": 32}},
        "spec": {"rounds": 3, "repeat": 4, "active": 6},
        "world": 1,
        "own": next(iter(stacks)),
    }
    return Record(**{**given, **changed}, stacks=stacks)
