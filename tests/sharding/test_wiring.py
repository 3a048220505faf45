"""The callback that attaches, in real Trainers on two processes. Oracle: one process with the batches of both."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_symopt.errors import ConfigError
from tests.sharding.processes import Ranks

STEPS = 4


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2, group=False) as started:
        yield started


def module_of(kind: str, **options: Any) -> Any:
    """A module that uses the library in one of several ways; classes are made here, so that lightning is late."""
    import lightning as L

    from lit_symopt import AttachOptimizer, Block, BlockTaxonomy, Role, SymOpt, SymOptConfig, SymOptMixin

    class Net(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
            self.strategies: list[str] = []

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x)
            return y

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_model(self) -> None:
            from lightning.pytorch.strategies import ModelParallelStrategy
            from torch.distributed.fsdp import FSDPModule, fully_shard

            if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.net, FSDPModule):
                mesh = self.device_mesh
                assert mesh is not None
                fully_shard(self.net, mesh=mesh["data_parallel"])

    blocks = [Block("*weight", role=Role.LINEAR), Block("*bias", role=Role.VECTOR)]

    class Declared(SymOptMixin, Net):
        symopt = SymOptConfig(lr=0.02)

        def block_taxonomy(self) -> BlockTaxonomy:
            return BlockTaxonomy(blocks)

        def on_fit_start(self) -> None:  # an override that calls no super() takes nothing away
            return

    class Inferred(SymOptMixin, Net):
        symopt = SymOptConfig(lr=0.02)

    class ByHand(Net):
        def configure_optimizers(self) -> SymOpt:
            return SymOpt.for_module(self, BlockTaxonomy(blocks), config=SymOptConfig(lr=0.02))

    class Listed(ByHand):
        def configure_callbacks(self) -> list[L.Callback]:
            return [AttachOptimizer()]

    return {"declared": Declared, "inferred": Inferred, "by hand": ByHand, "listed": Listed}[kind]()


def fit(kind: str, folder: str, *, strategy: Any = "auto", **options: Any) -> dict[str, Any]:
    """Trains STEPS steps with a global batch of 8 and says what came out."""
    import lightning as L
    from torch.utils.data import DataLoader

    generator = torch.Generator().manual_seed(5)
    pairs = list(zip(torch.randn(8 * STEPS, 5, generator=generator), torch.arange(8 * STEPS) % 3, strict=True))
    module = module_of(kind)
    world = options.get("devices", 1)
    own = pairs[int(os.environ.get("RANK", "0")) % world :: world]  # the ranks' batches make up those of one process
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        strategy=strategy_of(strategy),
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module, DataLoader(own, batch_size=8 // world))  # type: ignore[arg-type]
    optimizer: Any
    (optimizer,) = trainer.optimizers
    weights = {name: getattr(w, "full_tensor", lambda w=w: w)().detach() for name, w in module.named_parameters()}
    return {
        "weights": weights,
        "strategy": None if optimizer.distribution is None else optimizer.distribution.strategy,
        "callbacks": [type(callback).__name__ for callback in trainer.callbacks],  # type: ignore[attr-defined]
        "roles": sorted({str(group["role"]) for group in optimizer.param_groups}),
    }


def strategy_of(name: str) -> Any:
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    return name


def refused(kind: str, folder: str, **options: Any) -> str:
    try:
        fit(kind, folder, **options)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = fit("declared", str(tmp_path_factory.mktemp("alone")))["weights"]
    return weights


def assert_equal_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, weight in expected.items():
        assert (found[name] - weight).norm() <= 1e-5 * weight.norm(), name


@pytest.mark.parametrize("kind", ["declared", "inferred", "listed"])
@pytest.mark.parametrize(("strategy", "called"), [("ddp", "DDP"), ("fsdp2", "FSDP2")])
def test_two_processes_train_the_weights_of_one(
    kind: str, strategy: str, called: str, ranks: Ranks, alone: dict[str, Tensor], tmp_path: Path
) -> None:
    expected = alone if kind != "inferred" else fit("inferred", str(tmp_path))["weights"]
    for found in ranks(fit, kind, str(tmp_path), strategy=strategy, devices=2):
        assert found["strategy"] == called
        assert found["callbacks"].count("AttachOptimizer") == 1
        assert_equal_weights(found["weights"], expected)


def test_ddp_without_the_callback_trains_the_same_weights_and_fsdp2_is_found_without_it(
    ranks: Ranks, alone: dict[str, Tensor], tmp_path: Path
) -> None:
    for strategy, called in (("ddp", None), ("fsdp2", "FSDP2")):
        for found in ranks(fit, "by hand", str(tmp_path), strategy=strategy, devices=2):
            assert found["strategy"] == called
            assert "AttachOptimizer" not in found["callbacks"]
            assert_equal_weights(found["weights"], alone)


def test_on_one_device_nothing_is_attached(tmp_path: Path) -> None:
    assert fit("declared", str(tmp_path))["strategy"] is None


def test_fsdp1_is_refused_by_name_before_the_model_is_set_up() -> None:
    from lightning.pytorch.strategies import FSDPStrategy

    from lit_symopt.wiring import _refuse_unsupported

    with pytest.raises(ConfigError, match=r"FSDPStrategy is FSDP1.*use ModelParallelStrategy"):
        _refuse_unsupported(FSDPStrategy(), 1)


def test_other_strategies_of_several_devices_are_refused_by_name() -> None:
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
    from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState

    from lit_symopt.wiring import _refuse_unsupported

    class Mine(SingleDeviceStrategy):
        pass

    _refuse_unsupported(Mine(), 1)
    with pytest.raises(ConfigError, match="Mine on 3 devices is not supported; use DDPStrategy"):
        _refuse_unsupported(Mine(), 3)
    state = PostLocalSGDState(None, None, start_localSGD_iter=8)
    with pytest.raises(ConfigError, match="PostLocalSGDState lets the ranks' weights drift apart"):
        _refuse_unsupported(DDPStrategy(ddp_comm_state=state), 2)


@pytest.mark.deepspeed
def test_lightnings_deepspeed_strategy_is_said_to_shrink_accumulated_gradients() -> None:
    from lightning.pytorch.strategies import DeepSpeedStrategy as Lightnings

    from lit_symopt.strategies import CPUDeepSpeedStrategy
    from lit_symopt.wiring import _warn_of_small_gradients

    ours = CPUDeepSpeedStrategy()  # first: it says on what DeepSpeed is to work
    module = module_of("declared")
    with pytest.warns(UserWarning, match=r"gradients are 3 times smaller .* Use lit_symopt\.strategies\.DeepSpeed"):
        _warn_of_small_gradients(Lightnings(), module, 3)
    _warn_of_small_gradients(Lightnings(), module, 1)  # warnings are errors here
    _warn_of_small_gradients(ours, module, 3)
    module.automatic_optimization = False  # then DeepSpeed alone divides
    _warn_of_small_gradients(Lightnings(), module, 3)
