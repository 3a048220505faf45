"""Time the Triton kernels against cuBLAS and eager PyTorch, by shape; or compile them for an H100 and count resources.

    python profiles/kernels.py                # needs a CUDA device; writes profiles/records/kernels/README.md
    python profiles/kernels.py --resources    # needs none: registers, spills and shared memory of each tuning

Not yet run on a GPU: there is no record yet.

The kernel and what it is held against run in turn, A B A B, after both have run once (which compiles and tunes). A time
is the median of `ROUNDS` rounds by CUDA events, each of so many calls that a round takes about a millisecond; the
ratio's range is that of the quartiles of the ratios round by round. Ceilings are measured in the same process.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from lit_symopt.linalg.coefficients import MUON_QUINTIC
from lit_symopt.linalg.kernels import (
    quintic_step,
    row_rule,
    scaled_add_product,
    symmetric_polynomial,
    symmetric_product,
)
from lit_symopt.linalg.kernels.load import SAME, Tuning, kernels
from lit_symopt.linalg.low_precision import LowPrecision
from lit_symopt.linalg.polar import polar_by
from lit_symopt.profiling.ceilings import measure_ceilings
from lit_symopt.profiling.operations import polar_operations

RECORD = Path(__file__).parent / "records" / "kernels" / "README.md"
ROUNDS = 31
MILLISECONDS = 1.0
Call = Callable[[], object]

PRODUCTS: dict[str, tuple[int, int, int]] = {  # matrices of a batch, short side, long side
    "Qwen3-0.6B heads (28 × 32 of 128 × 1024)": (28 * 32, 128, 1024),
    "Qwen3-0.6B MLP (28 × 3 of 1024 × 3072)": (28 * 3, 1024, 3072),
    "Gemma 3 1B MLP (26 × 3 of 1152 × 6912)": (26 * 3, 1152, 6912),
    "OLMoE experts (1 layer: 64 × 3 of 1024 × 2048)": (64 * 3, 1024, 2048),
    "a router (64 × 2048)": (1, 64, 2048),
    "one of 512²": (1, 512, 512),
    "one of 2048²": (1, 2048, 2048),
    "one of 4096 × 11008": (1, 4096, 11008),
}
ROWS: dict[str, tuple[int, int]] = {
    "50,304 × 512": (50304, 512),
    "Qwen3 embedding, 151,936 × 1024": (151936, 1024),
    "Gemma 3 embedding, 262,144 × 1152": (262144, 1152),
    "gpt-oss embedding, 201,088 × 2880": (201088, 2880),
}


# -- timed -------------------------------------------------------------------------------------------------------


def in_turn(ours: Call, theirs: Call) -> tuple[list[float], list[float]]:
    """Microseconds of a call, by round."""
    repetitions = []
    for call in (ours, theirs):
        call()
        torch.cuda.synchronize()
        repetitions.append(max(1, int(MILLISECONDS * 1e3 / elapsed(call, 3))))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for call, count, found in zip((ours, theirs), repetitions, times, strict=True):
            found.append(elapsed(call, count))
    return times


def elapsed(call: Call, count: int) -> float:
    """Microseconds of one of `count` calls, on the device."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) * 1e3 / count


def row(name: str, times: tuple[list[float], list[float]], share: Callable[[float], float]) -> str:
    """A line of a table: times, their ratio with its quartiles, and the share of the ceiling."""
    ours, theirs = times
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return (
        f"| {name} | {median(ours):.1f} | {median(theirs):.1f} | {median(ratios):.2f} ({low:.2f}-{high:.2f}) "
        f"| {100 * share(median(ours)):.0f} % |"
    )


def _share(done: float, ceiling: float, microseconds: float) -> float:
    return done / microseconds * 1e6 / ceiling


def products(peak: float) -> Iterator[str]:
    """Lines of the three launches and of the whole step, in bfloat16."""
    a, b, c = MUON_QUINTIC
    for name, (count, m, n) in PRODUCTS.items():
        x = torch.randn(count, m, n, device="cuda")
        x = (x / x.norm(dim=(-2, -1), keepdim=True)).bfloat16()
        gram = x @ x.mT
        p = symmetric_polynomial(gram, b=b, c=c)

        def eager(x: Tensor = x) -> Tensor:
            gram = torch.bmm(x, x.mT)
            return torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)

        launches: dict[str, tuple[Call, Call, float]] = {
            "X Xᵀ": (partial(symmetric_product, x), partial(torch.bmm, x, x.mT), m * m * n),
            "b A + c A²": (
                partial(symmetric_polynomial, gram, b=b, c=c),
                partial(torch.baddbmm, gram, gram, gram, beta=b, alpha=c),
                m * m * m,
            ),
            "a X + P X": (
                partial(scaled_add_product, x, p, a=a),
                partial(torch.baddbmm, x, p, x, beta=a),
                2 * m * m * n,
            ),
            "step": (partial(quintic_step, x, MUON_QUINTIC), eager, 3 * m * m * n + m * m * m),
        }
        for what, (ours, theirs, operations) in launches.items():
            done = count * operations
            yield row(f"{name} | {what}", in_turn(ours, theirs), partial(_share, done, peak))


def polar_factors(peak: float) -> Iterator[str]:
    """Lines of whole polar factors, in precision `fp16` and `tf32` against `bf16`."""
    for name, (count, m, n) in PRODUCTS.items():
        x = torch.randn(count, m, n, device="cuda")
        others: tuple[LowPrecision, ...] = ("fp16", "tf32")
        for method in others:
            done = polar_operations(method, m=m, n=n, count=count).products
            times = in_turn(partial(polar_by, method, x), partial(polar_by, "bf16", x))
            yield row(f"{name} | `{method}`", times, partial(_share, done, peak))


def rows(bandwidth: float) -> Iterator[str]:
    """Lines of the row rule in float32 against the step of `SymOpt`, with the non-finite check in both."""
    from lit_symopt import SymOpt

    variants: dict[str, tuple[dict[str, Any], int]] = {  # options, and numbers moved an entry
        "plain": ({}, 5),
        "damped": ({"row_damping": 0.1}, 6),
        "centered": ({"centered": True}, 7),
        "centered, damped": ({"centered": True, "row_damping": 0.1}, 8),
    }
    for name, (m, n) in ROWS.items():
        for variant, (options, moved) in variants.items():
            weight = torch.nn.Parameter(torch.randn(m, n, device="cuda"))
            weight.grad = torch.randn_like(weight)
            optimizer = SymOpt([weight], lr=1e-3, rule="row_norm", momentum=0.95, **options)
            step = partial(_step, weight.detach().clone(), weight.grad, torch.zeros_like(weight), options)
            bound = 4.0 * moved * m * n
            times = in_turn(step, optimizer.step)
            yield row(f"{name} | {variant}", times, partial(_share, bound, bandwidth))


def _step(weight: Tensor, gradient: Tensor, momentum: Tensor, options: Mapping[str, Any]) -> None:
    admitted = torch.isfinite(torch.linalg.vector_norm(gradient, float("inf")))
    row_rule(weight, gradient, momentum, lr=1e-3, beta=0.95, admitted=admitted, **options)


def record() -> str:
    """The page."""
    device = torch.device("cuda")
    ceilings = measure_ceilings(device, [torch.bfloat16])
    peak, bandwidth = ceilings.flops["bfloat16"], ceilings.bytes_per_second
    triton = import_module("triton")
    lines = [
        "# Triton kernels against cuBLAS and eager PyTorch",
        "",
        " ".join((__doc__ or "").split("\n\n")[-1].split()),
        "",
        "- command: `python profiles/kernels.py`",
        f"- device: {torch.cuda.get_device_name(device)}, {platform.machine()}",
        f"- torch {torch.__version__}, Triton {triton.__version__}, Python {platform.python_version()}, "
        f"commit {_commit()}",
        f"- ceilings: bfloat16 {peak / 1e12:.0f} TFLOP/s, copy {bandwidth / 1e9:.0f} GB/s",
        "",
        "## Products in bfloat16; the share counts half of a symmetric product",
        "",
        "| matrices | launch | kernel, µs | cuBLAS, µs | speed-up | of the matmul peak |",
        "|---|---|---|---|---|---|",
        *products(peak),
        "",
        "## Polar factors by other precisions than `bf16`; the share is of the bfloat16 peak",
        "",
        "| matrices | precision | µs | `bf16`, µs | speed-up | of the matmul peak |",
        "|---|---|---|---|---|---|",
        *polar_factors(peak),
        "",
        "## Row rule in float32, check for finite gradients included; the share counts each number once a pass",
        "",
        "| matrix | variant | kernel, µs | eager, µs | speed-up | of the copy bandwidth |",
        "|---|---|---|---|---|---|",
        *rows(bandwidth),
    ]
    return "\n".join(lines) + "\n"


def _commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "none"


# -- compiled ----------------------------------------------------------------------------------------------------


def compiled(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], tuning: Tuning) -> dict[str, int]:
    """Registers a thread, bytes of stack (spills) a thread and of shared memory, compiled for an H100; needs no GPU.

    Args:
        kernel: of `lit_symopt.linalg.kernels.load.kernels`.
        types: of arguments that are not integers, as Triton names them.
        constants: compile-time constants; also integers that are 1, which Triton compiles in, and absent tensors.
        tuning: how it would be launched.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**constants, **tuning.blocks}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    places = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or kind == "i32"]
    source = ASTSource(
        kernel,
        signature,
        {places[name]: value for name, value in constants.items()},
        {places[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": tuning.warps, "num_stages": tuning.stages, **SAME}
    program = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        used = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    found = {key: int(number) for key, number in re.findall(r"(REG|STACK):(\d+)", used)}
    return {"registers": found["REG"], "stack": found["STACK"], "shared": int(program.metadata.shared)}


def resources(*, widths: Sequence[int] = (1, 64, 512, 1024, 2880, 4096, 16384, 65536)) -> dict[str, dict[str, int]]:
    """What `compiled` says of every tuning of the products in bfloat16, and of every pass of the row rule by width."""
    product = import_module("lit_symopt.linalg.kernels.symmetric_product")
    step = import_module("lit_symopt.linalg.kernels.quintic_step")
    rule = import_module("lit_symopt.linalg.kernels.row_rule")
    found = {}
    half = dict.fromkeys(("x", "added", "out", "p"), "*bf16") | dict.fromkeys(("alpha", "beta", "a"), "fp32")
    always: dict[str, Any] = {"PRODUCTS": "ieee", "WIDEN": False, "DEPTH": 64}
    (kernel,) = kernels(vars(product), "_symmetric_product")
    halves: dict[str, dict[str, Any]] = {
        "X Xᵀ": {"added": None, "x_column": 1},
        "b A + c A²": {"x_column": 1, "added_column": 1},
    }
    for tuning in product.TUNINGS:
        for what, more in halves.items():
            found[f"{what} {tuning.blocks}"] = compiled(kernel, half, {**always, **more}, tuning)
    (kernel,) = kernels(vars(step), "_scaled_add_product")
    sides: dict[str, dict[str, Any]] = {
        "a X + P X": {"x_column": 1, "out_column": 1},
        "a X + X P": {"x_row": 1, "out_row": 1},
    }
    for tuning in step.TUNINGS:
        for what, more in sides.items():
            constants = {**always, **more, "p_column": 1, "GROUP": step.GROUP}
            found[f"{what} {tuning.blocks}"] = compiled(kernel, half, constants, tuning)
    kernel = kernels(vars(rule), *rule.FUNCTIONS)[-1]
    for n in widths:
        found |= {f"row rule, {name}, n = {n}": used for name, used in _passes(kernel, n, rule.tile)}
    return found


_COLUMNS = ("w_column", "g_column", "m_column", "p_column")


def _passes(kernel: Any, n: int, tile: Callable[..., tuple[int, int, int]]) -> Iterator[tuple[str, dict[str, int]]]:
    """Every pass of the row rule, with a gradient and a parameter in bfloat16."""
    types = dict.fromkeys(("weight", "momentum", "lr"), "*fp32") | dict.fromkeys(("gradient", "parameter"), "*bf16")
    types |= dict.fromkeys(("shift", "squares", "back", "sums"), "*fp64") | {"admitted": "*u8"}
    types |= dict.fromkeys(("weight_decay", "scale", "beta", "fresh", "damping", "eps", "roundings"), "fp32")
    rows, columns, warps = tile(n, contiguous=True)
    options: dict[str, Any] = {"NESTEROV": True, "HAS_MOMENTUM": True, "LR_ON_DEVICE": True, "DECAY_ON_DEVICE": False}
    always: dict[str, Any] = {**options, "ROWS": rows, "COLUMNS": columns, **dict.fromkeys(_COLUMNS, 1)}
    always |= {"n": 1} if n == 1 else {}
    passes: dict[str, tuple[str, dict[str, None]]] = {
        "all in one": ("nothing", dict.fromkeys(("shift", "squares", "back", "sums"))),
        "columns of V": ("direction", dict.fromkeys(("shift", "squares", "back"))),
        "squares": ("squares", dict.fromkeys(("squares", "back"))),
        "columns of U": ("update", dict.fromkeys(("back",))),
        "write, centered and damped": ("nothing", {"sums": None}),
    }
    for name, (add_up, absent) in passes.items():
        first = name in ("all in one", "columns of V")
        constants = {**always, **absent, "ADD_UP": add_up, "UPDATE": first}
        yield name, compiled(kernel, types, constants, Tuning(warps=warps))


def main() -> None:
    """Print and write the record, or print the resources."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resources", action="store_true", help="compile only; needs no GPU")
    if parser.parse_args().resources:
        print("| kernel | registers a thread | stack a thread, B | shared memory, B |\n|---|---|---|---|")
        for name, used in resources().items():
            print(f"| {name} | {used['registers']} | {used['stack']} | {used['shared']} |")
        return
    if not torch.cuda.is_available():
        parser.error("the kernels are timed on a CUDA device, and there is none; --resources needs none")
    text = record()
    print(text)
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
