"""The command line `lit-symopt`, also `python -m lit_symopt` and `fabric run lit_symopt/__main__.py`.

What does not train starts fast: lightning and transformers are imported only by the commands that need them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lit_symopt.errors import SymOptError

HELP = """\
usage: lit-symopt COMMAND [options]

Train language models with one optimizer that gives every weight block the update of its symmetry.

commands:
  fit        train:                lit-symopt fit --config configs/quickstart.yaml
             continue:             lit-symopt fit --config configs/quickstart.yaml --ckpt_path last
             another optimizer:    lit-symopt fit --config configs/quickstart.yaml --model.symopt.stack adamw
  validate   validation loss:      lit-symopt validate --config configs/quickstart.yaml --ckpt_path last
  test       test loss:            lit-symopt test --config configs/quickstart.yaml --ckpt_path last
  audit      prove the blocks:     lit-symopt audit --config configs/quickstart.yaml
             of the weights alone: lit-symopt audit --config RECIPE --model.symopt.stack muon --loss-only
  profile    cost of each update:  lit-symopt profile --config configs/quickstart.yaml
             against other stacks: lit-symopt profile --config configs/quickstart.yaml --against adamw,muon
  profile-compare  what became slower:  lit-symopt profile-compare RECORD_A RECORD_B
  bench      cost of a step alone: lit-symopt bench --shapes qwen3_scaled --stack muon --against torch_muon,adamw
  study      compare optimizers:   lit-symopt study --config configs/studies/reduced.yaml
             report of its runs:   lit-symopt study --config configs/studies/reduced.yaml --report
  export     weights for transformers:  lit-symopt export CHECKPOINT FOLDER
  checkpoint move between strategies:   lit-symopt checkpoint consolidate SRC DST, lit-symopt checkpoint info SRC
  data       token shards:         lit-symopt data convert ..., lit-symopt data info SHARD

Every option of a recipe can be given on the command line; `lit-symopt fit --help` lists them, and
`lit-symopt fit --config RECIPE --print_config` shows what a recipe comes to.

options:
  -h, --help     show this help
  -V, --version  show the version
"""
TRAINING = ("fit", "validate", "test")
WRONG_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0; 1 if an audit failed, a profile became slower, or runs of a study failed; 2 for input that is wrong, with one
    `error:` message.

    Args:
        argv: the arguments after the program's name; default: those of this process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(HELP, end="")
        return 0
    try:
        if command in ("-V", "--version"):
            from lit_symopt import __version__

            print(f"lit-symopt {__version__}")
        elif command in TRAINING:
            from lit_symopt.training import run

            run(None if argv is None else arguments)
        elif command == "audit":
            from lit_symopt.audit.command import run as run_audit

            return run_audit(arguments[1:])
        elif command == "profile":
            from lit_symopt.profiling.command import run as run_profile

            return run_profile(arguments[1:])
        elif command == "profile-compare":
            from lit_symopt.profiling.command import run_compare

            return run_compare(arguments[1:])
        elif command == "bench":
            from lit_symopt.bench.command import run as run_bench

            return run_bench(arguments[1:])
        elif command == "study":
            from lit_symopt.study.command import run as run_study

            return run_study(arguments[1:])
        elif command == "export":
            _export(arguments[1:])
        elif command == "checkpoint":
            from lit_symopt.checkpoint.command import run as run_checkpoint

            run_checkpoint(arguments[1:])
        elif command == "data":
            _data(arguments[1:])
        else:
            known = ", ".join(
                (*TRAINING, "export", "checkpoint", "data", "audit", "profile", "profile-compare", "bench", "study")
            )
            return _complain(f"there is no command {command!r}; the commands are {known} (lit-symopt --help)")
    except SymOptError as error:
        return _complain(str(error))
    return 0


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return WRONG_INPUT


def _export(arguments: list[str]) -> None:
    from argparse import ArgumentParser

    parser = ArgumentParser(
        prog="lit-symopt export", description="Write the model of a checkpoint as a save_pretrained folder."
    )
    parser.add_argument("checkpoint", help="a .ckpt file of a run")
    parser.add_argument("folder", help="where to write; a folder that does not exist yet")
    given = parser.parse_args(arguments)
    from lit_symopt.models.pretrained import export_checkpoint

    export_checkpoint(given.checkpoint, given.folder)
    print(f"wrote {given.folder}")


def _data(arguments: list[str]) -> None:
    from jsonargparse import auto_cli

    from lit_symopt.data.commands import convert, info

    auto_cli({"convert": convert, "info": info}, args=arguments, prog="lit-symopt data")
