"""What contestants are made of: the parameters that a model has, and other optimizers exactly as they come."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from lit_symopt import SymOpt, SymOptConfig
from lit_symopt.bench.accuracy import Range, checked_shapes, range_of, range_of_opponent, range_of_ours
from lit_symopt.bench.cases import steps
from lit_symopt.bench.command import PRECISIONS
from lit_symopt.bench.opponents import DECAY, Opponent, opponents
from lit_symopt.bench.ours import as_contestant, symopt
from lit_symopt.bench.shapes import ShapeList, shape_list
from lit_symopt.bench.tensors import Numbers, as_module, cut, is_hidden
from lit_symopt.errors import ConfigError
from lit_symopt.linalg import Precision
from tests.cli.test_recipes import CONFIGS, build, parse

NUMBERS = Numbers()


@pytest.fixture(scope="module", params=["olmoe_tiny", "gpt_oss_tiny"])
def mixture(request: pytest.FixtureRequest) -> ShapeList:
    return shape_list(request.param, layers=2)


@pytest.mark.parametrize("stack", ["symmetric", "muon"])
@pytest.mark.parametrize("recipe", ["qwen3_tiny", "gpt_oss_tiny"])
def test_parameters_are_grouped_as_for_the_model(recipe: str, stack: Any) -> None:
    config = SymOptConfig(stack=stack, lr=NUMBERS.lr)
    expected = SymOpt.for_module(build(parse(CONFIGS / f"{recipe}.yaml")), config=config).param_groups
    found = symopt(shape_list(recipe), NUMBERS, stack=stack).param_groups
    assert [{**group, "params": None} for group in found] == [{**group, "params": None} for group in expected]


def test_numbers_have_the_dtype_asked_for_and_the_seed_decides() -> None:
    shapes = shape_list("qwen3_tiny", layers=1)
    first, same, other = (
        as_module(shapes, Numbers(dtype=torch.bfloat16, seed=seed)).state_dict() for seed in (1, 1, 2)
    )
    assert {value.dtype for value in first.values()} == {torch.bfloat16}
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_cutting_keeps_every_number_and_every_matrix(mixture: ShapeList) -> None:
    flat, stacked = (cut(mixture, NUMBERS, stacks=stacks) for stacks in (False, True))
    for pieces in (flat, stacked):
        every = [*pieces.matrices, *pieces.others]
        assert sum(parameter.numel() for parameter in every) == mixture.elements
        assert all(parameter.grad is not None for parameter in every)
    assert {matrix.ndim for matrix in flat.matrices} == {2}
    assert {matrix.ndim for matrix in stacked.matrices} == {2, 3}
    ours = symopt(mixture, NUMBERS, stack="muon")
    whole = sum(
        part.count
        for group in ours.param_groups
        if group["rule"] == "spectral"
        for parameter in group["params"]
        for part in group["layout"].parts(parameter.shape)
    )
    assert len(flat.matrices) == whole == sum(len(m) if m.ndim == 3 else 1 for m in stacked.matrices)


def test_adamw_is_torchs_on_everything() -> None:
    shapes = shape_list("qwen3_tiny", layers=1)
    contestant = opponents()["adamw"].contestant(shapes, NUMBERS)
    assert contestant.least_bytes == 28 * shapes.elements
    assert (contestant.iterations, contestant.products) == (None, None)


def test_torch_muon_is_torchs_on_matrices_and_adamw_on_the_rest() -> None:
    shapes = shape_list("olmoe_tiny", layers=1)
    pieces, copies = (cut(shapes, NUMBERS, stacks=False) for _ in range(2))
    for optimizer in opponents()["torch_muon"].build(pieces.matrices, pieces.others, 0.1):
        optimizer.step()
    torch.optim.Muon(copies.matrices, lr=0.1, weight_decay=DECAY, momentum=0.95).step()
    torch.optim.AdamW(copies.others, lr=0.1, betas=(0.9, 0.95), weight_decay=DECAY, fused=True).step()
    for mine, expected in zip([*pieces.matrices, *pieces.others], [*copies.matrices, *copies.others], strict=True):
        assert torch.equal(mine, expected)


def test_who_is_not_installed_says_how_to_get_it_and_the_others_run() -> None:
    shapes = shape_list("qwen3_tiny", layers=1)
    wanted = ["dion", "gram_newton_schulz", "adamw", "symopt:adamw", "symopt:muon", "paper"]
    case = steps(shapes, NUMBERS, stack="muon", precision="bf16", against=wanted, checkouts={})
    assert [contestant.name for contestant in case.contestants][:3] == ["symopt:muon", "adamw", "symopt:adamw"]
    assert "git clone https://github.com/microsoft/dion dion" in case.absent["dion"]
    assert "--checkout paper=paper" in case.absent["paper"]
    if find_spec("gram_newton_schulz") is None:
        assert case.absent["gram_newton_schulz"].endswith("pip install gram-newton-schulz --no-build-isolation")


def test_who_cannot_be_built_is_left_out_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(matrices: Any, others: Any, lr: float) -> Any:
        raise RuntimeError("no kernel for this\nat all")

    known = {**opponents(), "broken": Opponent(name="broken", about="", build=broken, stacks=True)}
    monkeypatch.setattr("lit_symopt.bench.cases.opponents", lambda checkouts: known)
    shapes = shape_list("qwen3_tiny", layers=1)
    case = steps(shapes, NUMBERS, stack="muon", precision="bf16", against=["broken", "adamw"], checkouts={})
    assert case.absent == {"broken": "RuntimeError: no kernel for this"}
    assert [contestant.name for contestant in case.contestants] == ["symopt:muon", "adamw"]


@pytest.mark.parametrize(
    ("against", "why"),
    [("lion", r"--against lion: unknown; known: adamw, .*symopt:<stack>"), ("symopt:x", "unknown stack")],
)
def test_unknown_opponents_are_refused(against: str, why: str) -> None:
    shapes = shape_list("qwen3_tiny", layers=1)
    with pytest.raises(ConfigError, match=why):
        steps(shapes, NUMBERS, stack="muon", precision="bf16", against=[against], checkouts={})


def test_a_checkout_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--checkout lion=.*known are dion, emerging_optimizers, paper"):
        opponents({"lion": tmp_path})
    with pytest.raises(ConfigError, match=r"no package 'dion' in it; clone https://github.com/microsoft/dion"):
        opponents({"dion": tmp_path})


def test_an_opponent_of_a_checkout_is_imported_from_there(tmp_path: Path) -> None:
    (tmp_path / "dion").mkdir()
    (tmp_path / "dion" / "__init__.py").write_text(
        "import torch\n\ndef Muon(groups, lr, **options):\n    return torch.optim.SGD(groups[0]['params'], lr=lr)\n"
    )
    opponent = opponents({"dion": tmp_path})["dion"]
    assert opponent.missing() is None
    weight = nn.Parameter(torch.zeros(2, 3))
    weight.grad = torch.ones(2, 3)
    (optimizer,) = opponent.build([weight], [], 0.5)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.full((2, 3), -0.5))


# -- the same work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "auto", "exact"])
@pytest.mark.parametrize("stack", ["muon", "symmetric", "polargrad", "ssd", "scion"])
def test_our_singular_values_lie_where_they_should(stack: str, precision: str) -> None:
    found = range_of_ours([(24, 16), (16, 16)], NUMBERS, stack=stack, precision=precision)
    assert found is not None
    assert found.within


def test_a_stack_without_polar_factors_is_not_asked() -> None:
    assert range_of_ours([(24, 16)], NUMBERS, stack="adamw", precision="auto") is None


def test_too_few_iterations_of_ours_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def lazy(x: torch.Tensor, **_: Any) -> torch.Tensor:
        scaled: torch.Tensor = x / x.norm()
        return scaled

    monkeypatch.setattr("lit_symopt.rules.spectral.polar", lazy)
    with pytest.raises(ConfigError, match=r"symopt:muon with precision 'bf16' puts singular values .*choose another"):
        range_of_ours([(24, 16)], NUMBERS, stack="muon", precision="bf16")


INSTALLED = ["torch_muon"] + [
    pytest.param(name, marks=pytest.mark.skipif(find_spec(module) is None, reason=f"{module} is not installed"))
    for name, module in [("pytorch_optimizer_muon", "pytorch_optimizer"), ("gram_newton_schulz", "gram_newton_schulz")]
]


@pytest.mark.parametrize("name", INSTALLED)
def test_the_scale_of_an_opponent_is_what_it_says(name: str) -> None:
    for shape in [(96, 24), (24, 96)]:
        found = range_of_opponent(opponents()[name], [shape], NUMBERS)
        assert 0.6 < found.lowest < found.highest < 1.25


def test_the_quintic_of_muon_is_flagged() -> None:
    found = range_of_opponent(opponents()["torch_muon"], [(256, 256)], NUMBERS)
    assert 0.6 < found.lowest < 0.7
    assert not found.within


def test_small_singular_values_are_not_asked_about() -> None:
    def drop(x: torch.Tensor) -> torch.Tensor:
        u, sigma, vh = torch.linalg.svd(x, full_matrices=False)
        kept: torch.Tensor = (u * (sigma > 0.01 * x.norm())) @ vh
        return kept

    found = range_of(drop, [(64, 64)], NUMBERS)
    assert (round(found.lowest, 4), round(found.highest, 4)) == (1.0, 1.0)


def test_the_shapes_that_are_checked_are_the_cheapest_and_never_large() -> None:
    assert checked_shapes(shape_list("qwen3_scaled", layers=1)) == ((128, 256), (256, 256), (768, 256))
    assert max(min(shape) for shape in checked_shapes(shape_list("gpt_oss_small", layers=1))) == 512
    assert Range(lowest=0.7, highest=1.2, shapes=()).within


def test_hidden_matrices_are_those_of_muons_table(mixture: ShapeList) -> None:
    roles = {str(block.role) for block in mixture.blocks if is_hidden(block)}
    assert roles == {"query", "key", "value", "attention_out", "expert_gate_up", "expert_down"}


def test_iterations_are_said_where_there_are_some() -> None:
    shapes = shape_list("qwen3_tiny", layers=1)
    said = {
        precision: as_contestant(symopt(shapes, NUMBERS, stack="muon", precision=precision), name="").iterations
        for precision in PRECISIONS
    }
    assert said == {"bf16": 5, "fp16": 5, "tf32": 5, "auto": None, "fp32": None, "exact": None}
    assert sorted(said) == sorted(get_args(Precision))
