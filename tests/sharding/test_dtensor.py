"""FSDP2's DTensors as holdings. Oracle: the whole tensors that were distributed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_symopt import Layout, SymOpt
from lit_symopt.errors import ConfigError
from lit_symopt.sharding.attach import distribution_for
from lit_symopt.sharding.holdings import Distribution
from tests.sharding.processes import Ranks, run_on_ranks

# Uneven shards, fewer slices than ranks, one slice, none, and every dimension of a stack.
SHAPES = [(7, 3), (1, 5), (2, 4), (3, 2, 5), (11,), (0, 3), (6, 4)]


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    with Ranks(3) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with Ranks(4) as ranks:
        yield ranks


def mesh_of(*sizes: int, names: tuple[str, ...] | None = None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def whole(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape) + 1.0


def optimizer_over(named: Mapping[str, Tensor]) -> SymOpt:
    # A coordinate rule takes any shape, and `column` any matrix.
    return SymOpt(
        [(name, nn.Parameter(tensor)) for name, tensor in named.items()], rule="adamw", layout=Layout.column()
    )


def found_of(optimizer: SymOpt) -> Distribution:
    distribution = distribution_for(optimizer)
    assert distribution is not None
    return distribution


def rebuilt(distribution: Distribution) -> dict[str, tuple[Tensor, list[tuple[int, int]]]]:
    """Every block put together from what the segments of all ranks say, and the stretches that were put in."""
    stretches: dict[str, list[tuple[int, int, list[float]]]] = {}
    for holding in distribution.holdings:
        local: Any = holding.tensor.detach()
        (placement,) = holding.placements
        flat = local.to_local().movedim(placement.dim, 0).flatten() if local.ndim else local.to_local().flatten()
        stretches[holding.key] = [
            (one.start, one.stop, flat[one.offset : one.offset + one.stop - one.start].tolist())
            for one in holding.segments
        ]
        assert sum(one.stop - one.start for one in holding.segments) == flat.numel()
    everybody: list[Any] = [None] * distribution.world
    dist.all_gather_object(everybody, stretches, group=distribution.process_group)
    blocks = {}
    for holding in distribution.holdings:
        (placement,) = holding.placements
        flat = torch.zeros(placement.numel)
        said = []
        for rank, other in enumerate(everybody):
            pieces = other[holding.key]
            assert [piece[:2] for piece in pieces] == [held for held in [placement.held[rank]] if held[0] < held[1]]
            for start, stop, values in pieces:
                flat[start:stop] = torch.tensor(values)
                said.append((start, stop))
        dim, shape = placement.dim, placement.shape
        moved = (shape[dim], *shape[:dim], *shape[dim + 1 :])
        blocks[holding.key] = flat.view(moved).movedim(0, dim), said
    return blocks


def assert_rebuilt(distribution: Distribution, expected: dict[str, Tensor], *, copies: int) -> None:
    for name, (block, said) in rebuilt(distribution).items():
        assert torch.equal(block, expected[name]), name
        assert sum(stop - start for start, stop in said) == copies * block.numel(), name


def distribute_everything() -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, world = mesh_of(dist.get_world_size()), dist.get_world_size()
    expected = {f"{shape} by {dim}": whole(shape) for shape in SHAPES for dim in range(-1, len(shape))}
    for placement in (Shard, Replicate):
        named = {
            name: distribute_tensor(tensor, mesh, [Shard(int(name.split()[-1])) if placement is Shard else Replicate()])
            for name, tensor in expected.items()
        }
        distribution = found_of(optimizer_over(named))
        assert distribution.strategy == "FSDP2"
        assert distribution.process_group is mesh.get_group()
        assert_rebuilt(distribution, expected, copies=1 if placement is Shard else world)


@pytest.mark.parametrize("ranks", ["two", "three"])
def test_segments_and_placements_rebuild_every_block_exactly(ranks: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(ranks)(distribute_everything)


def shard_a_model() -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3), nn.Linear(3, 1, bias=False))
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fully_shard(model[1])
    fully_shard(model)
    distribution = found_of(optimizer_over(dict(model.named_parameters())))
    assert_rebuilt(distribution, expected, copies=1)
    held = {holding.key: len(holding.segments) for holding in distribution.holdings}
    assert held["0.weight"] == 1
    assert held["2.weight"] == (dist.get_rank() == 0)  # one row, on the first rank


@pytest.mark.parametrize("ranks", ["two", "three"])
def test_a_model_under_fully_shard_is_rebuilt_from_its_uneven_and_empty_shards(
    ranks: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(ranks)(shard_a_model)


def shard_a_model_in_two_copies() -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), 0)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fully_shard(model, mesh=mesh_of(2, 2, names=("replicate", "shard")))
    distribution = found_of(optimizer_over(dict(model.named_parameters())))
    assert distribution.strategy == "FSDP2 (HSDP 2×2)"
    assert distribution.world == 4
    assert_rebuilt(distribution, expected, copies=2)


def test_under_hsdp_all_ranks_of_the_mesh_take_part_and_columns_hold_copies(four: Ranks) -> None:
    four(shard_a_model_in_two_copies)


def shard_in_pairs() -> list[int]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    # Two optimizers that know nothing of each other, each HSDP over a pair of ranks with a mesh dimension of one.
    pairs = [DeviceMesh("cpu", [[0], [2]]), DeviceMesh("cpu", [[1], [3]])]
    mesh = next(one for one in pairs if dist.get_rank() in one.mesh)
    named = {"w": distribute_tensor(whole((5, 2)), mesh, [Shard(0), Replicate()])}
    distribution = found_of(optimizer_over(named))
    assert_rebuilt(distribution, {"w": whole((5, 2))}, copies=1)
    return dist.get_process_group_ranks(distribution.process_group)


def test_the_process_group_is_that_of_the_mesh_and_not_the_world(four: Ranks) -> None:
    assert [sorted(ranks) for ranks in four(shard_in_pairs)] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def refusals() -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    uneven = (2, 3, 3, 6)[dist.get_rank()]  # torch.chunk gives 4, 4, 4, 2
    line, tensor_parallel = mesh_of(4), mesh_of(4, names=("tp",))
    plane = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tensor"))
    ignoring = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(ignoring, ignored_params=set(ignoring[1].parameters()))
    cases: dict[str, Mapping[str, Tensor]] = {
        "mesh dimension": {"w": distribute_tensor(whole((4, 4)), tensor_parallel, [Shard(0)])},
        "two dimensions": {"w": distribute_tensor(whole((4, 4)), plane, [Shard(0), Shard(1)])},
        "partial sums": {"w": DTensor.from_local(whole((4, 4)), line, [Partial()])},
        "two meshes": {
            "v": distribute_tensor(whole((4, 4)), line, [Shard(0)]),
            "w": distribute_tensor(whole((4, 4)), plane["dp"], [Shard(0)]),
        },
        "by hand": {
            "w": DTensor.from_local(whole((uneven, 4)), line, [Shard(0)], shape=torch.Size([14, 4]), stride=(4, 1))
        },
        "plain": dict(ignoring.named_parameters()),
    }
    said = {}
    for name, named in cases.items():
        try:
            distribution_for(optimizer_over(named))
        except ConfigError as error:
            said[name] = str(error)
    return said


def test_model_parallelism_and_unsharded_parameters_are_refused_by_name_on_every_rank(four: Ranks) -> None:
    everybody = four(refusals)
    for said in everybody:
        assert "dimension 'tp' is tensor parallelism" in said["mesh dimension"]
        assert "'w' is distributed by (Shard(dim=0), Shard(dim=1))" in said["two dimensions"]
        assert "(dp=2, tensor=2), as under tensor parallelism" in said["two dimensions"]
        assert "(Partial(sum),)" in said["partial sums"]
        assert "'v' and 'w' are distributed over different device meshes" in said["two meshes"]
        assert "'1.weight' is a plain tensor among sharded parameters" in said["plain"]
        assert "tensor_parallel_size=1" in said["mesh dimension"]
        assert "elements of it, not the" in said["by hand"]


def stepped_with_a_part_of_the_sum_on_each_rank() -> torch.Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(DTensor.from_local(torch.eye(4, 3), mesh, [Replicate()]))
    optimizer = SymOpt([("w", weight)], lr=1.0, rule="sgd", momentum=0.0)
    weight.grad = DTensor.from_local(torch.full((4, 3), dist.get_rank() + 1.0), mesh, [Partial()])
    optimizer.step()
    return weight.detach().to_local()  # type: ignore[attr-defined, no-any-return]


def test_a_gradient_that_is_a_part_of_a_sum_on_each_rank_is_added_up() -> None:
    for weight in run_on_ranks(stepped_with_a_part_of_the_sum_on_each_rank, 2):
        assert torch.equal(weight, torch.eye(4, 3) - 3.0)
