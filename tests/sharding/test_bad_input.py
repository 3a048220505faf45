"""What cannot be done under a strategy: an error on every rank that names the thing, the value and the way out.

Real engines and process groups on two processes; a message is what each rank's error says. Settings that no engine
starts with on a CPU are in `test_deepspeed_refusals.py`, unequal optimizers of one device each in `test_attach.py`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_symopt import Layout, SymOpt
from lit_symopt.errors import CheckpointError, ConfigError
from lit_symopt.rules import RULES
from tests.sharding.processes import Ranks
from tests.sharding.small_engines import (
    BF16_OPTIMIZER,
    OFFLOAD,
    Changes,
    everything_held,
    start,
    started,
    step,
    whole_weights,
)
from tests.sharding.small_network import (
    RATES,
    assert_change_is,
    groups_of,
    initial_weights,
    micro_batch,
    network,
    trained,
)

pytestmark = pytest.mark.deepspeed


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2, timeout=120.0) as started_ranks:  # a hang is a failure
        yield started_ranks


def message(error: type[Exception], call: Callable[[], object]) -> str:
    """What an error says; empty if there is none."""
    try:
        call()
    except error as caught:
        return str(caught)
    return ""


# -- DeepSpeed's configuration -----------------------------------------------------------------------------------


def start_and_say(stage: int, changes: Changes) -> str:
    return message(Exception, lambda: start(stage, changes))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_optimizer_in_the_deepspeed_config_as_well_is_refused(ranks: Ranks, stage: int) -> None:
    adam = {"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}
    for said in ranks(start_and_say, stage, adam):
        assert "the DeepSpeed config has an optimizer of its own, 'adam': remove the key `optimizer`" in said


@pytest.mark.parametrize(
    ("changes", "way_out"),
    [
        ({"zero_allow_untested_optimizer": None}, '"zero_allow_untested_optimizer": true'),
        ({**OFFLOAD, "zero_force_ds_cpu_optimizer": None}, '"zero_force_ds_cpu_optimizer": false'),
    ],
    ids=["untested", "offloaded"],
)
def test_a_key_that_deepspeed_asks_for_is_named_by_it_and_set_by_the_strategies(
    ranks: Ranks, changes: Changes, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for said in ranks(start_and_say, 2, changes):
        assert way_out in said
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from lit_symopt.strategies import CPUDeepSpeedStrategy

    key, value = way_out.replace('"', "").split(": ")
    for strategy in (CPUDeepSpeedStrategy(stage=2), CPUDeepSpeedStrategy(config={"zero_optimization": {"stage": 2}})):
        assert strategy.config is not None
        assert str(strategy.config[key]).lower() == value


def test_without_deepspeed_everything_else_works_and_its_strategies_name_the_extra() -> None:
    code = """
import sys
sys.modules["deepspeed"] = None  # as if it were not installed: importing it fails
import torch
from lit_symopt import AttachOptimizer, SymOpt, strategies
from lit_symopt.errors import ConfigError

weight = torch.nn.Parameter(torch.eye(3))
optimizer = SymOpt([weight], rule="spectral").attach()
weight.grad = torch.eye(3)
optimizer.step()
for strategy in (strategies.DeepSpeedStrategy, strategies.CPUDeepSpeedStrategy):
    try:
        strategy(stage=2)
    except ConfigError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f'{name} needs DeepSpeed, which is not installed: pip install "lit-symopt[deepspeed]"'
        for name in ("DeepSpeedStrategy", "CPUDeepSpeedStrategy")
    ]


def test_quantized_and_hierarchical_partitions_are_refused_by_name(ranks: Ranks) -> None:
    for said in ranks(start_and_say, 3, {"zero_optimization.zero_hpz_partition_size": 2}):
        assert "zero_hpz_partition_size=2 (hpZ) splits blocks or ranks in a way that no plan here knows" in said
    for said in ranks(start_and_say, 3, {"zero_optimization.mics_shard_size": 1}):
        assert "MiCS" in said  # DeepSpeed itself no longer has it
        assert "mics_shard_size" in said


# -- groups that differ between ranks ----------------------------------------------------------------------------


def unequal(strategy: str, changes: dict[str, dict[str, Any]]) -> str:
    """Another group on rank 1."""
    mine = changes if dist.get_rank() == 1 else {}
    if strategy == "fsdp2":
        module = _fully_sharded()
        optimizer = SymOpt(groups_of(module, **mine))
        module(micro_batch(0, dist.get_rank())).backward()
        return message(ConfigError, optimizer.step)
    if strategy == "ddp":
        return message(ConfigError, lambda: SymOpt(groups_of(network(), **mine)).attach(dist.group.WORLD))
    engine, optimizer = start(int(strategy[-1]), {}, groups=mine, attach=False)
    said = message(ConfigError, lambda: optimizer.attach(engine))
    engine.destroy()
    return said


def _fully_sharded() -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = network()
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return module


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero 0", "zero 1", "zero 2", "zero 3"])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rows": {"lr": 0.5}}, "group 'rows': lr is '0.05' on rank 0 and '0.5' on rank 1"),
        ({"spectral": {"rule": "row_norm"}}, "group 'spectral': rule is 'spectral' on rank 0 and 'row_norm' on rank 1"),
        ({"experts": {"layout": Layout.experts(Layout.transposed())}}, "group 'experts': layout is"),
        ({"rows": {"name": "lines"}}, "group 'rows' is on rank 0 and not on rank 1"),
    ],
    ids=["rate", "rule", "layout", "name"],
)
def test_unequal_groups_are_an_error_on_every_rank(
    ranks: Ranks, strategy: str, changes: dict[str, dict[str, Any]], named: str
) -> None:
    here, there = ranks(unequal, strategy, changes)
    assert here == there
    assert named in here
    assert "Build the same model and the same optimizer on every rank" in here


def regrouped(stage: int) -> str:
    """On rank 1 a matrix is in another group."""
    import deepspeed

    from tests.sharding.small_engines import config_of

    module = network()
    groups = groups_of(module)
    if dist.get_rank() == 1:
        groups[2]["params"].append(groups[0]["params"].pop(0))
    optimizer = SymOpt(groups)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config_of(stage, {}))
    said = message(ConfigError, lambda: optimizer.attach(engine))
    engine.destroy()
    return said


# ZeRO 3 gathers parameters in the order of the groups while it is built, and fails there.
@pytest.mark.parametrize("stage", [1, 2])
def test_a_parameter_in_another_group_on_one_rank_is_an_error_on_every_rank(ranks: Ranks, stage: int) -> None:
    here, there = ranks(regrouped, stage)
    assert here == there
    assert (
        "group 'spectral': param_names is \"['mix.weight', 'head.weight']\" on rank 0 and \"['head.weight']\"" in here
    )


# -- partitions that nobody attached a plan to -------------------------------------------------------------------

# Every rule on everything that it can be asked for.
BY_RULE = {rule: {"rule": rule} for rule in sorted(RULES)}


def step_without_attaching(stage: int, changes: Changes) -> dict[str, tuple[str, bool]]:
    """By rule: what is said, and whether the weights are as they were."""
    found = {}
    for rule, options in BY_RULE.items():
        groups: dict[str, dict[str, Any]] = {"spectral": options, "experts": options, "rows": options}
        engine, optimizer = start(stage, changes, groups=groups, attach=False)
        said = message(ConfigError, lambda engine=engine: step(engine, [0]))  # type: ignore[misc]
        engine.optimizer.zero_grad()
        weights = whole_weights(engine)
        found[rule] = said, all(torch.equal(weights[name], start) for name, start in initial_weights().items())
        assert not optimizer.state
        engine.destroy()
    return found


@pytest.mark.parametrize(
    ("stage", "changes"),
    [(1, {}), (2, {}), (3, {}), (2, OFFLOAD), (1, BF16_OPTIMIZER)],
    ids=["zero 1", "zero 2", "zero 3", "zero 2 offloaded", "BF16_Optimizer"],
)
def test_flat_partitions_without_a_plan_are_an_error_under_every_rule(
    ranks: Ranks, stage: int, changes: Changes
) -> None:
    for found in ranks(step_without_attaching, stage, changes):
        assert set(found) == set(RULES)
        for rule, (said, untouched) in found.items():
            assert "group 'spectral' was built over 2 parameter(s), ['mix.weight', 'head.weight']" in said, rule
            assert "call attach(engine) on the optimizer" in said, rule
            assert untouched, rule


# -- other parallelism -------------------------------------------------------------------------------------------


def tensor_parallel(named: bool) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    module = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    parallelize_module(module, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    optimizer = SymOpt(module.named_parameters(), rule="spectral")
    module(torch.ones(2, 6)).sum().backward()
    return message(ConfigError, optimizer.attach if named else optimizer.step)


@pytest.mark.parametrize("named", [True, False], ids=["attach", "step"])
def test_tensor_parallelism_is_refused_by_name(ranks: Ranks, named: bool) -> None:
    for said in ranks(tensor_parallel, named):
        assert "'0.weight' is distributed over a device mesh (tp=2), whose dimension 'tp' is tensor parallelism" in said
        assert "Only data parallelism is supported: fully_shard" in said


def flattened(built: str, use_orig_params: bool) -> str:
    """A step of an optimizer that was built before or after FSDP1 took the parameters."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def wrap(module: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(module, use_orig_params=use_orig_params, device_id=torch.device("cpu"))

    module: Any = network()
    if built == "before":
        optimizer = SymOpt(groups_of(module))
        module = wrap(module)
    else:
        module = wrap(module)
        optimizer = SymOpt([*module.parameters()], rule="adamw")
    module(micro_batch(0, dist.get_rank())).backward()
    return message(ConfigError, optimizer.step)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("built", "use_orig_params"), [("before", True), ("after", True), ("after", False)], ids=str)
def test_fsdp1_is_refused_by_name(ranks: Ranks, built: str, use_orig_params: bool) -> None:
    for said in ranks(flattened, built, use_orig_params):
        assert "flattened by FullyShardedDataParallel (FSDP1), which is not supported; use FSDP2" in said


# -- changes after attaching -------------------------------------------------------------------------------------


def change_after_attaching() -> dict[str, str]:
    said = {}
    # A layer that was added later.
    module, more = network(), nn.Linear(4, 4, bias=False)
    optimizer = SymOpt(groups_of(module)).attach(dist.group.WORLD)
    optimizer.add_param_group({"params": [("more", more.weight)], "rule": "spectral", "name": "more"})
    (module(micro_batch(0, 0)) + more.weight.square().sum()).backward()
    said["added"] = message(ConfigError, optimizer.step)
    # A partition that is another tensor now.
    engine, optimizer = start(2, {})
    zero: Any = engine.optimizer
    zero.single_partition_of_fp32_groups[0] = nn.Parameter(zero.single_partition_of_fp32_groups[0].detach().clone())
    optimizer.param_groups[0]["params"] = [zero.single_partition_of_fp32_groups[0]]
    said["replaced"] = message(ConfigError, lambda: step(engine, [0]))
    engine.destroy()
    # Attached to copies, and sharded since.
    engine, optimizer = start(2, {}, attach=False)
    said["copies"] = message(ConfigError, lambda: optimizer.attach(dist.group.WORLD))
    engine.destroy()
    return said


def test_tensors_that_were_not_there_when_it_was_attached_are_an_error(ranks: Ranks) -> None:
    for said in ranks(change_after_attaching):
        assert "holds a tensor of shape (4, 4) that was not there when it was attached to DDP" in said["added"]
        assert "that was not there when it was attached to DeepSpeed ZeRO 2; attach it again" in said["replaced"]
        assert "group 'spectral'" in said["copies"]
        assert "attach(engine)" in said["copies"]


def attach_twice(stage: int) -> dict[str, Tensor]:
    with started(stage, {}) as (engine, optimizer):
        step(engine, [0])
        optimizer.attach(engine)
        step(engine, [1, 2])
        return whole_weights(engine)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_attaching_again_changes_nothing(ranks: Ranks, stage: int) -> None:
    for weights in ranks(attach_twice, stage):
        assert_change_is(weights, trained(3))


# -- resuming something else -------------------------------------------------------------------------------------

OTHERWISE: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "rule": ({"rows": {"rule": "sign"}}, "rows: rule is 'row_norm' there and 'sign' here"),
    "centered": ({"rows": {"centered": True}}, "rows: centered is 'False' there and 'True' here"),
    "momentum": ({"spectral": {"momentum_kind": "nesterov"}}, "spectral: momentum_kind is 'ema' there and 'nesterov'"),
    "scale": ({"spectral": {"scale": "rms"}}, "spectral: scale is 'none' there and 'rms' here"),
    "layout": ({"experts": {"layout": Layout.experts(Layout.transposed())}}, "experts: layout is "),
    "taxonomy": ({"rows": {"name": "embedding"}}, "its groups are ['spectral', 'experts', 'rows', 'vectors']"),
}


def resume_otherwise(stage: int, changes: Changes, folder: str) -> dict[str, tuple[str, bool]]:
    """By difference: what is said, and whether the state is still the fresh one. And a resume of the same."""
    with started(stage, changes) as (engine, _):
        step(engine, [0])
        engine.save_checkpoint(folder, tag="one")
    found = {}
    for name, (otherwise, _) in OTHERWISE.items():
        with started(stage, changes, groups=otherwise) as (engine, optimizer):
            said = message(CheckpointError, lambda engine=engine: engine.load_checkpoint(folder, tag="one"))  # type: ignore[misc]
            state = {key: value for key, value in everything_held(optimizer).items() if not key.endswith(".weight")}
            found[name] = said, not any(bool(value.any()) for value in state.values())
    with started(stage, changes, groups={"rows": {"lr": 1.0}}) as (engine, optimizer):
        engine.load_checkpoint(folder, tag="one")
        assert {group["name"]: group["lr"] for group in optimizer.param_groups} == RATES  # rates come along
        step(engine, [1, 2])
        assert_change_is(whole_weights(engine), trained(3), 0.05 if changes else 1e-4)
    return found


@pytest.mark.parametrize(
    ("stage", "changes"), [(1, {}), (2, {}), (3, {}), (1, BF16_OPTIMIZER)], ids=["1", "2", "3", "BF16_Optimizer"]
)
def test_resuming_with_another_stack_names_what_differs(
    ranks: Ranks, stage: int, changes: Changes, tmp_path: Any
) -> None:
    for found in ranks(resume_otherwise, stage, changes, str(tmp_path)):
        for name, (_, named) in OTHERWISE.items():
            said, fresh = found[name]
            assert named in said, said
            assert "Resume with the configuration it was saved with, or load only the weights" in said
            assert fresh, name


def resume_in_another_shape(stage: int, folder: str) -> str:
    import deepspeed

    from tests.sharding.small_engines import config_of

    with started(stage, {}) as (engine, _):
        step(engine, [0])
        engine.save_checkpoint(folder, tag="one")
    module = network()
    module.experts = nn.Parameter(torch.zeros(3, 9, 5))
    optimizer = SymOpt(groups_of(module))
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config_of(stage, {}))
    optimizer.attach(engine)
    # Only the optimizer's part: weights of another shape are refused before, by torch.
    load = engine.load_checkpoint
    said = message(CheckpointError, lambda: load(folder, tag="one", custom_load_fn=lambda src, dst: None))
    engine.destroy()
    return said


@pytest.mark.parametrize("stage", [1, 3])
def test_resuming_in_another_shape_names_the_block(ranks: Ranks, stage: int, tmp_path: Any) -> None:
    for said in ranks(resume_in_another_shape, stage, str(tmp_path)):
        assert "'experts': shape (2, 9, 5) there and (3, 9, 5) here" in said
