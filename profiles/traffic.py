"""Measure what an optimizer step sends between processes under every strategy, beside DeepSpeed's own Muon and AdamW.

    python profiles/traffic.py             # about ten minutes on two cores; needs the deepspeed extra
    python profiles/traffic.py --report    # only rebuild the tables from what was measured

Two models of some 12 million parameters are trained for three steps by 2 and by 4 processes; every collective of the
second step is counted (`traffic_on_ranks.py` has the convention), the memory of the third, and both are held against
the plan. What large models would send follows from the plan alone, and for DeepSpeed's Muon under ZeRO 3 from a formula
that has to give what was counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "profiles" / "records" / "traffic"
WORLDS, LARGE_WORLDS = (2, 4), (8, 64)
STACKS, MUON, ADAMW = ("symmetric", "muon"), "DeepSpeed's Muon", "torch.optim.AdamW"
STRATEGIES = ("DDP", "ZeRO 1", "ZeRO 2", "ZeRO 3", "FSDP2", "ZeRO 1, BF16_Optimizer", "ZeRO 3, bf16")
CONFIGS = {"Qwen3": "qwen3_0p6b", "OLMoE": "olmoe_1b_7b"}
REPETITIONS = 25
BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size
Row = dict[str, Any]
Shape = tuple[int, ...]


# -- measured ----------------------------------------------------------------------------------------------------


def cases(model: str) -> Iterator[Any]:
    """What is measured on one model."""
    from profiles.traffic_on_ranks import Case

    for strategy in STRATEGIES[:5]:
        own = (*STACKS, MUON) if strategy.startswith("ZeRO") else STACKS
        for optimizer in (*own, ADAMW):
            yield Case(model=model, strategy=strategy, optimizer=optimizer)
    if model == "Qwen3":  # DeepSpeed's Muon takes two-dimensional matrices only under BF16_Optimizer
        for strategy in STRATEGIES[5:]:
            for optimizer in ("muon", MUON, ADAMW):
                yield Case(model=model, strategy=strategy, optimizer=optimizer)


def measure_all() -> tuple[list[Row], list[Row]]:
    """Traffic and memory by case, the ranks' numbers side by side; and times with and without shared work."""
    from profiles.traffic_on_ranks import MODELS
    from tests.sharding.processes import Ranks

    measured, timed = [], []
    for world in WORLDS:
        # Nothing is timed with DeepSpeed, and compiling its Newton-Schulz iteration on a CPU takes minutes.
        with Ranks(world, env={"TORCHDYNAMO_DISABLE": "1"}, timeout=600.0) as ranks:
            for model in MODELS:
                for case in cases(model):
                    row = _side_by_side(ranks("profiles.traffic_on_ranks:measure", case))
                    check(row)
                    measured.append(row)
                    print(f"{world} × {model}, {case.strategy}, {case.optimizer}: {max(sent(row)):,} bytes", flush=True)
                for stack in STACKS if world == 2 else ():
                    seconds = ranks("profiles.traffic_on_ranks:shared_and_alone", model, stack, REPETITIONS)[0]
                    timed.append({"model": model, "stack": stack, "world": world, **seconds})
    return measured, timed


def _side_by_side(ranks: Sequence[Row]) -> Row:
    same = ("model", "strategy", "optimizer", "world")
    return {
        **{key: ranks[0][key] for key in same},
        **{key: [rank.get(key) for rank in ranks] for key in ranks[0] if key not in (*same, "rank")},
    }


def sent(row: Row) -> list[int]:
    """Bytes that each rank sent for the updates."""
    return [sum(one["bytes"] for one in rank if one["phase"] == "update") for rank in row["sent"]]


def averaging(row: Row) -> list[int]:
    """Bytes that each rank sent to average gradients."""
    kinds = ("reduce", "scatter")  # ZeRO 3 gathers parameters as its prefetching goes, which is left out here
    return [
        sum(one["bytes"] for one in rank if one["phase"] == "rest" and any(kind in one["method"] for kind in kinds))
        for rank in row["sent"]
    ]


def check(row: Row) -> None:
    """Hold what was counted against what was planned, and DeepSpeed's Muon against its formula.

    Raises:
        RuntimeError: if they differ by more than the rounding of an all-reduce to whole bytes.
    """
    if "planned" in row:
        expected = [sum(by_role.values()) for by_role in row["planned"]]
        slack = max(sum(one["calls"] for one in rank) for rank in row["sent"])
    elif row["optimizer"] == MUON and row["strategy"] == "ZeRO 3":
        expected = [deepspeed_muon(hidden_matrices(small_model(row["model"])), world=row["world"])] * row["world"]
        slack = 0
    else:
        return
    if any(abs(a - b) > slack for a, b in zip(expected, sent(row), strict=True)):
        raise RuntimeError(f"{row['model']}, {row['strategy']}, {row['optimizer']}: {sent(row)}, not {expected}")


# -- planned -----------------------------------------------------------------------------------------------------


def small_model(name: str) -> torch.nn.Module:
    """A model that is measured, without weights."""
    from profiles.traffic_on_ranks import build

    with torch.device("meta"):
        return build(name)


def large_model(name: str) -> Any:
    """The model of a recipe, without weights."""
    from omegaconf import OmegaConf

    import lit_symopt.models

    config: Any = OmegaConf.load(ROOT / "configs" / f"{CONFIGS[name]}.yaml")
    arguments: Any = OmegaConf.to_container(config.model.init_args, resolve=True)
    arguments.pop("symopt")
    with torch.device("meta"):
        return getattr(lit_symopt.models, name)(**arguments)


def plans_of(optimizer: Any, *, strategy: str, world: int, device_type: str = "cuda") -> list[Any]:
    """The plans of one training step: one for each call of the optimizer."""
    from lit_symopt.groups import layout_of
    from lit_symopt.sharding.holdings import Placement
    from lit_symopt.sharding.plan import OPTIONS, Block, make_plan

    calls: list[list[Block]] = []
    for group in optimizer.param_groups:
        shapes = [tuple(shape) for shape in group["shapes"]]
        blocks = [
            Block(
                placement=Placement(name=name, shape=shape, held=held),
                role=str(group["role"]),
                layout=layout_of(group, shape),
                options=tuple(group[key] for key in OPTIONS),
            )
            for name, shape, held in zip(
                group["param_names"], shapes, _held(shapes, strategy=strategy, world=world), strict=True
            )
        ]
        if group["rule"] != "adamw" or group["centered"]:
            calls.append(blocks)
    if not strategy.startswith("ZeRO"):  # DeepSpeed steps by groups, the others with all at once
        calls = [[block for blocks in calls for block in blocks]]
    plans, work = [], [0] * world
    for blocks in calls:
        plans.append(make_plan(blocks, world=world, device_type=device_type, carried=work))
        work = [a + b for a, b in zip(work, plans[-1].work(), strict=True)]
    return plans


def _held(shapes: Sequence[Shape], *, strategy: str, world: int) -> list[tuple[tuple[int, int], ...]]:
    """Who holds what of the blocks of a group."""
    sizes = [prod(shape) for shape in shapes]
    if strategy == "DDP":
        return [((0, size),) * world for size in sizes]
    if strategy == "ZeRO 3":
        return [_shards(size, world) for size in sizes]
    if strategy == "FSDP2":
        rows = [prod(shape[1:]) for shape in shapes]
        return [
            tuple((first * row, last * row) for first, last in _shards(shape[0], world))
            for shape, row in zip(shapes, rows, strict=True)
        ]
    partition = _partition(sum(sizes), world)
    begins = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        tuple(
            (min(max(rank * partition - begin, 0), size), min(max((rank + 1) * partition - begin, 0), size))
            for rank in range(world)
        )
        for begin, size in zip(begins, sizes, strict=True)
    ]


def _shards(size: int, world: int) -> tuple[tuple[int, int], ...]:
    part = ceil(size / world)
    return tuple((min(rank * part, size), min((rank + 1) * part, size)) for rank in range(world))


def _partition(total: int, world: int) -> int:
    return 2 * ceil(total / (2 * world))


def planned_rows(name: str) -> Iterator[Row]:
    """What a large model sends, by strategy, stack and number of ranks."""
    from lit_symopt import SymOpt, SymOptConfig

    model = large_model(name)
    hidden = hidden_matrices(model)
    shared = {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "hidden": sum(map(prod, hidden)),
    }
    for stack in STACKS:
        optimizer = SymOpt.for_module(model, config=SymOptConfig(stack=stack))  # type: ignore[arg-type]
        for world in LARGE_WORLDS:
            for strategy in ("DDP", "ZeRO 1 and 2", "ZeRO 3", "FSDP2"):
                plans = plans_of(optimizer, strategy=strategy, world=world)
                by_role: dict[str, list[int]] = {}
                for plan in plans:
                    for role, by_rank in plan.sent().items():
                        known = by_role.get(role, [0] * world)
                        by_role[role] = [a + b for a, b in zip(known, by_rank, strict=True)]
                totals = [sum(by_rank[rank] for by_rank in by_role.values()) for rank in range(world)]
                work = [plan.work() for plan in plans]
                busiest = totals.index(max(totals))
                yield {
                    **shared,
                    "world": world,
                    "strategy": strategy,
                    "stack": stack,
                    "busiest": max(totals),
                    "mean": sum(totals) / world,
                    "by_role": {role: by_rank[busiest] for role, by_rank in by_role.items()},
                    "work": sum(map(max, work)) * world / sum(map(sum, work)),
                }
    once = sum(map(_work, hidden))
    for world in LARGE_WORLDS:
        for strategy, moved, work_done in (
            ("ZeRO 1 and 2", 0, max(muon_work_of_partitions(hidden, world=world))),
            ("ZeRO 3", deepspeed_muon(hidden, world=world), muon_work_of_rounds(hidden, world=world)),
        ):
            found = {"busiest": moved, "mean": moved, "by_role": {}, "work": work_done * world / once}
            yield {**shared, "world": world, "strategy": strategy, "stack": MUON, **found}


# -- DeepSpeed's Muon, 0.19.8 --------------------------------------------------------------------------------------


def hidden_matrices(model: torch.nn.Module) -> list[Shape]:
    """Shapes of what DeepSpeed's Muon orthogonalizes: everything of two or more dimensions but embeddings and head.

    In its order, by descending shape. Under `zero.Init`, where it sees no shapes, it keeps the model's.
    """
    shapes = [
        tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and not any(word in name.lower() for word in ("embed", "lm_head"))
    ]
    return sorted(shapes, reverse=True)


def _chunks(shapes: Sequence[Shape]) -> list[list[Shape]]:
    """Matrices that are gathered at once."""
    chunks: list[list[Shape]] = []
    room = 0
    for shape in shapes:
        if not chunks or prod(shape) > room:
            chunks.append([])
            room = BUCKET
        chunks[-1].append(shape)
        room -= prod(shape)
    return chunks


def _rounds(shapes: Sequence[Shape], world: int) -> list[list[Shape]]:
    """Matrices that are orthogonalized at once, one a rank."""
    return [chunk[start : start + world] for chunk in _chunks(shapes) for start in range(0, len(chunk), world)]


def deepspeed_muon(shapes: Sequence[Shape], *, world: int, itemsize: int = 4) -> int:
    """Bytes that each rank sends under ZeRO 3 for the updates: four all-gathers.

    Gradients and momenta of all matrices go to everyone; then, in rounds of W matrices, each orthogonalized by one
    rank, updates and momenta do, padded to the largest of the round if its shapes differ or it is not full.
    """
    shards = sum(ceil(prod(shape) / world) for shape in shapes)
    largest = sum(max(map(prod, one)) for one in _rounds(shapes, world))
    return (world - 1) * (2 * shards + 2 * largest) * itemsize


def _work(shape: Shape) -> int:
    return prod(shape) * min(shape[-2:])


def muon_work_of_rounds(shapes: Sequence[Shape], *, world: int) -> int:
    """Multiply-adds under ZeRO 3 of the busiest rank of every round."""
    return sum(max(map(_work, one)) for one in _rounds(shapes, world))


def muon_work_of_partitions(shapes: Sequence[Shape], *, world: int) -> list[int]:
    """Multiply-adds of each rank under ZeRO 1 and 2: it orthogonalizes every tensor that it holds a piece of."""
    held = _held(shapes, strategy="ZeRO 1 and 2", world=world)
    return [
        sum(_work(shape) for shape, stretches in zip(shapes, held, strict=True) if range(*stretches[rank]))
        for rank in range(world)
    ]


# -- the record --------------------------------------------------------------------------------------------------

HEADER = """\
# What an optimizer step sends

- command: `python profiles/traffic.py`; data: `measured.jsonl`, `planned.jsonl`, `timed.jsonl`
- {environment}
- MB are 10⁶ bytes, of the busiest rank and one step, fp32 unless it says bf16. Bytes are deterministic: no spread.
- P, Pₕ: bytes of all parameters, and of those that Muon orthogonalizes (all but embeddings, head, vectors), in fp32.
- Counted at the methods of torch's process groups (gloo), by the convention in `profiles/traffic_on_ranks.py`.
- Nothing was run or timed on NCCL or a GPU.

"""


def report(measured: list[Row], planned: list[Row], timed: list[Row]) -> dict[str, str]:
    """The pages of the record as Markdown, by file name."""
    sections = [
        HEADER.format(environment=(RECORD / "environment.txt").read_text().strip()),
        (RECORD / "reading.md").read_text(),
        "## Measured: bytes\n\n" + "\n".join(_traffic_table(measured)),
        "## Planned: large models\n\n" + "\n".join(_planned_table(planned)),
        "## Measured: sharing the work under DDP\n\n" + "\n".join(_time_table(timed)),
    ]
    details = [
        "# What an optimizer step sends: details\n\nMade by `python profiles/traffic.py`; see `README.md`.",
        "## Measured: memory and work\n\n" + "\n".join(_memory_table(measured)),
        "## Planned: bytes by role\n\n" + "\n".join(_role_table(planned)),
    ]
    return {
        name: "\n\n".join(section.rstrip() for section in page) + "\n"
        for name, page in (("README.md", sections), ("details.md", details))
    }


def _find(rows: list[Row], **keys: Any) -> Row | None:
    return next((row for row in rows if all(row[key] == value for key, value in keys.items())), None)


def _unit(total: int, world: int) -> float:
    return 4 * total / world


def _traffic_table(rows: list[Row]) -> Iterator[str]:
    ours = max(_beyond(rows, row) for row in rows if row["optimizer"] in STACKS)
    yield (
        "For the updates; in brackets in units of P/W (symmetric) and Pₕ/W (the others). The plan gives the same bytes "
        "for symmetric and muon, up to the rounding of an all-reduce. The last column is what averaging gradients "
        "sends under DeepSpeed's Muon beyond what it sends under AdamW; under symmetric and muon that is at most "
        f"{ours} bytes. AdamW's updates send nothing. ZeRO 1 sends what ZeRO 2 sends.\n"
    )
    yield from _head("model", "W", "strategy", "symmetric", "muon", "DeepSpeed's Muon", "its gradients")
    for world in WORLDS:
        for model, strategy in sorted({(row["model"], row["strategy"]) for row in rows}, key=_place):
            if strategy == "ZeRO 1":
                continue
            keys = {"model": model, "strategy": strategy, "world": world}
            module = small_model(model)
            whole, hidden = sum(p.numel() for p in module.parameters()), sum(map(prod, hidden_matrices(module)))
            cells = []
            for optimizer in (*STACKS, MUON):
                row = _find(rows, optimizer=optimizer, **keys)
                unit = _unit(whole if optimizer == "symmetric" else hidden, world)
                cells.append("" if row is None else f"{max(sent(row)) / 1e6:.2f} ({max(sent(row)) / unit:.2f})")
            theirs = _find(rows, optimizer=MUON, **keys)
            cells.append("" if theirs is None else f"{_beyond(rows, theirs) / 1e6:.2f}")
            yield f"| {model} | {world} | {strategy} | {' | '.join(cells)} |"


def _head(*columns: str) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"


def _place(pair: tuple[str, str]) -> tuple[int, int]:
    return list(CONFIGS).index(pair[0]), STRATEGIES.index(pair[1])


def _beyond(rows: list[Row], row: Row) -> int:
    """Bytes that averaging gradients sends beyond what it sends under AdamW."""
    adamw = _find(rows, optimizer=ADAMW, **{key: row[key] for key in ("model", "strategy", "world")})
    assert adamw is not None
    return max(ours - theirs for ours, theirs in zip(averaging(row), averaging(adamw), strict=True))


def _memory_table(rows: list[Row]) -> Iterator[str]:
    yield (
        "Of the busiest rank, in MB. Step: the most that the strategy's whole step allocates at once beyond what was "
        "there before. Kept: exchange buffers that live from step to step. State: of the optimizer. Work in "
        "multiply-adds m·n·min(m, n): of all ranks together, 1 if every matrix were orthogonalized once; and of the "
        "busiest rank, 1 if that were shared evenly. ZeRO 1 is as ZeRO 2.\n"
    )
    yield from _head("model", "W", "strategy", "optimizer", "step", "kept", "state", "work, together", "busiest")
    for row in sorted(rows, key=lambda row: (row["world"], *_place((row["model"], row["strategy"])))):
        if row["strategy"] == "ZeRO 1":
            continue
        once = row
        if row["optimizer"] == MUON:  # the same matrices
            found = _find(rows, optimizer="muon", **{key: row[key] for key in ("model", "strategy", "world")})
            assert found is not None
            once = found
        work = " | "
        if row["optimizer"] != ADAMW:
            total = sum(once["work"])
            work = f"{sum(row['work']) / total:.2f} | {max(row['work']) * row['world'] / total:.2f}"
        sizes = " | ".join(f"{max(row[key]) / 1e6:.1f}" for key in ("peak", "kept", "state"))
        yield f"| {row['model']} | {row['world']} | {row['strategy']} | {row['optimizer']} | {sizes} | {work} |"


def _time_table(rows: list[Row]) -> Iterator[str]:
    from profiles.traffic_on_ranks import ratios

    yield (
        "Time of `optimizer.step()` where two processes share the updates' work, over that where each computes all of "
        f"it, as one process alone would; {REPETITIONS} repetitions of both in turns, on the cores of one machine.\n"
    )
    yield from _head("model", "stack", "shared / alone: median (smallest to largest)")
    for row in rows:
        found = ratios(row)
        spread = f"{found['smallest']:.2f} to {found['largest']:.2f}"
        yield f"| {row['model']} | {row['stack']} | {found['median']:.2f} ({spread}) |"


def _planned_table(rows: list[Row]) -> Iterator[str]:
    sizes = "; ".join(
        f"{name}: {row['parameters'] / 1e6:.0f} million parameters, {row['hidden'] / 1e6:.0f} of them hidden matrices"
        for name in CONFIGS
        if (row := _find(rows, model=name)) is not None
    )
    yield (
        f"The recipes `configs/qwen3_0p6b.yaml` and `configs/olmoe_1b_7b.yaml` ({sizes}), planned for GPUs, where "
        "`precision: auto` sends matrices and no Gram matrices. Not run. In MB; in brackets in units of P/W "
        "(symmetric) and Pₕ/W (the others). Work: the busiest rank's, summed over what all ranks wait for (ZeRO steps "
        "group by group, DeepSpeed's Muon in rounds under ZeRO 3); 1 if every matrix were orthogonalized once and all "
        "shared evenly. `details.md` has the bytes by role.\n"
    )
    yield from _head("model", "W", "strategy", "optimizer", "busiest rank", "mean", "work")
    for row in _in_order(rows):
        unit = _unit(row["parameters" if row["stack"] == "symmetric" else "hidden"], row["world"])
        busiest = f"{_mb(row['busiest'])} ({row['busiest'] / unit:.2f})"
        yield f"| {_which(row)} | {busiest} | {_mb(row['mean'])} | {row['work']:.2f} |"


def _role_table(rows: list[Row]) -> Iterator[str]:
    yield "Of the busiest rank, in MB.\n"
    yield from _head("model", "W", "strategy", "optimizer", "by role")
    for row in _in_order(rows):
        if row["by_role"]:
            by_role = sorted(row["by_role"].items(), key=lambda pair: -pair[1])
            yield f"| {_which(row)} | {', '.join(f'{role} {_mb(moved)}' for role, moved in by_role if moved)} |"


def _in_order(rows: list[Row]) -> list[Row]:
    strategies = ("DDP", "ZeRO 1 and 2", "ZeRO 3", "FSDP2")
    return sorted(rows, key=lambda row: (row["model"] != "Qwen3", row["world"], strategies.index(row["strategy"])))


def _which(row: Row) -> str:
    return f"{row['model']} | {row['world']} | {row['strategy']} | {row['stack']}"


def _mb(moved: float) -> str:
    return f"{moved / 1e6:.3g}" if moved < 1e9 else f"{moved / 1e6:,.0f}"


def environment() -> str:
    """Device, versions and commit of a record."""
    import deepspeed

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("describe", "--always", "--exclude=*") or "unknown"
    if git("status", "--porcelain", "--", ".", ":(exclude)profiles/records"):  # what this script writes lies there
        commit += "-dirty"
    return (
        f"{platform.machine()} CPU, {os.cpu_count()} cores, one thread a process; torch "
        f"{torch.__version__.split('+')[0]}; DeepSpeed {deepspeed.__version__}; Python {platform.python_version()}; "
        f"commit {commit}"
    )


def _read(name: str) -> list[Row]:
    return [json.loads(line) for line in (RECORD / f"{name}.jsonl").read_text().splitlines()]


def _write(name: str, rows: list[Row]) -> None:
    (RECORD / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Measure, plan, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="measure nothing, only plan and rebuild the tables")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # for the processes of the tests
    RECORD.mkdir(parents=True, exist_ok=True)
    if not given.report:
        measured, timed = measure_all()
        _write("measured", measured)
        _write("timed", timed)
        (RECORD / "environment.txt").write_text(environment() + "\n")
    _write("planned", [row for name in CONFIGS for row in planned_rows(name)])
    for name, text in report(_read("measured"), _read("planned"), _read("timed")).items():
        (RECORD / name).write_text(text)
        print(text)


if __name__ == "__main__":
    main()
