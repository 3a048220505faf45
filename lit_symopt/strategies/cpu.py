"""DeepSpeed's real engine on CPU processes, for tests and laptops."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy as LightningDeepSpeedStrategy

from lit_symopt.errors import ConfigError
from lit_symopt.strategies.deepspeed import DeepSpeedStrategy

BUCKET = 5_000_000  # elements; DeepSpeed allocates every bucket, and the default is made for GPUs


def communicate_by_gloo() -> None:
    """Keep DeepSpeed from compiling its operator for reductions in shared memory; before it is initialized.

    It would build it in every process that finds no build of it, which takes a compiler and a minute, and waits for
    ever for a build that was killed. Reductions are then those of gloo.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """ZeRO 1, 2 and 3 on processes of one CPU, with gloo; the arguments are those of `DeepSpeedStrategy`.

    Lightning allows DeepSpeed on CUDA alone. DeepSpeed itself runs on CPUs, slowly and in full: partitions, 16-bit
    weights with fp32 masters, offloading and checkpoints are what they are on GPUs. Nothing is compiled (see
    `communicate_by_gloo`). Default buckets are smaller than Lightning's.

    Raises:
        ConfigError: if DeepSpeed was imported before and has chosen another accelerator.

    Example (YAML):
        trainer:
          accelerator: cpu
          devices: 2
          strategy: {class_path: lit_symopt.strategies.CPUDeepSpeedStrategy, init_args: {stage: 2}}
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when it is first imported
        kwargs.setdefault("process_group_backend", "gloo")
        kwargs.setdefault("allgather_bucket_size", BUCKET)
        kwargs.setdefault("reduce_bucket_size", BUCKET)
        super().__init__(*args, **kwargs)
        from deepspeed.accelerator import get_accelerator

        if get_accelerator().device_name() != "cpu":
            raise ConfigError(
                f"DeepSpeed works on {get_accelerator().device_name()!r} in this process: set the environment "
                "variable DS_ACCELERATOR=cpu, or use lit_symopt.strategies.DeepSpeedStrategy there"
            )
        communicate_by_gloo()

    @property
    def root_device(self) -> torch.device:
        """Numbered, because Lightning gives the number to DeepSpeed, which compares it."""
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        """Lightning's without its refusal of CPUs."""
        super(LightningDeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Lightning's without its look at the numbers of GPUs."""
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()
