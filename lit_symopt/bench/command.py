"""`lit-symopt bench`."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from lit_symopt.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from lit_symopt.bench.tensors import Numbers

DTYPES = ("float32", "bfloat16")
PRECISIONS = ("auto", "bf16", "fp16", "tf32", "fp32", "exact")
BACKENDS = ("auto", "eager", "cpp", "compile", "triton", "gram-newton-schulz")
CASES = ("step", "products", "row_norm", "launches")


def run(arguments: Sequence[str]) -> int:
    """Time steps of optimizers in turn, print the table, write a record, and return the exit code, 0.

    Args:
        arguments: what follows the command's name.

    Raises:
        SymOptError, SystemExit: for wrong input.
    """
    given = _options().parse_args(list(arguments))
    _check(given)
    from lit_symopt.bench.folder import default_folder, refuse_existing, write
    from lit_symopt.bench.measure import commit, measure

    if given.output is not None:
        refuse_existing(given.output)
    numbers = _numbers(given)
    if given.processes > 1:
        from lit_symopt.bench.measure import show
        from lit_symopt.bench.processes import in_processes

        show(result := in_processes(arguments, given.processes))
    else:
        result = measure(given, numbers)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    folder = given.output or default_folder(date=date, device=result.device, shapes=_name(given))
    refuse_existing(folder)
    command = shlex.join(["lit-symopt", "bench", *arguments])
    write(folder, result, command=command, date=date, commit=commit(), circumstances=given.note)
    print(f"\nwrote {folder}")
    return 0


def _options() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lit-symopt bench",
        description="Time one step of the optimizer, and nothing else, on the shapes of a model, in turn with other "
        "optimizers. No model is built and nothing is trained: parameters and gradients are random numbers.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--shapes",
        default="qwen3_scaled",
        metavar="NAME|FILE",
        help="qwen3_scaled, olmoe_scaled, the name of a recipe in configs/ (qwen3_0p6b, gemma3_1b, olmoe_1b_7b, "
        "gpt_oss, tiny, ...) or a file with a list of shapes (default: qwen3_scaled)",
    )
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers of a model that is too large for here")
    parser.add_argument("--stack", default="symmetric", help="ours: symmetric (default), muon, polargrad, ...")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS, help="of our polar factors (auto)")
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="whose kernels compute our steps (auto)")
    parser.add_argument(
        "--scratch",
        type=float,
        metavar="MIB",
        help="memory that our steps may borrow (256; a CPU's cache)",
    )
    parser.add_argument(
        "--against",
        default="",
        metavar="NAMES",
        help="adamw, adamw_fused, torch_muon, deepspeed_muon, pytorch_optimizer_muon, gram_newton_schulz, dion, "
        "emerging_optimizers, paper, symopt:<stack>, symopt:<stack>@<backend>; separated by commas",
    )
    parser.add_argument(
        "--checkout",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="where a repository lies: dion=PATH, emerging_optimizers=PATH, paper=PATH; its code is run",
    )
    parser.add_argument("--case", default="step", choices=CASES, help="what to measure (step)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of everybody (7)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="steps in a turn (5)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="do it all in N processes in turn (1)")
    parser.add_argument("--threads", type=int, metavar="N", help="of a process for operators; default: torch's own")
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda", help="where to compute (cpu)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of parameters and gradients (float32)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (0)")
    parser.add_argument("--note", default="", help="on the circumstances, for the record: what else ran")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: profiles/records/bench/DATE-DEVICE-SHAPES")
    return parser


def _check(given: Namespace) -> None:
    for option in ("rounds", "steps", "threads", "processes"):
        value = getattr(given, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option} {value}: at least 1")
    if given.case != "step" and given.against:
        raise ConfigError(f"--against {given.against}: the case {given.case} has opponents of its own; leave it out")
    if given.case in ("row_norm", "launches") and given.layers is not None:
        raise ConfigError(f"--layers {given.layers}: the case {given.case} has shapes of its own; leave it out")
    given.against = list(dict.fromkeys(name.strip() for name in given.against.split(",") if name.strip()))
    checkouts = {}
    for text in given.checkout:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--checkout {text}: give NAME=PATH, such as dion=../dion")
        checkouts[name] = Path(path)
    given.checkout = checkouts


def _numbers(given: Namespace) -> Numbers:
    import torch

    from lit_symopt.bench.tensors import Numbers

    return Numbers(device=_device(given.device), dtype=getattr(torch, given.dtype), seed=given.seed)


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {name}: torch cannot compute there: {str(error).splitlines()[0]}; use cpu"
        ) from error
    return device


def _name(given: Namespace) -> str:
    """What the record is called after."""
    if given.case == "row_norm":
        return "row_norm"
    return str(given.shapes) if given.case == "step" else f"{Path(given.shapes).stem}-{given.case}"
