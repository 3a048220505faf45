"""Lightning callbacks that observe a run; imported as `lit_symopt.callbacks`.

`RunReport` says at the end what the run did. `RandomState` keeps the random state in checkpoints, so that a resumed
run draws what an uninterrupted one would have drawn. `ProgressBar` is Lightning's, for runs measured in steps.
`LoadImbalance` and `RouterStability` watch the routers of a mixture of experts, `LogitNorms` the head. `KernelTime`
profiles windows of the training.
"""

from lit_symopt.callbacks.kernel_time import KernelTime
from lit_symopt.callbacks.load_imbalance import LoadImbalance
from lit_symopt.callbacks.logit_norms import LogitNorms
from lit_symopt.callbacks.progress_bar import ProgressBar
from lit_symopt.callbacks.random_state import RandomState
from lit_symopt.callbacks.router_stability import RouterStability
from lit_symopt.callbacks.run_report import RunReport

__all__ = ["KernelTime", "LoadImbalance", "LogitNorms", "ProgressBar", "RandomState", "RouterStability", "RunReport"]
