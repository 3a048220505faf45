"""Print what `make parity` found: how far each strategy is from one process.

    make parity                              # runs tests/sharding/test_parity_all.py, then this, into the record
    python profiles/parity.py                # the record, from profiles/records/parity/errors.jsonl
    python profiles/parity.py --table        # only the table of the README

A number is the largest ‖W − W*‖/‖W*‖ of all tensors of all trainings of its cell: 20 steps from the same weights, fp32,
each rank on micro-batches of its own, W* from one process that accumulates them all.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

RECORD = Path(__file__).parent / "records" / "parity" / "errors.jsonl"
STRATEGIES = {
    "ddp": "DDP",
    "zero1": "ZeRO 1",
    "zero2": "ZeRO 2",
    "zero3": "ZeRO 3",
    "zero3_init": "ZeRO 3, `zero.Init`",
    "fsdp2": "FSDP2",
    "bf16": "ZeRO 1, `BF16_Optimizer` ¹",
}
FAMILIES = {"qwen3": "Qwen3", "gemma3": "Gemma 3", "olmoe": "OLMoE", "gpt_oss": "gpt-oss"}
STACKS = ("symmetric", "muon", "polargrad", "ssd", "scion", "adamw")
CONTROL = "torch.optim.AdamW"
INTRODUCTION = """\
# The same numbers on every strategy

The largest ‖W − W*‖/‖W*‖ of all tensors after 20 steps from the same weights in fp32; W* is from one process that
accumulates the micro-batches of all ranks. Models of about ten thousand parameters whose dimensions no number of ranks
divides. The limit is 1e-5; a change of one rounding (6e-8) in one process alone stays below it in each of these
trainings."""
NOTE = """\
¹ Weights in bfloat16. A master that differs in its last bit soon rounds to another bfloat16, and training carries that
on, in one process too. So it is compared link by link: the gradients with those of one process at the same weights (all
within 1e-6), the masters, shown here, after 20 steps on the same gradients, the weights with the masters rounded
(bitwise)."""

Line = dict[str, Any]


def _shown(error: float) -> str:
    return f"{error:.1e}" if error else "0"


def largest(lines: Iterable[Line]) -> str:
    """The largest error of some trainings."""
    errors = [line["error"] for line in lines]
    return _shown(max(errors)) if errors else "–"


def table(corner: str, rows: dict[str, str], columns: dict[str, str], cell: Callable[[str, str], str]) -> str:
    """A table in Markdown; keys go to the cells, values are shown."""
    head = [f"| {' | '.join([corner, *columns.values()])} |", f"|{'---|' * (len(columns) + 1)}"]
    body = [f"| {' | '.join([shown, *(cell(row, column) for column in columns)])} |" for row, shown in rows.items()]
    return "\n".join([*head, *body])


def by_family(lines: Sequence[Line]) -> str:
    """The README's table: families × strategies, all stacks, two ranks."""
    chosen = [line for line in lines if line["world"] == 2 and line["stack"] in STACKS]
    return table(
        "2 processes, all stacks",
        STRATEGIES,
        FAMILIES,
        lambda strategy, family: largest(
            line for line in chosen if line["strategy"] == strategy and line["family"] == family
        ),
    )


def record(lines: Sequence[Line]) -> str:
    """Everything, in Markdown."""
    stacks = {name: f"`{name}`" for name in STACKS}
    families_only = [line for line in lines if line["case"].count(" / ") == 3]
    rules = list(dict.fromkeys(line["stack"] for line in lines if line["stack"] not in (*STACKS, CONTROL)))
    fp32 = {name: shown for name, shown in STRATEGIES.items() if name != "bf16"}
    with_rules = {name: shown for name, shown in fp32.items() if name != "zero3_init"}
    on_three = {line["stack"] for line in lines if line["world"] == 3}
    settings = [line for line in lines if line["case"].count(" / ") > 3]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()

    def cell(key: str, world: int = 2) -> Callable[[str, str], str]:
        return lambda row, column: largest(
            line for line in families_only if line["world"] == world and line[key] == row and line["strategy"] == column
        )

    return "\n\n".join(
        [
            INTRODUCTION,
            f"- command: `make parity`\n- device: CPU, {platform.machine()}, gloo\n"
            f"- torch {torch.__version__}, Python {platform.python_version()}, commit {commit}\n"
            f"- {len(lines)} trainings, none further away than {largest(lines)}; all ranks bitwise equal in each",
            by_family(lines),
            NOTE,
            "## Stacks (two ranks, all families)",
            table("stack", stacks, STRATEGIES, cell("stack")),
            "## Rules (two ranks, Qwen3, every matrix by this rule)",
            table("rule", {name: name.removeprefix("rule ") for name in rules}, with_rules, cell("stack")),
            "## Three ranks (gpt-oss)",
            table("stack", {name: stacks[name] for name in STACKS if name in on_three}, fp32, cell("stack", 3)),
            "## Clipping, accumulation, settings of DeepSpeed (OLMoE, `polargrad`)",
            "\n".join(
                [
                    "| training | error |",
                    "|---|---|",
                    *(f"| {one['case']} | {_shown(one['error'])} |" for one in settings),
                ]
            ),
            f"## Without a rule of ours (`{CONTROL}`)",
            table(
                "family",
                FAMILIES,
                fp32,
                lambda family, strategy: largest(
                    line
                    for line in lines
                    if line["stack"] == CONTROL and line["family"] == family and line["strategy"] == strategy
                ),
            ),
        ]
    )


def main(arguments: Sequence[str]) -> None:
    """Prints the record, or the README's table."""
    lines = [json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines()]
    print(f"{by_family(lines)}\n\n{NOTE}" if "--table" in arguments else record(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
