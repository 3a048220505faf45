"""`lit-symopt profile` and `lit-symopt profile-compare`."""

from __future__ import annotations

import shlex
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_symopt.errors import ConfigError
from lit_symopt.revision import revision

if TYPE_CHECKING:
    from lit_symopt.profiling.recipe import Recipe
    from lit_symopt.profiling.runs import Run
    from lit_symopt.profiling.spec import ProfileSpec

REGRESSION = 1
INTERRUPTED = 130  # as shells say it: 128 + SIGINT
_COMPUTING = ("lit-symopt", "torch", "lightning", "transformers", "numpy")


def run(arguments: Sequence[str]) -> int:
    """Profile a recipe, print what its updates cost, write a record and return the exit code: 0, or 130 after Ctrl-C.

    Args:
        arguments: what follows the command's name; those that are not ours are of `lit-symopt fit`.

    Raises:
        SymOptError, SystemExit: for wrong input.
    """
    given, recipe_arguments = _options().parse_known_args(list(arguments))
    from lit_symopt.profiling.recipe import Recipe
    from lit_symopt.profiling.spec import ProfileSpec

    spec = ProfileSpec() if given.spec is None else ProfileSpec.load(given.spec)
    if given.rounds is not None:
        spec = ProfileSpec.from_dict({**asdict(spec), "rounds": given.rounds}, source="the command line")
    recipe = Recipe.resolve(recipe_arguments)
    recipe.check(spec)
    stacks = _stacks(recipe, given.against)
    from lit_symopt.profiling.folder import RECORDS, refuse_existing

    refuse_existing(given.output or RECORDS / "new", overwrite=given.overwrite)  # before anything is run
    try:
        with tempfile.TemporaryDirectory(prefix="lit-symopt-profile-") as scratch:
            runs = _measure(recipe_arguments, stacks, spec, Path(scratch), keep=given.keep_traces)
            return _report(given, arguments, recipe, spec, runs)
    except KeyboardInterrupt:
        print("interrupted; no record was written", file=sys.stderr)
        return INTERRUPTED


def run_compare(arguments: Sequence[str]) -> int:
    """Compare two records, print the table, and return the exit code: 1 for a regression, else 0.

    Raises:
        SymOptError, SystemExit: for wrong input.
    """
    parser = ArgumentParser(
        prog="lit-symopt profile-compare",
        description="Say which updates became slower or faster from record A to record B, beyond the noise of both. "
        "Exit code 1: something became slower by more than the threshold; 2: wrong input.",
        allow_abbrev=False,
    )
    parser.add_argument("before", metavar="A", help="a folder that lit-symopt profile wrote")
    parser.add_argument("after", metavar="B", help="another")
    parser.add_argument("--threshold", type=float, default=0.1, help="changes up to this share are none (0.1)")
    parser.add_argument("--anyway", action="store_true", help="compare records of different devices or recipes, too")
    given = parser.parse_args(list(arguments))
    from lit_symopt.profiling.compare import compare
    from lit_symopt.profiling.record import Record

    found = compare(Record.load(given.before), Record.load(given.after), threshold=given.threshold, anyway=given.anyway)
    print(f"A  {given.before}\nB  {given.after}\n\n{found}")
    return REGRESSION if found.regressions else 0


def _options() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lit-symopt profile",
        usage="lit-symopt profile --config RECIPE [--against STACK,STACK] [--output DIR] [--spec FILE] [options]",
        description="Train a recipe for a few dozen steps, several times, and say what each update costs, kernel by "
        "kernel. Callbacks, loggers, checkpoints and validation of the recipe are left out.",
        epilog="Every other option is one of the recipe, as of lit-symopt fit: --config OVERLAY, --trainer.devices 2, "
        "--model.symopt.stack muon.",
        allow_abbrev=False,
    )
    parser.add_argument("--against", default="", metavar="STACKS", help="measure other stacks in turn: adamw,muon")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: profiles/records/DATE-DEVICE-RECIPE")
    parser.add_argument("--spec", metavar="FILE", help="the schedule; see profiles/specs (default: laptop.yaml)")
    parser.add_argument("--rounds", type=int, metavar="N", help="runs of each stack, in place of the spec's")
    parser.add_argument("--overwrite", action="store_true", help="replace the record in DIR")
    parser.add_argument("--keep-traces", action="store_true", help="keep all traces, not only one window of each stack")
    return parser


def _stacks(recipe: Recipe, against: str) -> list[str | None]:
    """What to run in turn: None is the recipe as it is."""
    from lit_symopt.stacks import get_stack

    others = list(dict.fromkeys(name.strip() for name in against.split(",") if name.strip()))
    for name in others:
        get_stack(name)
    if others and recipe.symopt is None:
        raise ConfigError(
            f"--against {against}: {recipe.config['model'].get('class_path')} has no argument symopt, by which another "
            "stack could be set; leave --against out, or give its __init__ `symopt: SymOptConfig`"
        )
    return [None, *(name for name in others if name != (recipe.symopt or {}).get("stack"))]


def _measure(
    arguments: Sequence[str], stacks: Sequence[str | None], spec: ProfileSpec, scratch: Path, *, keep: bool
) -> dict[str | None, list[Run]]:
    """The runs of each stack, A B A B: what drifts over minutes meets them alike."""
    from lit_symopt.profiling.runs import overlay, train

    runs: dict[str | None, list[Run]] = {stack: [] for stack in stacks}
    total, done = spec.rounds * len(stacks), 0
    for number in range(1, spec.rounds + 1):
        for stack in stacks:
            done += 1
            name = stack or "the recipe's own stack"
            print(f"[{done}/{total}] {name}, round {number} of {spec.rounds} ...", end="", flush=True)
            folder = scratch / f"{number}-{stack or 'own'}"
            laid = overlay(spec, folder, stack=stack, ceilings=number == 1)
            try:
                log = scratch / f"{folder.name}.log"
                found = train(arguments, laid, folder, threads=spec.threads, log=log)
            except BaseException:
                print(flush=True)
                raise
            print(f" {found.seconds:.1f} s", flush=True)
            runs[stack].append(found)
            kept = found.traces if keep else found.first_windows() if number == 1 else ()
            for trace in set(found.traces) - set(kept):  # they are large
                trace.unlink()
    return runs


def _report(
    given: Namespace,
    arguments: Sequence[str],
    recipe: Recipe,
    spec: ProfileSpec,
    runs: Mapping[str | None, Sequence[Run]],
) -> int:
    """Prints the tables and writes the record."""
    from lit_symopt.profiling.folder import default_folder, write_folder
    from lit_symopt.profiling.record import Record, StackRecord
    from lit_symopt.profiling.roofline import roofline
    from lit_symopt.profiling.stacks import HEAD, aligned, stack_rows
    from lit_symopt.profiling.table import format_table

    first = runs[None][0].ranks[0]
    own = str((recipe.symopt or {}).get("stack") or first.optimizer)
    rounds = {stack or own: [run.ranks for run in of_stack] for stack, of_stack in runs.items()}
    points = {}
    for name, of_stack in rounds.items():
        rank = of_stack[0][0]
        windows = [window for ranks in of_stack for window in ranks[0].windows]
        points[name] = () if rank.ceilings is None else roofline(windows, rank.work, rank.ceilings)
    record = Record(
        command=shlex.join(["lit-symopt", "profile", *arguments]),
        commit=_commit(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=_versions(),
        device=dict(first.device),
        recipe={"name": recipe.name, "essentials": recipe.essentials()},
        spec=asdict(spec),
        world=first.world,
        own=own,
        stacks={
            name: StackRecord.of(
                of_stack,
                roofline=[{**asdict(point), "bound": point.bound, "share": point.share} for point in points[name]],
                settings=recipe.settings(against=name != own),
            )
            for name, of_stack in rounds.items()
        },
    )
    folder = given.output or default_folder(date=record.date, device=record.device, recipe=recipe.name)
    traces = {stack or own: [trace for run in of_stack for trace in run.kept] for stack, of_stack in runs.items()}
    write_folder(folder, record, rounds=rounds, points=points, traces=traces)
    windows = [window for ranks in rounds[own] for rank in ranks for window in rank.windows]
    print(f"\n{format_table(windows, points[own])}")
    if len(rounds) > 1:
        print(f"\n{aligned(HEAD, stack_rows(record))}")
    print(f"\nwrote {folder}")
    return 0


def _commit() -> dict[str, Any] | None:
    """The commit of the package's tree and whether it was changed since; None if git knows no such tree."""
    found = revision()
    return None if found is None else {"commit": found.commit, "dirty": found.changed}


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in (*_COMPUTING, "deepspeed"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
