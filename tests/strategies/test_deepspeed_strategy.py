"""The Lightning strategies on DeepSpeed's real engine, on CPU processes.

Oracle of training and of every resume: one process without DeepSpeed that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.sharding.processes import Ranks, RanksFailed
from tests.strategies.training import die_while_saving, fit

pytestmark = pytest.mark.deepspeed

STEPS, HALF = 8, 4


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[int, Ranks]]:
    with Ranks(2, group=False) as two, Ranks(3, group=False) as three, Ranks(1, group=False) as one:
        yield {1: one, 2: two, 3: three}


@pytest.fixture(scope="module")
def alone(ranks: dict[int, Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, not interrupted; and its ordinary file in the middle."""
    path = str(tmp_path_factory.mktemp("alone") / "half.ckpt")
    (_,) = ranks[1](fit, None, HALF, save=path)
    (found,) = ranks[1](fit, None, STEPS)
    return {**found, "path": path}


def assert_equal_weights(found: dict[str, Tensor], expected: dict[str, Tensor], *, within: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert (found[name] - weight).norm() <= within * weight.norm(), name


OFFLOAD = {"offload_optimizer": True}


@pytest.mark.parametrize(
    ("stage", "strategy"),
    [(0, {}), (1, {}), (2, {}), (3, {}), (2, OFFLOAD), (3, {**OFFLOAD, "offload_parameters": True})],
)
def test_training_is_that_of_one_process(
    ranks: dict[int, Ranks], alone: dict[str, Any], stage: int, strategy: dict[str, Any]
) -> None:
    for one in ranks[2](fit, stage, STEPS, devices=2, strategy=strategy):
        assert one["error"] == ""
        assert one["attached"] == (f"DeepSpeed ZeRO {stage}" if stage else "DeepSpeed stage 0")
        assert_equal_weights(one["weights"], alone["weights"])


@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 2), (2, 1), (2, 3), (3, 2), (3, 3)])
def test_an_ordinary_file_is_resumed_with_the_state_of_the_optimizer(
    ranks: dict[int, Ranks], alone: dict[str, Any], stage: int, world: int
) -> None:
    for one in ranks[world](fit, stage, STEPS, devices=world, resume=alone["path"]):
        assert one["error"] == ""
        assert one["step"] == STEPS
        assert one["lr"] == alone["lr"]
        assert_equal_weights(one["weights"], alone["weights"])
        torch.testing.assert_close(one["seen"], alone["seen"])  # a buffer, loaded on every rank


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_its_own_folder_is_resumed_bitwise(ranks: dict[int, Ranks], tmp_path: Path, stage: int) -> None:
    path = str(tmp_path / "half.ckpt")
    ranks[2](fit, stage, HALF, devices=2, save=path)
    resumed, straight = ranks[2](fit, stage, STEPS, devices=2, resume=path), ranks[2](fit, stage, STEPS, devices=2)
    for one, oracle in zip(resumed, straight, strict=True):
        assert one["error"] == ""
        assert_equal_weights(one["weights"], oracle["weights"], within=0.0)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["half.ckpt"]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_in_bf16_a_file_of_fp32_weights_is_resumed_in_full_precision(
    ranks: dict[int, Ranks], alone: dict[str, Any], stage: int
) -> None:
    for one in ranks[2](fit, stage, HALF, devices=2, resume=alone["path"], precision="bf16-true"):
        assert one["error"] == ""
    weights = torch.load(alone["path"], weights_only=True)["state_dict"]
    for one in ranks[2](masters_after_loading, stage, alone["path"]):
        for name, (start, stop, master, low) in one.items():
            expected = weights[name].flatten()[start:stop]
            torch.testing.assert_close(master, expected, rtol=0, atol=0)
            torch.testing.assert_close(low, expected.bfloat16().float(), rtol=0, atol=0)


def masters_after_loading(stage: int, path: str) -> dict[str, Any]:
    """By block: this rank's stretch of the fp32 weights right after loading, and the same stretch of the model's."""
    import lightning as L

    from tests.strategies.training import batches, module_of, strategy_of, whole

    net = module_of()
    found: dict[str, Any] = {}

    class Look(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            low = whole(net)
            for holding in trainer.strategy.model.basic_optimizer.distribution.holdings:
                for segment in holding.segments:
                    master = holding.tensor.detach().flatten()[segment.offset :][: segment.stop - segment.start].clone()
                    model = low[segment.name].flatten()[segment.start : segment.stop]
                    found[segment.name] = (segment.start, segment.stop, master, model)

    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        max_steps=HALF + 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        strategy=strategy_of(stage),
        use_distributed_sampler=False,
        precision="bf16-true",
        callbacks=[Look()],
    )
    trainer.fit(net, batches(), ckpt_path=path)
    return found


def validate(stage: int | None, path: str, devices: int) -> float:
    """The loss of a checkpoint, without an optimizer."""
    import lightning as L

    from tests.strategies.training import batches, module_of, strategy_of

    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        limit_val_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        strategy=strategy_of(stage),
        use_distributed_sampler=False,
    )
    (found,) = trainer.validate(module_of(), batches(), ckpt_path=path, verbose=False)
    return found["loss"]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_file_and_a_folder_can_be_validated(
    ranks: dict[int, Ranks], alone: dict[str, Any], tmp_path: Path, stage: int
) -> None:
    folder = str(tmp_path / "half.ckpt")
    ranks[2](fit, stage, HALF, devices=2, save=folder)
    (expected,) = ranks[1](validate, None, alone["path"], 1)
    for path in (alone["path"], folder):
        assert ranks[2](validate, stage, path, 2) == pytest.approx([expected] * 2, rel=1e-5)


def test_another_model_or_stack_is_refused_by_name(ranks: dict[int, Ranks], alone: dict[str, Any]) -> None:
    for stage in (2, 3):
        for one in ranks[2](fit, stage, STEPS, devices=2, resume=alone["path"], module={"width": 8}):
            assert "CheckpointError" in one["error"]
            assert "'mix.weight' has the shape (7, 5) there and (8, 5) here" in one["error"]
    for one in ranks[2](fit, 1, STEPS, devices=2, resume=alone["path"], module={"symopt": {"stack": "adamw"}}):
        assert "CheckpointError" in one["error"]
        assert "'mix.weight'" in one["error"]


def test_a_folder_of_another_stage_or_without_a_shard_is_refused(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    ranks[2](fit, 2, 1, devices=2, save=str(path))
    for one in ranks[2](fit, 3, 2, devices=2, resume=str(path)):
        assert "CheckpointError" in one["error"]
        assert "lit-symopt checkpoint consolidate" in one["error"]
    (shard,) = path.glob("*/*rank_1*optim_states.pt")
    shard.unlink()
    for one in ranks[2](fit, 2, 2, devices=2, resume=str(path)):
        assert "CheckpointError" in one["error"]
        assert shard.name in one["error"]


def test_a_gradient_that_is_not_finite_is_an_error_on_all_ranks(ranks: dict[int, Ranks]) -> None:
    for stage in (1, 3):
        for one in ranks[2](fit, stage, STEPS, devices=2, poisoned=2):
            assert "GradientError: a gradient of engine step 3 is not finite" in one["error"]


@pytest.mark.parametrize(
    ("stage", "where", "name"), [(2, "rank_1_", "old.ckpt"), (3, "rank_0_mp_rank_00_model", "new.ckpt")]
)
def test_a_save_that_is_killed_leaves_what_was_there(
    ranks: dict[int, Ranks], tmp_path: Path, stage: int, where: str, name: str
) -> None:
    ranks[2](fit, stage, HALF, devices=2, save=str(tmp_path / "old.ckpt"))
    with pytest.raises(RanksFailed, match="SIGKILL"):
        ranks[2](die_while_saving, stage, str(tmp_path / name), where, timeout=60.0)
    assert [entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".")] == ["old.ckpt"]
    resume, save = str(tmp_path / "old.ckpt"), str(tmp_path / name)
    for one in ranks[2](fit, stage, STEPS, devices=2, resume=resume, save=save):
        assert (one["error"], one["step"]) == ("", STEPS)
    assert {entry.name for entry in tmp_path.iterdir()} == {"old.ckpt", name}


def test_on_a_cpu_the_strategy_for_cpus_is_named() -> None:
    from lightning.pytorch.accelerators import CPUAccelerator

    from lit_symopt.errors import ConfigError
    from lit_symopt.strategies import DeepSpeedStrategy

    strategy = DeepSpeedStrategy(stage=2)
    strategy.accelerator = CPUAccelerator()
    with pytest.raises(ConfigError, match=r"needs GPUs.*CPUAccelerator.*CPUDeepSpeedStrategy"):
        strategy.setup_environment()
