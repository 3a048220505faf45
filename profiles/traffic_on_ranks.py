"""One rank of `profiles/traffic.py`: a model trained for three steps under a strategy, and every collective counted.

Convention: bytes are those that leave a rank, on a ring where there is a choice, b being the bytes of the tensor:
all-reduce 2b(W − 1)/W, all-gather (W − 1) × what the rank contributes, reduce-scatter, reduce and broadcast b(W − 1)/W,
all-to-all what goes to others. Gloo may route otherwise; the convention makes strategies comparable.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from inspect import getattr_static
from math import prod
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_symopt import SymOpt, SymOptConfig

Phase = Literal["update", "rest"]
VOCABULARY = 16384
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 5,  # so that flat boundaries cut matrices
    "num_attention_heads": 4,  # of 64
    "max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3": {**SHARED, "intermediate_size": 704, "num_key_value_heads": 2, "head_dim": 64},
    "OLMoE": {
        **SHARED,
        "intermediate_size": 128,
        "num_key_value_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
}
DEEPSPEED_MUON, ADAMW = "DeepSpeed's Muon", "torch.optim.AdamW"
STAGES = {"ZeRO 1": 1, "ZeRO 2": 2, "ZeRO 3": 3, "ZeRO 1, BF16_Optimizer": 1, "ZeRO 3, bf16": 3}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured.

    Attributes:
        model: a key of `MODELS`.
        strategy: DDP, FSDP2 or a key of `STAGES`.
        optimizer: a stack of ours, `DEEPSPEED_MUON` or `ADAMW`.
    """

    model: str
    strategy: str
    optimizer: str


class WithLoss(nn.Module):
    """A language model whose call is its training loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.net = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """The mean cross-entropy of token ids `[batch, length]`."""
        loss: Tensor = self.net.training_loss({"input_ids": input_ids})
        return loss


def build(name: str) -> WithLoss:
    """The model of that name, the same on every rank."""
    import lit_symopt.models

    torch.manual_seed(0)
    return WithLoss(getattr(lit_symopt.models, name)(**MODELS[name]))


def batch() -> Tensor:
    """Token ids `[1, 32]`, the same on every rank.

    The experts are modules that run if a token reaches them: where ranks run different ones, DeepSpeed's ZeRO 3 stops.
    """
    return torch.randint(0, VOCABULARY, (1, 32), generator=torch.Generator().manual_seed(1))


# -- counting ----------------------------------------------------------------------------------------------------


class Traffic:
    """Bytes that leave this rank, by phase and by method of the process group."""

    def __init__(self) -> None:
        self.sent: Counter[tuple[Phase, str]] = Counter()
        self.calls: Counter[tuple[Phase, str]] = Counter()
        self.phase: Phase = "rest"

    def inside(self, owner: Any, name: str) -> None:
        """Count what a method of an object sends as the update's."""
        original = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            self.phase = "update"
            try:
                return original(*args, **options)
            finally:
                self.phase = "rest"

        setattr(owner, name, counted)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Intercept every method of every process group that moves tensors."""
        # What the class has in store, not what it hands out: only that binds to a group when it is put back.
        stored = {name: getattr_static(dist.ProcessGroup, name) for name in SENT if hasattr(dist.ProcessGroup, name)}
        for name in stored:
            setattr(dist.ProcessGroup, name, self._counted(name, getattr(dist.ProcessGroup, name)))
        try:
            yield
        finally:
            for name, original in stored.items():
                setattr(dist.ProcessGroup, name, original)

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: dist.ProcessGroup, *args: Any, **options: Any) -> Any:
            sent = SENT[name](args, group.size(), group.rank())
            if sent:
                self.sent[self.phase, name] += round(sent)
                self.calls[self.phase, name] += 1
            return original(group, *args, **options)

        return call

    def rows(self) -> list[dict[str, Any]]:
        """As plain types."""
        return [
            {"phase": phase, "method": name, "bytes": sent, "calls": self.calls[phase, name]}
            for (phase, name), sent in sorted(self.sent.items())
        ]


def _bytes(found: Any) -> int:
    if isinstance(found, Tensor):
        return found.numel() * found.element_size()
    return sum(map(_bytes, found)) if isinstance(found, list | tuple) else 0


def _all_to_all(args: tuple[Any, ...], world: int, rank: int) -> float:
    _, sent, _, split = args[:4]
    kept = split[rank] if split else sent.numel() // world
    return float((sent.numel() - kept) * sent.element_size())


def _all_reduce(args: tuple[Any, ...], world: int, rank: int) -> float:
    return 2 * _bytes(args[0]) * (world - 1) / world


def _gathered(args: tuple[Any, ...], world: int, rank: int) -> float:
    return _bytes(args[1]) * (world - 1)


def _scattered(args: tuple[Any, ...], world: int, rank: int) -> float:
    return _bytes(args[1]) * (world - 1) / world


def _rooted(args: tuple[Any, ...], world: int, rank: int) -> float:
    return _bytes(args[0]) * (world - 1) / world


def _refused(name: str, args: tuple[Any, ...], world: int, rank: int) -> float:
    raise NotImplementedError(f"{name} is not counted: say in the convention what it sends")


SENT: dict[str, Callable[[tuple[Any, ...], int, int], float]] = {
    **dict.fromkeys(("all_to_all_single", "alltoall_base"), _all_to_all),
    **dict.fromkeys(("allreduce", "allreduce_coalesced"), _all_reduce),
    **dict.fromkeys(
        ("_allgather_base", "all_gather_single", "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced"),
        _gathered,
    ),
    **dict.fromkeys(
        ("_reduce_scatter_base", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor_coalesced"),
        _scattered,
    ),
    **dict.fromkeys(("broadcast", "reduce"), _rooted),
    **{name: partial(_refused, name) for name in ("alltoall", "gather", "scatter", "send")},
}


# -- training ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """A model under a strategy.

    Attributes:
        optimizer: the one that the strategy calls.
        backward: forward and backward pass on token ids.
        step: the step of the strategy, around that of the optimizer.
        updating: objects and methods in which matrices are updated.
        kept: bytes that are kept from step to step for exchanges.
    """

    optimizer: torch.optim.Optimizer
    backward: Callable[[Tensor], None]
    step: Callable[[], None]
    updating: list[tuple[Any, str]]
    kept: Callable[[], int] = lambda: 0


def optimizer_of(case: Case, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a case that is ours to make."""
    if case.optimizer == ADAMW:
        return torch.optim.AdamW(module.parameters(), lr=1e-3)
    return SymOpt.for_module(module, config=SymOptConfig(stack=case.optimizer))  # type: ignore[arg-type]


def _plain(module: nn.Module, optimizer: torch.optim.Optimizer) -> Training:
    def backward(input_ids: Tensor) -> None:
        optimizer.zero_grad()
        module(input_ids).backward()

    def step() -> None:
        optimizer.step()  # looked up in every step: counting replaces it

    return Training(optimizer, backward, step, [(optimizer, "step")])


def _ddp(case: Case) -> Training:
    module = build(case.model)
    optimizer = optimizer_of(case, module)
    if isinstance(optimizer, SymOpt):
        optimizer.attach(dist.group.WORLD)
    return _plain(nn.parallel.DistributedDataParallel(module), optimizer)


def _fsdp2(case: Case) -> Training:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = build(case.model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in module.net.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return _plain(module, optimizer_of(case, module))


def _deepspeed(case: Case) -> Training:
    import deepspeed

    from lit_symopt.strategies.cpu import communicate_by_gloo

    communicate_by_gloo()
    module = build(case.model)
    config = deepspeed_config(case)
    if case.optimizer == DEEPSPEED_MUON:
        engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
    else:
        client = optimizer_of(case, module)
        engine, *_ = deepspeed.initialize(model=module, optimizer=client, config=config)
        if isinstance(client, SymOpt):
            client.attach(engine)
    wrapper = engine.optimizer
    updating: list[tuple[Any, str]] = [(engine.basic_optimizer, "step")]
    if case.optimizer == DEEPSPEED_MUON:  # where it orthogonalizes, and gathers what it needs for that
        places = ("_apply_muon_to_accumulated_grads", "get_flat_partition", "_prepare_muon_updates")
        updating += [(wrapper, name) for name in places if hasattr(wrapper, name)]
    return Training(
        engine.basic_optimizer,
        lambda input_ids: engine.backward(engine(input_ids)),
        engine.step,
        updating,
        kept=lambda: int(getattr(wrapper, "_muon_allgather_buffer_bytes", 0)),
    )


def deepspeed_config(case: Case) -> dict[str, Any]:
    """DeepSpeed's configuration of a case: its defaults, and what its Muon asks for."""
    zero: dict[str, Any] = {"stage": STAGES[case.strategy]}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
    }
    if case.strategy.endswith("bf16"):
        config["bf16"] = {"enabled": True}
    if case.strategy.endswith("BF16_Optimizer"):
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if case.optimizer == DEEPSPEED_MUON:
        params = {"lr": 1e-3, "momentum": 0.95, "weight_decay": 0.0, "torch_adam": True}
        config["optimizer"] = {"type": "Muon", "params": params}
        if zero["stage"] == 3:
            zero["reduce_scatter"] = False  # "Muon and reduce scatter cannot be used together"
    return config


def measure(case: Case) -> dict[str, Any]:
    """What one rank sends in the second step, and allocates in the third."""
    make = {"DDP": _ddp, "FSDP2": _fsdp2}.get(case.strategy, _deepspeed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _counting_muon() as orthogonalized:
            training = make(case)
            training.backward(batch())
            training.step()
            traffic = Traffic()
            for owner, name in training.updating:
                traffic.inside(owner, name)
            orthogonalized.clear()
            with traffic.watching():
                training.backward(batch())
                training.step()
            work = sum(orthogonalized)
            training.backward(batch())
            peak = peak_bytes(training.step)
        found = {
            **asdict(case),
            "world": dist.get_world_size(),
            "rank": dist.get_rank(),
            "sent": traffic.rows(),
            "peak": peak,
            "kept": training.kept(),
            "state": _state_bytes(training.optimizer),
            "work": work,
        }
        if isinstance(training.optimizer, SymOpt):
            report = training.optimizer.plan_report()
            found["planned"] = {role: by_rank[dist.get_rank()] for role, by_rank in report.sent.items()}
            found["work"] = report.work[dist.get_rank()]
    del training
    gc.collect()
    return found


@contextmanager
def _counting_muon() -> Iterator[list[int]]:
    """Multiply-adds m·n·min(m, n) of every matrix that DeepSpeed's Muon orthogonalizes on this rank."""
    found: list[int] = []
    try:
        from deepspeed.runtime.zero.muon import original_muon
    except ImportError:
        yield found
        return
    original = original_muon.muon_update

    def counted(gradient: Tensor, *args: Any, **options: Any) -> Any:
        found.append(work_of(tuple(gradient.shape)))
        return original(gradient, *args, **options)

    original_muon.muon_update = counted
    try:
        yield found
    finally:
        original_muon.muon_update = original


def work_of(shape: tuple[int, ...]) -> int:
    """Multiply-adds of the polar factors of a stack of matrices, up to a constant."""
    return prod(shape) * min(shape[-2:])


def peak_bytes(step: Callable[[], None]) -> int:
    """The most that was allocated at once during a step, over what was allocated before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    total = peak = 0
    results: Any = profiled.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    local: list[Any] = [value.to_local() if hasattr(value, "to_local") else value for value in values]
    return sum(_bytes(value) for value in local if value.dim() > 0)


# -- sharing under DDP -------------------------------------------------------------------------------------------


def shared_and_alone(model: str, stack: str, repetitions: int) -> dict[str, list[float]]:
    """Seconds of `optimizer.step()`, the slowest rank's: each rank updates all, and the ranks share the work.

    The two take turns, in an order that alternates, with the same weights and gradients.
    """
    alone = build(model)
    modules = {"alone": alone, "shared": deepcopy(alone)}
    optimizers = {}
    for name, module in modules.items():
        optimizers[name] = SymOpt.for_module(module, config=SymOptConfig(stack=stack))  # type: ignore[arg-type]
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    optimizers["shared"].attach(dist.group.WORLD)
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for repetition in range(-2, repetitions):  # two to warm up
        for name in sorted(optimizers, reverse=bool(repetition % 2)):
            dist.barrier()
            began = time.perf_counter()
            optimizers[name].step()
            took = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if repetition >= 0:
                seconds[name].append(float(took))
    return seconds


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Time shared over time alone, by repetition: median, smallest, largest."""
    found = [shared / alone for shared, alone in zip(seconds["shared"], seconds["alone"], strict=True)]
    return {"median": statistics.median(found), "smallest": min(found), "largest": max(found)}
