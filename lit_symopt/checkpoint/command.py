"""The command `lit-symopt checkpoint`."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence


def run(arguments: Sequence[str]) -> None:
    """`consolidate SRC DST [--force]`, or `info SRC`."""
    parser = ArgumentParser(
        prog="lit-symopt checkpoint",
        description="Move checkpoints between strategies and numbers of ranks.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    consolidate = commands.add_parser(
        "consolidate",
        help="one ordinary file, which --ckpt_path resumes under any strategy",
        description="Write one ordinary checkpoint file, weights and optimizer state, from a checkpoint of any "
        "strategy and number of ranks. --ckpt_path resumes it on one device, under DDP and FSDP2, and under DeepSpeed "
        "with lit_symopt.strategies.DeepSpeedStrategy.",
    )
    consolidate.add_argument("source", metavar="SRC", help="a .ckpt file, or a folder that DeepSpeed or FSDP2 saved")
    consolidate.add_argument("target", metavar="DST", help="the file to write")
    consolidate.add_argument("--force", action="store_true", help="replace DST if it exists")
    info = commands.add_parser("info", help="what a checkpoint is, and whether it is whole")
    info.add_argument("source", metavar="SRC", help="a checkpoint")
    given = parser.parse_args(list(arguments))
    if given.command == "info":
        from lit_symopt.checkpoint.describe import describe

        print(describe(given.source))
    else:
        from lit_symopt.checkpoint.consolidate import consolidate as write

        print(f"wrote {write(given.source, given.target, force=given.force)}")
