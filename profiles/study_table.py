"""Print the README's table of a study of AdamW, Muon and `symmetric`, from the results in its record.

lit-symopt study --config configs/studies/learning.yaml --out OUT     # an hour and a half; then copy into the record
python profiles/study_table.py learning
python profiles/study_table.py batch
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

from lit_symopt.study.result import Result, read_results

RECORDS = Path(__file__).parent / "records" / "studies"
FAMILIES = {"qwen3": "Qwen3", "gemma3": "Gemma 3", "olmoe": "OLMoE", "gpt_oss": "gpt-oss"}
CONTENDERS = {
    ("adamw", 1.0): "AdamW, own rates for embedding and head",
    ("muon", 1.0): "Muon, AdamW for embedding and head",
    ("symmetric", 1.0): "`symmetric`",
    ("symmetric", 0.65): "`symmetric`, 65 % of the steps",
}


def finals(results: Sequence[Result], family: str, contender: str, length: float) -> list[Result]:
    """The final runs of a contender in a family."""
    wanted = ("final", family, contender, length)
    return [one for one in results if (one.purpose, one.family, one.contender, one.length) == wanted]


def losses(runs: Sequence[Result]) -> str:
    """Mean (lowest to highest) loss."""
    found = [run.loss for run in runs if run.loss is not None]
    if not found or len(found) < len(runs):
        return "–" if not runs else f"{len(runs) - len(found)} of {len(runs)} diverged"
    return f"{mean(found):.3f} ({min(found):.3f} to {max(found):.3f})"


def time(results: Sequence[Result], family: str) -> str:
    """Seconds of the shorter runs as a share of AdamW's."""
    shorter, whole = finals(results, family, "symmetric", 0.65), finals(results, family, "adamw", 1.0)
    if not shorter or not whole:
        return "–"
    return f"{mean(run.seconds for run in shorter) / mean(run.seconds for run in whole):.0%}".replace("%", " %")


def table(results: Sequence[Result]) -> Iterator[str]:
    """The lines of the table."""
    yield "| validation loss, 3 seeds | " + " | ".join(FAMILIES.values()) + " |"
    yield "|---|" + "---|" * len(FAMILIES)
    for (contender, length), name in CONTENDERS.items():
        cells = [losses(finals(results, family, contender, length)) for family in FAMILIES]
        yield f"| {name} | {' | '.join(cells)} |"
    yield f"| its seconds, of AdamW's | {' | '.join(time(results, family) for family in FAMILIES)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", choices=("learning", "batch"))
    print("\n".join(table(read_results(RECORDS / parser.parse_args().study))))


if __name__ == "__main__":
    main()
