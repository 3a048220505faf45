"""Lightning strategies for `SymOpt` on sharded parameters, to be named in a recipe: `trainer.strategy.class_path`."""

from lit_symopt.strategies.cpu import CPUDeepSpeedStrategy
from lit_symopt.strategies.deepspeed import DeepSpeedStrategy
from lit_symopt.strategies.fsdp2 import FSDP2Strategy

__all__ = ["CPUDeepSpeedStrategy", "DeepSpeedStrategy", "FSDP2Strategy"]
