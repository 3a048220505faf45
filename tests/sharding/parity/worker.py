"""Training under a strategy, on one rank. Runs in a process of `tests.sharding.processes`."""

from __future__ import annotations

import gc
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_symopt import SymOpt
from lit_symopt.sharding.report import PlanReport
from tests.sharding.parity.cases import Case
from tests.sharding.parity.models import WithLoss, batch, build, optimizer_for
from tests.sharding.parity.traffic import Traffic


@dataclass
class Found:
    """What a rank found.

    Attributes:
        weights: by name, whole, in fp32, after the last step; only on rank 0.
        digest: of the weights; equal on ranks that agree bitwise.
        held: elements of the parameters that the strategy keeps on this rank for the optimizer.
        state: bytes of the optimizer's state on this rank, step counters left out.
        due: bytes of state that the elements held here are due: 4 each, 8 under AdamW, 0 without momentum.
        sent: bytes that left this rank inside `optimizer.step()` during the last training step, by collective.
        calls: number of collectives, likewise.
        report: what the plan says of that, if there is one.
        trace: in half precision, of every step: the model's weights and the gradients that the optimizer was given.
        half: in half precision, the model's weights after the last step; both only on rank 0.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    digest: str = ""
    held: int = 0
    state: int = 0
    due: int = 0
    sent: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    report: PlanReport | None = None
    trace: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = field(default_factory=list)
    half: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """A model under a strategy.

    Attributes:
        optimizer: the client.
        step: takes a training step on this rank's micro-batches.
        weights: all of them, whole.
        held: pairs of a group's name and a tensor that the strategy keeps for the optimizer on this rank.
        half: the weights that the model computes with, where they are in half precision.
        gradients: what the optimizer is about to be given, where it is not the model's `.grad`.
    """

    optimizer: torch.optim.Optimizer
    step: Callable[[list[Tensor]], None]
    weights: Callable[[], dict[str, Tensor]]
    held: Callable[[], list[tuple[str, Tensor]]]
    half: Callable[[], dict[str, Tensor]] | None = None
    gradients: Callable[[], dict[str, Tensor]] | None = None


def run(cases: list[Case]) -> list[Found]:
    """Train the cases one after another in this process group."""
    return [train(case) for case in cases]


def train(case: Case) -> Found:
    """Train one case: this rank takes its share of every step's micro-batches."""
    rank = dist.get_rank()
    found = Found()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = {"ddp": _ddp, "fsdp2": _fsdp2}.get(case.strategy, _deepspeed)
        with kind(case) as training:
            traffic = Traffic()
            with _traced(training, found), traffic.watching(training.optimizer):
                for number in range(case.work.steps):
                    traffic.reset()
                    training.step([batch(number, micro * case.world + rank) for micro in range(case.accumulated)])
            found.sent, found.calls = dict(traffic.bytes), dict(traffic.calls)
            _account(found, training)
            whole = training.weights()
            found.digest = _digest(whole)
            found.half = training.half() if training.half else {}
            if rank > 0:
                whole, found.trace, found.half = {}, [], {}
            found.weights = whole
    gc.collect()
    return found


@contextmanager
def _traced(training: Training, found: Found) -> Iterator[None]:
    """Keeps weights and gradients of every step, where the strategy has them in half and in full precision."""
    optimizer, half, gradients = training.optimizer, training.half, training.gradients
    if half is None or gradients is None:
        yield
        return
    step = optimizer.step

    def traced(*args: Any, **options: Any) -> Any:
        found.trace.append((half(), gradients()))
        return step(*args, **options)

    optimizer.step = traced  # type: ignore[method-assign]
    yield
    optimizer.step = step  # type: ignore[method-assign]


def _plain_step(case: Case, module: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """The usual loop; strategies average gradients over ranks, accumulation is ours to average."""

    def step(batches: list[Tensor]) -> None:
        optimizer.zero_grad()
        for input_ids in batches:
            (module(input_ids) / len(batches)).backward()
        if case.work.clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), case.work.clip)
        optimizer.step()

    return step


@contextmanager
def _ddp(case: Case) -> Iterator[Training]:
    module = build(case.work.family)
    optimizer = optimizer_for(case.work, module)
    if isinstance(optimizer, SymOpt):
        optimizer.attach(dist.group.WORLD)
    wrapped = nn.parallel.DistributedDataParallel(module)
    yield Training(
        optimizer,
        _plain_step(case, wrapped, optimizer),
        weights=lambda: _detached(dict(module.named_parameters())),
        held=lambda: [
            (str(group.get("name")), tensor) for group in optimizer.param_groups for tensor in group["params"]
        ],
    )


@contextmanager
def _fsdp2(case: Case) -> Iterator[Training]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = build(case.work.family)
    mesh = init_device_mesh("cpu", (case.world,))
    for layer in module.net.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    optimizer = optimizer_for(case.work, module)
    yield Training(
        optimizer,
        _plain_step(case, module, optimizer),
        weights=lambda: _detached({name: _distributed(p).full_tensor() for name, p in module.named_parameters()}),
        held=lambda: [
            (str(group.get("name")), _distributed(tensor).to_local())
            for group in optimizer.param_groups
            for tensor in group["params"]
        ],
    )


@contextmanager
def _deepspeed(case: Case) -> Iterator[Training]:
    import deepspeed

    config = deepspeed_config(case)
    linear = torch.nn.functional.linear
    module = _under_zero_init(case, config) if case.strategy == "zero3_init" else build(case.work.family)
    optimizer = optimizer_for(case.work, module)
    names = [str(group.get("name")) for group in optimizer.param_groups]
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    if isinstance(optimizer, SymOpt):
        optimizer.attach(engine)

    def step(batches: list[Tensor]) -> None:
        for input_ids in batches:
            engine.backward(engine(input_ids))
            engine.step()

    def weights() -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        if case.strategy == "bf16":  # the masters
            return _detached({name: safe_get_full_fp32_param(p) for name, p in module.named_parameters()})
        sharded = case.strategy.startswith("zero3")
        with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=sharded):
            return _detached(dict(module.named_parameters()))

    def held() -> list[tuple[str, Tensor]]:
        wrapper = engine.optimizer
        if case.strategy.startswith("zero3"):
            flats, group_of = wrapper.fp32_partitioned_groups_flat, wrapper.sub_group_to_group_id
            return [(names[group_of[index]], flat) for index, flat in enumerate(flats)]
        bf16 = case.strategy == "bf16"
        flats = wrapper.fp32_groups_flat_partition if bf16 else wrapper.single_partition_of_fp32_groups
        return list(zip(names, flats, strict=True))

    def half() -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    def gradients() -> dict[str, Tensor]:
        name_of = {id(parameter): name for name, parameter in module.named_parameters()}
        groups = zip(engine.optimizer.bf16_groups, engine.optimizer.fp32_groups_gradients, strict=True)
        return {
            name_of[id(parameter)]: gradient.clone().view(parameter.shape)
            for parameters, reduced in groups
            for parameter, gradient in zip(parameters, reduced, strict=True)
        }

    try:
        if case.strategy == "bf16":
            yield Training(optimizer, step, weights, held, half, gradients)
        else:
            yield Training(optimizer, step, weights, held)
    finally:
        engine.destroy()
        torch.nn.functional.linear = linear  # zero.Init puts its own there and leaves it to all later models


def deepspeed_config(case: Case) -> dict[str, Any]:
    """DeepSpeed's configuration of a case."""
    stage = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_init": 3, "bf16": 1}[case.strategy]
    half = {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # by default bf16: every gradient would be rounded once more
    }
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": case.accumulated,
        "gradient_clipping": case.work.clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **dict(case.zero)},
        "steps_per_print": 10**9,
        **(half if case.strategy == "bf16" else {}),
    }


def _under_zero_init(case: Case, config: Mapping[str, Any]) -> WithLoss:
    """Built in shards, with the weights that a model built in one piece has: the families see to that."""
    import deepspeed

    build(case.work.family)  # imports the family's file of transformers, whose mixtures break if zero.Init is on then
    with deepspeed.zero.Init(config_dict_or_path=dict(config)):
        return build(case.work.family)


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().float().clone() for name, tensor in tensors.items()}


def _digest(weights: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in weights.items():
        sha.update(name.encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def _account(found: Found, training: Training) -> None:
    """Elements and state on this rank, and what the plan says."""
    optimizer, held = training.optimizer, training.held()
    found.held = sum(tensor.numel() for _, tensor in held)
    found.state = sum(
        tensor.numel() * tensor.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if (tensor := _local(value)).dim() > 0
    )
    if isinstance(optimizer, SymOpt):
        kept = {
            str(group["name"]): 2 if group["rule"] == "adamw" else group["momentum"] > 0
            for group in optimizer.param_groups
        }
        found.report = optimizer.plan_report()
    else:
        kept = {"None": 2}
    found.due = sum(4 * tensor.numel() * kept[name] for name, tensor in held)


def _distributed(tensor: Tensor) -> Any:
    """A tensor that is known to be a `DTensor`, whose class has no types."""
    return tensor


def _local(tensor: Tensor) -> Tensor:
    return _distributed(tensor).to_local() if hasattr(tensor, "to_local") else tensor
