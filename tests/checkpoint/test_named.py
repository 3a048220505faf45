"""State by parameter name, and what is refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_symopt import Layout, SymOpt
from lit_symopt.checkpoint import NamedState, keyed_by_name, load_named, named_state
from lit_symopt.checkpoint.consolidate import normalized
from lit_symopt.checkpoint.named import prefix_between
from lit_symopt.checkpoint.stretches import put, take, uncovered
from lit_symopt.errors import CheckpointError
from lit_symopt.sharding.holdings import Distribution, Holding, Placement, Segment


class Flat(Distribution):
    """One rank of a strategy that puts blocks into one flat tensor, by hand."""

    strategy = "by hand"

    def __init__(self, holdings: Sequence[Holding]) -> None:
        self.holdings = holdings

    def finite(self) -> bool | None:
        return None


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in {"a": (4, 3), "b": (2, 5), "c": (6,)}.items()}


def optimizer(weights: dict[str, nn.Parameter], **changes: Any) -> SymOpt:
    matrices = {"rule": "spectral", "name": "linear", "lr": 0.1, "layout": Layout.matrix(), **changes}
    return SymOpt(
        [
            {"params": [("a", weights["a"]), ("b", weights["b"])], **matrices},
            {"params": [("c", weights["c"])], "rule": "adamw", "name": "vector", "lr": 0.01},
        ]
    )


def stepped(steps: int = 2, **changes: Any) -> tuple[SymOpt, dict[str, nn.Parameter]]:
    weights = parameters()
    made = optimizer(weights, **changes)
    for step in range(steps):
        for index, weight in enumerate(weights.values()):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step * 10 + index))
        made.step()
    return made, weights


def flat(**changes: Any) -> tuple[SymOpt, Flat]:
    """A fresh optimizer whose matrices lie, in part and with padding, in one flat tensor."""
    made = optimizer(parameters(), **changes)
    partition = nn.Parameter(torch.zeros(14))
    made.param_groups[0]["params"] = [partition]
    whole = {"a": (4, 3), "b": (2, 5)}
    placements = tuple(
        Placement(name=name, shape=shape, held=((0, 5), (5, torch.Size(shape).numel())))
        for name, shape in whole.items()
    )
    segments = (Segment(name="a", start=5, stop=12, offset=0), Segment(name="b", start=5, stop=10, offset=8))
    (vector,) = made.param_groups[1]["params"]
    return made, Flat(
        [
            Holding(key="linear", tensor=partition, segments=segments, placements=placements),
            Holding(
                key="vector",
                tensor=vector,
                segments=(Segment(name="c", start=0, stop=6, offset=0),),
                placements=(Placement(name="c", shape=(6,), held=((0, 6), (0, 6))),),
            ),
        ]
    )


def contents(made: SymOpt) -> dict[Tensor, Any]:
    return {tensor: {key: value.clone() for key, value in state.items()} for tensor, state in made.state.items()}


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    data=st.data(),
)
def test_a_stretch_that_was_put_is_taken_back_and_nothing_else_has_changed(
    shape: list[int], data: st.DataObject
) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    numel = torch.Size(shape).numel()
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    whole = torch.arange(float(numel)).view(shape)
    flattened = whole.movedim(dim, 0).reshape(-1).clone()
    assert torch.equal(take(whole, dim=dim, start=start, stop=stop), flattened[start:stop])
    put(whole, -torch.ones(stop - start), dim=dim, start=start)
    flattened[start:stop] = -1
    assert torch.equal(whole, flattened.view([shape[dim], *shape[:dim], *shape[dim + 1 :]]).movedim(0, dim))


@given(cuts=st.lists(st.integers(0, 30), max_size=6), missing=st.integers(0, 6))
def test_stretches_cover_a_block_unless_one_is_missing(cuts: list[int], missing: int) -> None:
    bounds = [0, *sorted(cuts), 30]
    stretches = list(pairwise(bounds))
    assert uncovered(stretches, 30) is None
    if missing < len(stretches):
        start, stop = stretches.pop(missing)
        gap = uncovered(stretches, 30)
        assert gap == ((start, stop) if start < stop else None)


def test_each_part_of_a_flat_tensor_gets_its_stretch_of_weight_and_state() -> None:
    source, weights = stepped()
    target, distribution = flat()
    load_named(target, distribution, named_state(source.state_dict()), weights)
    partition = distribution.holdings[0].tensor
    momentum = target.state[partition]["momentum_buffer"]
    for held, whole in ((partition, weights), (momentum, named_momentum(source, weights))):
        assert torch.equal(held[:7], whole["a"].flatten()[5:])
        assert held[7] == 0  # padding
        assert torch.equal(held[8:13], whole["b"].flatten()[5:])
    own, saved = target.state[distribution.holdings[1].tensor], source.state[weights["c"]]
    assert own.keys() == saved.keys()
    assert all(torch.equal(own[key], saved[key]) for key in saved)


def named_momentum(source: SymOpt, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: source.state[weights[name]]["momentum_buffer"] for name in ("a", "b")}


def test_rates_and_decay_come_along_as_with_any_optimizer() -> None:
    source, weights = stepped()
    source.param_groups[0].update(lr=0.03, weight_decay=0.2, momentum=0.5)
    target, distribution = flat()
    load_named(target, distribution, named_state(source.state_dict()), weights)
    group = target.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.03, 0.2, 0.5)
    assert group["params"] == [distribution.holdings[0].tensor]
    assert group["layout"] == Layout.matrix()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"rule": "row_norm"}, ["'a': rule is 'spectral' there and 'row_norm' here", "'b': rule"]),
        ({"layout": Layout.transposed()}, ["'a': layout is", "'b': layout is"]),
        ({"scale": "rms"}, ["'a': scale is 'none' there and 'rms' here"]),
        ({"centered": True}, ["'a': centered is 'False' there and 'True' here"]),
    ],
)
def test_another_meaning_is_refused_with_the_blocks_names(changes: dict[str, Any], names: list[str]) -> None:
    source, weights = stepped()
    target, distribution = flat(**changes)
    before = contents(target)
    with pytest.raises(CheckpointError) as refused:
        load_named(target, distribution, named_state(source.state_dict()), weights)
    assert all(name in str(refused.value) for name in names), refused.value
    assert contents(target) == before
    assert torch.equal(distribution.holdings[0].tensor, torch.zeros(14))
    assert target.param_groups[0]["lr"] == 0.1


def test_another_shape_and_other_blocks_are_refused_with_their_names() -> None:
    source, weights = stepped()
    target, distribution = flat()
    state = named_state(source.state_dict())
    other = NamedState({**state, "a": {"momentum_buffer": torch.zeros(3, 4)}}, state.groups)
    with pytest.raises(CheckpointError, match=r"'a' has the shape \(3, 4\) there and \(4, 3\) here"):
        load_named(target, distribution, other, weights)
    with pytest.raises(CheckpointError, match=r"no weights for 1 parameter\(s\) of the optimizer: 'b'"):
        load_named(target, distribution, state, {name: weights[name] for name in ("a", "c")})
    groups = [{**group, "param_names": [f"{name}x" for name in group["param_names"]]} for group in state.groups]
    with pytest.raises(CheckpointError, match=r"'ax' is only there.*'a' is only here"):
        load_named(target, distribution, NamedState(state, groups), weights)


def test_one_ranks_share_is_not_taken_for_the_whole() -> None:
    target, _ = flat()
    with pytest.raises(CheckpointError, match=r"one rank's share of a sharded state.*consolidate SRC DST"):
        named_state(torch.optim.Optimizer.state_dict(target))
    with pytest.raises(CheckpointError, match="no parameter names: it was not saved by SymOpt"):
        named_state(torch.optim.AdamW([nn.Parameter(torch.ones(1))]).state_dict())


def test_an_fp32_master_wins_over_the_weight_it_was_rounded_to() -> None:
    source, weights = stepped()
    state = named_state(source.state_dict())
    state["a"]["master"] = weights["a"].detach() + 1e-4
    target, distribution = flat()
    load_named(target, distribution, state, {name: weight.bfloat16() for name, weight in weights.items()})
    partition = distribution.holdings[0].tensor
    assert torch.equal(partition[:7], state["a"]["master"].flatten()[5:])
    assert torch.equal(partition[8:13], weights["b"].detach().bfloat16().float().flatten()[5:])
    assert "master" not in target.state[partition]


def test_a_missing_state_starts_with_zeros() -> None:
    _, weights = stepped()
    target, distribution = flat()
    partition = distribution.holdings[0].tensor
    target.make_state(partition, target.param_groups[0])
    target.state[partition]["momentum_buffer"].fill_(1.0)
    load_named(target, distribution, {}, weights)
    assert torch.equal(target.state[partition]["momentum_buffer"][:7], torch.zeros(7))


def test_counters_that_differ_are_said() -> None:
    weights = {name: nn.Parameter(torch.ones(3)) for name in ("a", "b")}
    made = SymOpt([{"params": list(weights.items()), "rule": "adamw", "name": "vector"}])
    flat_tensor = nn.Parameter(torch.zeros(6))
    made.param_groups[0]["params"] = [flat_tensor]
    held = ((0, 3),)
    holding = Holding(
        key="vector",
        tensor=flat_tensor,
        segments=(Segment(name="a", start=0, stop=3, offset=0), Segment(name="b", start=0, stop=3, offset=3)),
        placements=tuple(Placement(name=name, shape=(3,), held=held) for name in weights),
    )
    state = {"a": {"step": torch.tensor(4.0)}, "b": {"step": torch.tensor(7.0)}}
    with pytest.warns(UserWarning, match="'a' had fewer steps than others .* counts 7 steps for all"):
        load_named(made, Flat([holding]), state, weights)
    assert made.state[flat_tensor]["step"] == 7


def test_names_in_place_of_numbers_load_everywhere() -> None:
    source, weights = stepped()
    named = keyed_by_name(source.state_dict(), [f"net.{name}" for name in weights])
    assert list(named["state"]) == ["net.a", "net.b", "net.c"]
    assert [group["params"] for group in named["param_groups"]] == [["net.a", "net.b"], ["net.c"]]
    target = optimizer(parameters())
    target.load_state_dict(named)
    for own, saved in zip(target.state.values(), source.state.values(), strict=True):
        assert all(torch.equal(own[key], saved[key]) for key in saved)


def test_numbers_that_fsdp2_sorted_by_place_in_the_model_find_their_names_again() -> None:
    # The groups here are not in the order of the model: c, b, a. Both matrices are equal in shape.
    weights = {name: nn.Parameter(torch.randn(3, 3)) for name in ("a", "b", "c")}
    made = SymOpt(
        [
            {"params": [("c", weights["c"]), ("a", weights["a"])], "rule": "spectral", "name": "one"},
            {"params": [("b", weights["b"])], "rule": "spectral", "name": "two"},
        ]
    )
    for weight in weights.values():
        weight.grad = torch.randn(3, 3)
    made.step()
    saved = made.state_dict()
    place = {"a": 1, "b": 2, "c": 3}  # a frozen parameter comes first in the model
    groups = [
        {**group, "params": sorted(place[name] for name in group["param_names"])} for group in saved["param_groups"]
    ]
    state = {place[name]: value for name, value in named_state(saved).items()}
    checkpoint = {
        "state_dict": {"frozen": torch.ones(1), "a": weights["a"], "buffer": torch.ones(2), **weights},
        "optimizer_states": [{"state": state, "param_groups": groups}],
    }
    (found,) = normalized(checkpoint)["optimizer_states"]
    for name, weight in weights.items():
        assert torch.equal(found["state"][name]["momentum_buffer"], made.state[weight]["momentum_buffer"]), name


def test_a_file_that_contradicts_itself_is_refused() -> None:
    source, weights = stepped()
    saved = source.state_dict()
    saved["state"][0]["momentum_buffer"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match=r"momentum_buffer of 'a' has the shape \(2, 2\) and its weight \(4, 3\)"):
        normalized({"state_dict": weights, "optimizer_states": [saved]})


def test_the_prefix_of_a_submodule_is_found() -> None:
    assert prefix_between(["up.weight", "up.bias"], ["up.weight", "up.bias", "x"]) == ""
    assert prefix_between(["up.weight", "up.bias"], ["a.up.weight", "b.up.weight", "b.up.bias"]) == "b."
    assert prefix_between([], ["x"]) == ""
    with pytest.raises(CheckpointError, match=r"'up\.bias'"):
        prefix_between(["up.weight", "up.bias"], ["a.up.weight", "b.up.bias"])
