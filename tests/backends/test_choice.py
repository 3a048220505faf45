"""The option `backend`: what is refused, where it comes from, and what `explain` says of it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_symopt import Block, BlockTaxonomy, Role, RoleConfig, SymOpt, SymOptConfig
from lit_symopt.backends import BACKENDS, choice, chosen, require_backend, takes
from lit_symopt.backends.choice import INSTALL, POLAR_RULES
from lit_symopt.cli import main
from lit_symopt.cpp.build import library
from lit_symopt.errors import ConfigError
from lit_symopt.rules.rows import POLAR, SPECTRAL
from lit_symopt.rules.scale import NUCLEAR
from tests.cli.conftest import prepare
from tests.cpp.places import NEEDS_BF16


def optimizer(**options: Any) -> SymOpt:
    return SymOpt([("w", nn.Parameter(torch.eye(3)))], **{"rule": "spectral", **options})


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("lit_symopt.backends.choice.find_spec", lambda name: None if name == package else real(name))


@pytest.mark.parametrize("build", [optimizer, SymOptConfig, RoleConfig])
def test_an_unknown_backend_is_refused_with_the_known_ones(build: Any) -> None:
    known = ", ".join(map(re.escape, BACKENDS))
    with pytest.raises(ConfigError, match=f"unknown backend 'cuda'; known: {known}"):
        build(backend="cuda")


@pytest.mark.parametrize("scratch", [0, -1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("build", [optimizer, SymOptConfig])
def test_scratch_that_is_not_positive_is_refused(build: Any, scratch: float) -> None:
    with pytest.raises(ConfigError, match=f"scratch={scratch} must be a positive number of MiB"):
        build(scratch=scratch)


def test_a_refused_group_leaves_no_trace() -> None:
    ours = optimizer()
    with pytest.raises(ConfigError, match=r"group 'group1': unknown backend 'cuda'"):
        ours.add_param_group({"params": [nn.Parameter(torch.eye(2))], "backend": "cuda"})
    assert len(ours.param_groups) == 1


CHECK_TRITON = """
import torch
from lit_symopt import SymOpt
from lit_symopt.errors import ConfigError
try:
    SymOpt([torch.nn.Parameter(torch.eye(3))], rule="spectral", backend="triton")
except ConfigError as error:
    print(error)
"""


def test_triton_on_a_cpu_is_refused_without_the_interpreter() -> None:
    run = subprocess.run([sys.executable, "-c", CHECK_TRITON], capture_output=True, text=True, check=True, timeout=120)
    assert re.search(r"group 'group0': backend='triton': .*(set TRITON_INTERPRET=1|not installed)", run.stdout)


@pytest.mark.parametrize("backend", ["cpp", "compile", "triton", "gram-newton-schulz"])
def test_a_backend_is_refused_on_devices_it_does_not_know(backend: str) -> None:
    with pytest.raises(ConfigError, match=f"backend='{backend}': .* not on 'mps'; choose backend 'eager'"):
        require_backend(backend, "mps")


def test_the_package_that_is_not_installed_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "gram_newton_schulz")
    with pytest.raises(ConfigError, match=f"group 'group0': .*gram_newton_schulz is not installed.*{INSTALL}"):
        optimizer(backend="gram-newton-schulz")


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    library.cache_clear()
    for backend in ("compile", "cpp"):
        with pytest.raises(ConfigError, match=r"no 'no-such-compiler': install g\+\+"):
            optimizer(backend=backend)
    without(monkeypatch, "triton")
    with pytest.raises(ConfigError, match=r'pip install "lit-symopt\[triton\]"'):
        require_backend("compile", "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_the_meta_device_every_backend_is_taken(backend: str) -> None:
    require_backend(backend, "meta")
    SymOpt([nn.Parameter(torch.empty(3, 3, device="meta"))], rule="spectral", backend=backend)


def test_auto_is_eager() -> None:
    assert [chosen(backend) for backend in ("auto", "eager", "compile")] == ["eager", "eager", "compile"]


def test_the_rules_that_take_a_polar_factor_are_those_of_the_rules() -> None:
    assert POLAR_RULES == POLAR
    assert choice.SPECTRAL == SPECTRAL
    assert set(NUCLEAR) == choice.NUCLEAR


F32, F64 = torch.float32, torch.float64


@pytest.mark.parametrize(
    ("backend", "options", "dtype", "device", "part"),
    [
        ("eager", {"rule": "spectral", "precision": "bf16"}, F32, "cpu", None),
        ("compile", {"rule": "spectral", "precision": "bf16"}, F32, "cpu", "polar"),
        ("compile", {"rule": "spectral", "precision": "auto"}, F32, "cpu", None),
        ("compile", {"rule": "spectral", "precision": "auto"}, F32, "cuda", "polar"),
        ("compile", {"rule": "spectral", "precision": "bf16"}, F64, "cuda", None),
        ("triton", {"rule": "row_then_spectral", "precision": "auto"}, F32, "cuda", "polar"),
        ("triton", {"rule": "left_spectral", "precision": "exact"}, F32, "cuda", None),
        ("triton", {"rule": "row_norm", "precision": "auto"}, F32, "cuda", "row_step"),
        ("triton", {"rule": "row_norm", "precision": "fp32"}, F32, "cuda", None),
        ("triton", {"rule": "row_norm", "precision": "auto", "scale": "nuclear"}, F32, "cuda", None),
        ("compile", {"rule": "row_norm", "precision": "auto", "eps": 2.0}, F32, "cpu", None),
        ("compile", {"rule": "row_norm", "precision": "auto"}, F64, "cpu", None),
        ("gram-newton-schulz", {"rule": "row_norm", "precision": "auto"}, F32, "cpu", None),
        ("gram-newton-schulz", {"rule": "spectral", "precision": "bf16"}, F32, "cpu", "polar"),
        ("triton", {"rule": "adamw", "precision": "auto"}, F32, "cuda", None),
        pytest.param("cpp", {"rule": "spectral", "precision": "bf16"}, F32, "cpu", "spectral_step", marks=NEEDS_BF16),
        pytest.param(
            "cpp", {"rule": "spectral", "precision": "bf16", "centered": True}, F32, "cpu", "polar", marks=NEEDS_BF16
        ),
        pytest.param(
            "cpp", {"rule": "spectral", "precision": "bf16", "scale": "nuclear"}, F32, "cpu", "polar", marks=NEEDS_BF16
        ),
        pytest.param("cpp", {"rule": "row_then_spectral", "precision": "bf16"}, F32, "cpu", "polar", marks=NEEDS_BF16),
        ("cpp", {"rule": "spectral", "precision": "auto"}, F32, "cpu", None),
        ("cpp", {"rule": "spectral", "precision": "fp16"}, F32, "cpu", None),
        ("cpp", {"rule": "row_norm", "precision": "auto"}, F32, "cpu", "row_step"),
        ("cpp", {"rule": "row_norm", "precision": "auto"}, F64, "cpu", None),
        ("cpp", {"rule": "adamw", "precision": "auto"}, F32, "cpu", None),
    ],
)
def test_what_a_backend_takes_over(
    backend: Any, options: dict[str, Any], dtype: torch.dtype, device: str, part: str | None
) -> None:
    options = {"scale": "rms", "centered": False, "eps": 1e-8, **options}
    assert takes(backend, options, dtype=dtype, device_type=device) == part


def test_rows_that_are_too_long_for_the_kernel_stay_eager() -> None:
    options = {"rule": "row_norm", "precision": "auto", "scale": "rms", "eps": 1e-8}
    long: dict[str, Any] = {"dtype": F32, "device_type": "cuda", "longest_row": (1 << 16) + 1}
    assert takes("triton", options, **long) is None
    assert takes("compile", options, **long) == "row_step"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(12, 8), nn.Linear(8, 8, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.embedding(tokens))  # type: ignore[no-any-return]

    def block_taxonomy(self) -> BlockTaxonomy:
        return BlockTaxonomy([Block("embedding.weight", role=Role.EMBEDDING), Block("linear.weight", role=Role.LINEAR)])


def test_a_config_chooses_for_all_roles_and_a_role_for_itself() -> None:
    config = SymOptConfig(backend="compile", scratch=64, roles={"embedding": RoleConfig(backend="eager")})
    groups = {group["role"]: group for group in SymOpt.for_module(Net(), config=config).param_groups}
    assert {role: group["backend"] for role, group in groups.items()} == {"embedding": "eager", "linear": "compile"}
    assert {group["scratch"] for group in groups.values()} == {64}


def test_by_default_a_group_has_auto_and_no_bound_of_its_own() -> None:
    assert [(group["backend"], group["scratch"]) for group in optimizer().param_groups] == [("auto", None)]


def test_explain_says_what_a_backend_does() -> None:
    ours = SymOpt.for_module(Net(), config=SymOptConfig(backend="compile"))
    assert "backend   compile, for the whole step" in ours.explain("embedding.weight")
    assert "backend   eager: compile has nothing to do for this rule in precision auto" in ours.explain("linear.weight")
    assert "backend   eager\n" in optimizer().explain("w")
    assert "backend   compile, for the polar factor" in optimizer(backend="compile", precision="bf16").explain("w")


# ---- the command line


# LightningCLI in this process: what it and its parts warn about on every start is not ours to fix.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.symopt.backend", "nonsense"], "nonsense"),
        (["--model.symopt.roles.embedding.backend", "nonsense"], "nonsense"),
        (["--model.symopt.backend", "triton"], "backend='triton': "),
        (["--model.symopt.scratch", "-1"], "scratch=-1.0 must be a positive number of MiB"),
        (["--model.symopt.capturable", "true", "--model.symopt.precision", "exact"], "capturable=True: polar factors"),
    ],
)
def test_a_run_that_cannot_be_is_one_clear_error(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # which seed_everything sets
        monkeypatch.setenv(name, "0")
    monkeypatch.chdir(prepare(tmp_path))
    before = sorted(path.name for path in tmp_path.iterdir())
    try:
        code = main(["fit", "--config", "tiny.yaml", "--trainer.accelerator", "cpu", *options])
    except SystemExit as exit_:  # from parsing
        code = int(exit_.code or 0)
    said = capfd.readouterr().err
    assert code == 2
    assert "error: " in said
    assert message in said
    assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == before
