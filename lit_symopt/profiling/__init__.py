"""From a profiler's trace to what each update costs: by role, rule, phase and kernel.

`lit_symopt.callbacks.KernelTime` does this in a Trainer, `lit_symopt.profiling.windows.Windows` in a loop of one's own,
and any trace of `torch.profiler` that has `ProfilerStep#` ranges can be read:

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from lit_symopt import SymOpt
    >>> weight = torch.nn.Parameter(torch.randn(64, 32))
    >>> optimizer = SymOpt([weight], rule="spectral", role="linear", lr=0.1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "rank0.pt.trace.json")
    ...     schedule = torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=1)
    ...     save = lambda profiler: profiler.export_chrome_trace(str(path))
    ...     with torch.profiler.profile(schedule=schedule, on_trace_ready=save, acc_events=True) as profiler:
    ...         for _ in range(4):
    ...             weight.grad = torch.randn_like(weight)
    ...             optimizer.step()
    ...             profiler.step()
    ...     window = attribute(read_trace(path))
    >>> len(window.steps), sorted({cost.role for cost in window.steps[0].costs if cost.attributed})
    (2, ['all', 'linear'])
    >>> print(format_table([window]).splitlines()[0])
    Cost of the optimizer on cpu: 2 training steps in 1 window; medians over the steps, and the range.
"""

from lit_symopt.profiling.attribution import attribute
from lit_symopt.profiling.costs import Cost, StepCosts, TraceCosts
from lit_symopt.profiling.events import Trace, read_trace
from lit_symopt.profiling.run import RunProfile
from lit_symopt.profiling.table import format_table
from lit_symopt.ranges import nvtx_ranges

__all__ = [
    "Cost",
    "RunProfile",
    "StepCosts",
    "Trace",
    "TraceCosts",
    "attribute",
    "format_table",
    "nvtx_ranges",
    "read_trace",
]
