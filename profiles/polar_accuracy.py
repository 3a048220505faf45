"""Measure the error and the time of every way to a polar factor, and print them as a record.

    python profiles/polar_accuracy.py > profiles/records/polar-accuracy/README.md

The error is ‖U - U_ref‖/‖U_ref‖ (Frobenius) against a float64 singular value decomposition of the same float32 matrix;
the range is that of vᵢᵀ U wᵢ over the singular directions with σᵢ ≥ 1e-2 σ₁, which is [1, 1] for the polar factor; the
time is the median of repetitions after one call to warm up, with the smallest and the largest.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from lit_symopt.linalg.coefficients import MUON_QUINTIC, polar_express
from lit_symopt.linalg.forms import Form, plain
from lit_symopt.linalg.low_precision import QUINTICS
from lit_symopt.linalg.newton_schulz import iterate
from lit_symopt.linalg.polar import polar_by

SEED = 20260317
REPETITIONS = 7

# m rows, n columns, k = min(m, n)

Method = Callable[[Tensor], Tensor]


def iterate_float32(x: Tensor) -> Tensor:
    """The alternative that `auto` was held against on a CPU: six steps of Polar Express on X in float32."""
    tall = x if x.shape[-2] >= x.shape[-1] else x.mT
    u = iterate(tall / tall.abs().amax(dim=(-2, -1), keepdim=True), polar_express(lower=1e-3, steps=6, cushion=0.02))
    return u if tall is x else u.mT


def iterate_muon(x: Tensor) -> Tensor:
    """Muon: five steps of its quintic in bfloat16."""
    tall = x if x.shape[-2] >= x.shape[-1] else x.mT
    u = iterate((tall / tall.abs().amax(dim=(-2, -1), keepdim=True)).bfloat16(), [MUON_QUINTIC] * 5).float()
    return u if tall is x else u.mT


def in_form(form: Form) -> Method:
    """Method `bf16` in a form of one's own choice."""
    return lambda x: iterate((x / x.abs().amax(dim=(-2, -1), keepdim=True)).bfloat16(), QUINTICS, form=form).float()


METHODS: dict[str, Method] = {
    "`exact`: svd": lambda x: polar_by("svd", x),
    "`fp32`: eigh": lambda x: polar_by("eigh", x),
    "`fp32`: iteration": lambda x: polar_by("iteration", x),
    "`bf16`": lambda x: polar_by("bf16", x),
    "`fp16`": lambda x: polar_by("fp16", x),
    "`tf32` (float32 on a CPU)": lambda x: polar_by("tf32", x),
    "`bf16`, form (1, 1, 1, 1, 1)": in_form(plain(5)),
    "`bf16`, form (2, 1, 2)": in_form((2, 1, 2)),
    "`bf16`, form (2, 3) (not used)": in_form((2, 3)),
    "float32 on X, 6 steps (not used)": iterate_float32,
    "Muon quintic, 5 steps (not used)": iterate_muon,
}


def haar(rows: int, columns: int) -> Tensor:
    """Orthonormal columns with the uniform distribution, float64."""
    q, r = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))
    return cast(Tensor, q * r.diagonal().sign())


def with_spectrum(m: int, n: int, sigma: Tensor) -> Tensor:
    """A float32 matrix [m, n] with singular values `sigma` [k] and random singular vectors."""
    k = min(m, n)
    return ((haar(m, k) * sigma.double()) @ haar(n, k).mT).float()


def spectra(m: int, n: int) -> dict[str, Tensor]:
    """The matrices of the table."""
    k = min(m, n)
    ones = torch.ones(k)
    matrices = {"Gaussian": torch.randn(m, n)}
    for spread in (2, 3, 4):
        matrices[f"log-uniform over 1e{spread}"] = with_spectrum(m, n, torch.logspace(0, -spread, k))
    matrices["ones and a single 1e-4"] = with_spectrum(m, n, torch.cat([ones[:-1], 1e-4 * ones[:1]]))
    matrices["a single one and 1e-4"] = with_spectrum(m, n, torch.cat([ones[:1], 1e-4 * ones[1:]]))
    matrices["rank 8"] = with_spectrum(m, n, torch.cat([ones[:8], 0 * ones[8:]]))
    return matrices


def accuracy_rows(m: int, n: int) -> list[str]:
    """Table rows: spectrum, then error and range for every method."""
    rows = []
    for name, x in spectra(m, n).items():
        v, sigma, wh = torch.linalg.svd(x.double(), full_matrices=False)
        kept = sigma >= 3e-6 * sigma[0]
        reference = (v * kept) @ wh
        cells = []
        for method in METHODS.values():
            u = method(x).double()
            error = (u - reference).norm() / reference.norm()
            gains = (v.mT @ u @ wh.mT).diagonal()[sigma >= 1e-2 * sigma[0]]
            cells.append(f"{error:.1e} [{gains.min():.2f}, {gains.max():.2f}]")
        rows.append(f"| {m}×{n} | {name} | {' | '.join(cells)} |")
    return rows


def timing_row(*shape: int) -> str:
    """Table row: shape, then milliseconds for every method."""
    x = torch.randn(*shape)
    cells = []
    for method in METHODS.values():
        method(x)
        times = []
        for _ in range(REPETITIONS):
            start = time.perf_counter()
            method(x)
            times.append(1e3 * (time.perf_counter() - start))
        cells.append(f"{statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f})")
    return f"| {list(shape)} | {' | '.join(cells)} |"


def commit() -> str:
    """The commit of the working tree, with `-dirty` if it was changed since."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "none"


def main() -> None:
    """Print the record."""
    torch.manual_seed(SEED)
    header, rule = " | ".join(METHODS), "|---" * len(METHODS)
    print("# Polar factors: error and time of each method\n")
    print(" ".join((__doc__ or "").split("\n\n")[-1].split()) + "\n")
    print("- command: `python profiles/polar_accuracy.py > profiles/records/polar-accuracy/README.md`")
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"- device: CPU, {platform.machine()} with {capability}, {torch.get_num_threads()} thread(s)")
    print(f"- torch {torch.__version__}, Python {platform.python_version()}, seed {SEED}, commit {commit()}")
    print("- `auto` on a CPU is the column `fp32`: eigh; on an accelerator it is the column `bf16`")
    print("\n## Error and range of the singular values\n")
    print(f"| shape | spectrum | {header} |\n|---|---{rule}|")
    for m, n in ((256, 256), (1024, 128), (512, 384)):
        print("\n".join(accuracy_rows(m, n)))
        sys.stdout.flush()
    print(f"\n## Time in ms, median (smallest-largest) of {REPETITIONS}\n")
    print(f"| shape | {header} |\n|---{rule}|")
    for shape in ((4096, 128), (16, 32, 128), (8, 384, 128), (512, 512)):
        print(timing_row(*shape))


if __name__ == "__main__":
    main()
