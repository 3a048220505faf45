"""Lightning callbacks that observe a run; imported as `lit_symopt.callbacks`.

`RunReport` says at the end what the run did. `RandomState` keeps the random state in checkpoints, so that a resumed
run draws what an uninterrupted one would have drawn. `ProgressBar` is Lightning's, for runs measured in steps.
"""

from lit_symopt.callbacks.progress_bar import ProgressBar
from lit_symopt.callbacks.random_state import RandomState
from lit_symopt.callbacks.run_report import RunReport

__all__ = ["ProgressBar", "RandomState", "RunReport"]
