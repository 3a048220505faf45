"""One ordinary file from what every strategy saves; the oracle is what the ranks held."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_symopt.checkpoint import consolidate
from tests.checkpoint.runs import MARKS, trained_and_saved
from tests.sharding.processes import Ranks


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    with Ranks(3) as ranks:
        yield ranks


def check(written: Path, held: dict[str, Any], *, half: bool = False) -> None:
    """The file holds the weights that the ranks held, and for every parameter its own state."""
    saved = torch.load(written, weights_only=True)
    weights: dict[str, Tensor] = saved["state_dict"]
    assert weights.keys() == held["weights"].keys()
    for name, weight in held["weights"].items():
        assert torch.equal(weights[name].to(weight.dtype), weight), name
        assert not weights[name].requires_grad
    (optimizer,) = saved["optimizer_states"]
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    assert names == held["names"]
    rules = {name: group["rule"] for group in optimizer["param_groups"] for name in group["param_names"]}
    plain = {name for group in optimizer["param_groups"] if group["momentum"] == 0.0 for name in group["param_names"]}
    for name in names:
        assert weights[name].dtype == torch.float32
        state = dict(optimizer["state"][name])
        if half:
            assert torch.equal(state.pop("master"), weights[name])
        expected = ["exp_avg", "exp_avg_sq"] if rules[name] == "adamw" else [] if name in plain else ["momentum_buffer"]
        assert sorted(set(state) - {"step"}) == expected, name
        for key in expected:
            assert torch.equal(state[key], MARKS[key](weights[name])), f"{key} of {name}"
        if rules[name] == "adamw":
            assert state["step"] == 3
    assert plain
    assert saved["global_step"] == 3
    assert saved["lr_schedulers"] == [{"last_epoch": 3}]
    assert not [path for path in written.parent.iterdir() if path.name.startswith(".")]  # no scratch is left


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("zero1", {}),
        ("zero1", {"round_robin_gradients": True}),
        ("zero2", {}),
        ("zero3", {}),
        ("zero3", {"sub_group_size": 40}),
        ("bf16_optimizer", {}),
        ("bf16_zero3", {}),
        ("zero0", {}),
    ],
)
def test_deepspeed_of_two_ranks(two: Ranks, tmp_path: Path, strategy: str, options: dict[str, Any]) -> None:
    held, _ = two(trained_and_saved, strategy, str(tmp_path / "run"), **options)
    check(consolidate(tmp_path / "run", tmp_path / "one/a.ckpt"), held, half=strategy.startswith("bf16"))


@pytest.mark.deepspeed
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_deepspeed_of_three_ranks(three: Ranks, tmp_path: Path, strategy: str) -> None:
    held, *_ = three(trained_and_saved, strategy, str(tmp_path / "run"))
    check(consolidate(tmp_path / "run", tmp_path / "one/a.ckpt"), held)


@pytest.mark.parametrize("kind", ["folder", "file.ckpt"])
def test_fsdp2_of_two_ranks(two: Ranks, tmp_path: Path, kind: str) -> None:
    held, _ = two(trained_and_saved, "fsdp2", str(tmp_path / kind))
    check(consolidate(tmp_path / kind, tmp_path / "one/a.ckpt"), held)


def test_fsdp2_of_three_ranks(three: Ranks, tmp_path: Path) -> None:
    held, *_ = three(trained_and_saved, "fsdp2", str(tmp_path / "run"))
    check(consolidate(tmp_path / "run", tmp_path / "one/a.ckpt"), held)


def test_ddp_and_one_device(two: Ranks, tmp_path: Path) -> None:
    held, _ = two(trained_and_saved, "ddp", str(tmp_path / "ddp.ckpt"))
    check(consolidate(tmp_path / "ddp.ckpt", tmp_path / "one/a.ckpt"), held)
    held = trained_and_saved("one", str(tmp_path / "one.ckpt"))
    check(consolidate(tmp_path / "one.ckpt", tmp_path / "one/b.ckpt"), held)
