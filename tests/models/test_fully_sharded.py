"""A family under Lightning's strategies on two processes. Oracle: one process with the batches of both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_symopt.errors import ConfigError
from tests.models.tiny import tiny, tokens, trainer
from tests.sharding.processes import Ranks

STEPS = 3
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2, group=False) as ranks:
        yield ranks


def fit(variant: str, folder: str, strategy: str = "", *, fits: int = 1, precision: Any = None, **changes: Any) -> Any:
    """The weights before and after a fit, and the losses of the batches of this rank."""
    import lightning as L

    before: dict[str, Tensor] = {}
    losses: list[float] = []

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            before.update(weights(pl_module))

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    model = tiny(variant, **changes)
    rows = tokens(4 * STEPS, 7, seed=3)
    world = 2 if strategy else 1
    for _ in range(fits):
        fitting = trainer(
            Path(folder),
            callbacks=[Look()],
            max_epochs=1,
            strategy=strategy_of(strategy),
            devices=world,
            use_distributed_sampler=False,
            precision=precision,
        )
        own = rows[fitting.global_rank :: world]
        fitting.fit(model, DataLoader([{"input_ids": row} for row in own], batch_size=4 // world))  # type: ignore[arg-type]
    engine: Any = getattr(fitting.strategy, "deepspeed_engine", None) if strategy.startswith("zero") else None
    optimizer: Any = fitting.optimizers[0] if engine is None else engine.basic_optimizer
    kind = type(model.model).__mro__[0].__name__
    strategy = "" if optimizer.distribution is None else optimizer.distribution.strategy
    return {"before": before, "after": weights(model), "losses": losses, "strategy": strategy, "kind": kind}


def weights(model: Any) -> dict[str, Tensor]:
    """All of them, whole."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if any(hasattr(tensor, "ds_id") for _, tensor in tensors):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(model.parameters())):
            return {name: tensor.detach().clone() for name, tensor in tensors}
    return {
        name: getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)().detach().clone()
        for name, tensor in tensors
    }


def strategy_of(name: str) -> Any:
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    if name == "tensor parallel":
        return ModelParallelStrategy(process_group_backend="gloo")
    if name.startswith("zero"):
        from lit_symopt.strategies import CPUDeepSpeedStrategy

        return CPUDeepSpeedStrategy(stage=int(name[-1]))
    return name or "auto"


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize(
    "strategy", ["ddp", "fsdp2", *(pytest.param(f"zero{n}", marks=pytest.mark.deepspeed) for n in (2, 3))]
)
@pytest.mark.parametrize("variant", ["qwen3 tied", "olmoe"])
def test_two_processes_begin_with_the_weights_of_one_and_end_with_them(
    variant: str, strategy: str, deferred: bool, two: Ranks, tmp_path: Path
) -> None:
    expected = fit(variant, str(tmp_path))
    both = two(fit, variant, str(tmp_path), strategy, deferred=deferred)
    assert torch.tensor([one["losses"] for one in both]).mean(0).tolist() == pytest.approx(expected["losses"], abs=1e-5)
    for found in both:
        assert found["strategy"].upper().replace("DEEPSPEED ZERO ", "ZERO") == strategy.upper()
        assert list(found["before"]) == list(expected["before"])
        assert all(torch.equal(found["before"][name], tensor) for name, tensor in expected["before"].items())
        for name, tensor in expected["after"].items():
            assert (found["after"][name] - tensor).norm() <= 1e-5 * tensor.norm(), name
            if name.endswith("embed_tokens.weight"):
                assert not torch.equal(tensor, expected["before"][name])


def test_a_second_fit_goes_on_with_the_same_shards(two: Ranks, tmp_path: Path) -> None:
    expected = fit("qwen3", str(tmp_path), fits=2)
    for found in two(fit, "qwen3", str(tmp_path), "fsdp2", fits=2, deferred=True):
        assert found["kind"] == "FSDPQwen3ForCausalLM"
        for name, tensor in expected["after"].items():
            assert (found["after"][name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def in_bf16(folder: str, precision: str) -> dict[str, Any]:
    return {name: one.dtype for name, one in fit("gemma3", folder, "fsdp2", precision=precision)["after"].items()}


def test_precision_is_what_the_trainer_says(two: Ranks, tmp_path: Path) -> None:
    for precision, dtype in (("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)):
        for found in two(in_bf16, str(tmp_path), precision):
            assert {one for name, one in found.items() if name.endswith("weight")} == {dtype}


def refused(folder: str) -> str:
    try:
        fit("qwen3", folder, "tensor parallel")
    except ConfigError as error:
        return str(error)
    return ""


def test_tensor_parallelism_is_refused_with_the_strategy_to_write(two: Ranks, tmp_path: Path) -> None:
    for said in two(refused, str(tmp_path)):
        assert "tensor_parallel_size=2 is not supported" in said
        assert "data_parallel_size=2 and tensor_parallel_size=1" in said


def test_without_a_trainer_or_on_one_device_nothing_is_sharded(tmp_path: Path) -> None:
    model = tiny("qwen3")
    model.configure_model()
    assert type(model.model).__name__ == "Qwen3ForCausalLM"
    assert fit("qwen3", str(tmp_path))["kind"] == "Qwen3ForCausalLM"


def test_a_deferred_model_is_loaded_from_a_checkpoint(tmp_path: Path) -> None:
    from lit_symopt.models import Qwen3

    model = tiny("qwen3")
    saving = trainer(tmp_path, max_epochs=1)
    saving.fit(model, DataLoader([{"input_ids": row} for row in tokens(4, 7)], batch_size=4))  # type: ignore[arg-type]
    saving.save_checkpoint(tmp_path / "saved.ckpt")
    shape = {name: getattr(model.model.config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    rest = {
        name: getattr(model.model.config, name) for name in ("num_hidden_layers", "num_attention_heads", "head_dim")
    }
    loaded = Qwen3.load_from_checkpoint(
        tmp_path / "saved.ckpt", **shape, **rest, num_key_value_heads=2, max_position_embeddings=64, deferred=True
    )
    assert all(torch.equal(tensor, dict(model.named_parameters())[name]) for name, tensor in loaded.named_parameters())
