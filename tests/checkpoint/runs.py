"""Small runs under every strategy, in plain loops: trained, saved, loaded again. Called on every rank.

The training data are the same whatever the number of ranks: six sequences a step, shared out evenly. So all runs that
start alike are the same run, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_symopt import Block, BlockTaxonomy, Role, SymOpt, SymOptConfig
from lit_symopt.checkpoint import load_named, named_state
from lit_symopt.config import RoleConfig

GLOBAL_BATCH = 6
CONFIG = SymOptConfig(
    lr=2e-2,
    roles={
        "linear": RoleConfig(weight_decay=0.1),
        "lm_head": RoleConfig(momentum=0.0),
        "down": RoleConfig(rule="adamw"),
    },
)
# What the Trainer would give a strategy to keep.
CLIENT = {"global_step": 3, "epoch": 0, "loops": {"fit_loop": {}}, "lr_schedulers": [{"last_epoch": 3}]}


class Net(nn.Module):
    """No dimension is a multiple of two or three; one parameter is tied, one frozen, one buffer kept."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 7)
        self.up = nn.Linear(7, 13)
        self.down = nn.Linear(13, 7)
        self.fixed = nn.Parameter(torch.linspace(0.5, 1.5, 7), requires_grad=False)
        self.head = nn.Linear(7, 5, bias=False)
        self.unembedding = nn.Linear(7, 11, bias=False)
        self.unembedding.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor([0.7, 1.1, 1.3]))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + self.down(torch.tanh(self.up(hidden * self.fixed))) * self.scale[0]
        logits = self.unembedding(hidden)
        targets = tokens.roll(-1, dims=1)
        likely = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss: Tensor = likely + self.head(hidden).float().square().mean()
        return loss

    @staticmethod
    def block_taxonomy() -> BlockTaxonomy:
        return BlockTaxonomy(
            [
                Block("embedding.weight", role=Role.TIED_EMBEDDING),
                Block("up.weight", role=Role.LINEAR),
                Block("down.weight", role=Role.DOWN),
                Block("fixed", role=Role.VECTOR),
                Block("head.weight", role=Role.LM_HEAD, shift_invariant=False),
                Block("*.bias", role=Role.VECTOR),
            ]
        )


def net() -> Net:
    """The same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def batch(step: int) -> Tensor:
    """This rank's share of a step's sequences."""
    tokens = torch.randint(0, 11, (GLOBAL_BATCH, 9), generator=torch.Generator().manual_seed(step))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return tokens.chunk(world)[rank]


class Run:
    """A net, its optimizer and how to step and save it, under one strategy.

    Args:
        strategy: `one`, `ddp`, `fsdp2`, `zero0`, `zero1`, `zero2`, `zero3`, `bf16_optimizer` or `bf16_zero3`.
        options: of `zero_optimization`.
    """

    def __init__(self, strategy: str, **options: Any) -> None:
        self.strategy = strategy
        self.module = net()
        self.engine: Any = None
        self.model: Any = self.module
        if strategy == "fsdp2":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for child in (self.module.up, self.module.down):
                fully_shard(child, mesh=mesh)
            fully_shard(self.module, mesh=mesh)
        self.optimizer = SymOpt.for_module(self.module, self.module.block_taxonomy(), config=CONFIG)
        if strategy == "ddp":
            self.model = nn.parallel.DistributedDataParallel(self.module)
            self.optimizer.attach(dist.group.WORLD)
        elif strategy not in ("one", "fsdp2"):
            self.engine = self.model = _engine(self.module, self.optimizer, strategy, options)
            self.optimizer.attach(self.engine)

    def steps(self, first: int, last: int) -> None:
        """Train on the batches `[first, last)`."""
        for step in range(first, last):
            loss = self.model(batch(step))
            if self.engine is not None:
                self.engine.backward(loss)
                self.engine.step()
            else:
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()

    @torch.no_grad()
    def mark(self) -> None:
        """Makes every state tensor a function of the weights, so that what belongs where can be told from a file."""
        for holding_tensor in self.held():
            weight, state = _local(holding_tensor), self.optimizer.state[holding_tensor]
            for key in state.keys() & MARKS.keys():
                _local(state[key]).copy_(MARKS[key](weight))

    def held(self) -> list[Tensor]:
        """What the optimizer holds."""
        if self.optimizer.distribution is not None:
            return [holding.tensor for holding in self.optimizer.distribution.holdings]
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def weights(self) -> dict[str, Tensor]:
        """The whole weights on every rank, by the strategy's own means."""
        if self.strategy.endswith("zero3"):
            import deepspeed

            parameters = list(self.module.parameters())
            with deepspeed.zero.GatheredParameters(parameters):
                return {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        state = self.module.state_dict()
        return {name: getattr(value, "full_tensor", value.clone)().detach() for name, value in state.items()}

    def save(self, path: Path) -> None:
        """As the Trainer's strategies save; by one process for `one` and `ddp`."""
        if self.engine is not None:
            self.engine.save_checkpoint(str(path), client_state=dict(CLIENT), tag="checkpoint")
        elif self.strategy == "fsdp2":
            self._save_fsdp2(path)
        elif not dist.is_initialized() or dist.get_rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            states = [self.optimizer.state_dict()]
            torch.save({**CLIENT, "state_dict": self.module.state_dict(), "optimizer_states": states}, path)
        if dist.is_initialized():
            dist.barrier()

    def load(self, path: Path) -> None:
        """Continue from an ordinary file, as the Trainer's strategies do."""
        if self.strategy == "fsdp2":
            from lightning.fabric.strategies.model_parallel import _load_checkpoint

            state = {"state_dict": self.module, "optimizer_0": self.optimizer}
            _load_checkpoint(path, state=state, optimizer_states_from_list=True, weights_only=True)
            return
        saved = torch.load(path, mmap=True, weights_only=True)
        weights, (state,) = saved["state_dict"], saved["optimizer_states"]
        if self.engine is None:
            self.module.load_state_dict(weights)
            self.optimizer.load_state_dict(state)
            return
        from lit_symopt.sharding.zero_weights import load_weights, publish

        assert self.optimizer.distribution is not None
        load_weights(self.engine, weights)
        load_named(self.optimizer, self.optimizer.distribution, named_state(state), weights)
        publish(self.engine)

    def _save_fsdp2(self, path: Path) -> None:
        """What Lightning's ModelParallelStrategy does, its own functions."""
        from lightning.fabric.strategies.fsdp import _distributed_checkpoint_save
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            get_optimizer_state_dict,
        )
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
        from torch.distributed.fsdp import OptimStateKeyType

        whole = path.suffix == ".ckpt"
        options = StateDictOptions(full_state_dict=whole, cpu_offload=True)
        weights = get_model_state_dict(self.module, options=options)
        state = get_optimizer_state_dict(self.module, self.optimizer, options=options)
        if whole:
            if dist.get_rank() == 0:
                numbered = FSDP.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_ID, self.module)
                torch.save({**CLIENT, "state_dict": weights, "optimizer_states": [numbered]}, path)
        else:
            path.mkdir(parents=True, exist_ok=True)
            _distributed_checkpoint_save({"state_dict": weights, "optimizer_0": state}, path)
            if dist.get_rank() == 0:
                torch.save(CLIENT, path / "meta.pt")


MARKS: dict[str, Callable[[Tensor], Tensor]] = {
    "momentum_buffer": lambda weight: 2 * weight.float() + 1,
    "exp_avg": lambda weight: 3 * weight.float() - 1,
    "exp_avg_sq": lambda weight: weight.float().square(),
}


def trained_and_saved(strategy: str, path: str, *, first: int = 0, last: int = 3, **options: Any) -> dict[str, Any]:
    """A few steps, marked state, a checkpoint; returns whole weights and what the optimizer remembers of its groups."""
    with _quiet():
        run = Run(strategy, **options)
        run.steps(first, last)
        run.mark()
        run.save(Path(path))
        names = [name for group in run.optimizer.param_groups for name in group["param_names"]]
        return {"weights": run.weights(), "names": names}


def went_on(
    strategy: str, source: str, *, first: int = 3, last: int = 13, save: str | None = None, **options: Any
) -> dict[str, Tensor]:
    """The weights after steps that continue from an ordinary file."""
    with _quiet():
        run = Run(strategy, **options)
        run.load(Path(source))
        run.steps(first, last)
        if save is not None:
            run.save(Path(save))
        return run.weights()


def trained(strategy: str, *, saved_at: int, path: str, last: int, **options: Any) -> dict[str, Tensor]:
    """The weights of a run that saves at a step and is not moved."""
    with _quiet():
        run = Run(strategy, **options)
        run.steps(0, saved_at)
        run.save(Path(path))
        run.steps(saved_at, last)
        return run.weights()


def _engine(module: nn.Module, optimizer: SymOpt, strategy: str, options: dict[str, Any]) -> Any:
    import deepspeed

    from lit_symopt.strategies.cpu import communicate_by_gloo

    communicate_by_gloo()
    half = strategy.startswith("bf16")
    stage = 1 if strategy == "bf16_optimizer" else int(strategy[-1])
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size(),
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **options},
    }
    if half:
        config["bf16"] = {"enabled": True}
    if strategy == "bf16_optimizer":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=module, model_parameters=parameters, optimizer=optimizer, config=config)
    return engine


def _local(tensor: Tensor) -> Tensor:
    to_local = getattr(tensor, "to_local", None)
    return to_local() if callable(to_local) else tensor.detach()


@contextmanager
def _quiet() -> Iterator[None]:
    import logging
    import warnings

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
