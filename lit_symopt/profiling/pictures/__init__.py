"""Pictures of a profile, as RGB pixels `[H, W, 3]`; one a file."""

from lit_symopt.profiling.pictures.costs import compare_bars, cost_bars
from lit_symopt.profiling.pictures.memory import memory_bars
from lit_symopt.profiling.pictures.roofline import roofline_plot
from lit_symopt.profiling.pictures.timeline import timeline

__all__ = ["compare_bars", "cost_bars", "memory_bars", "roofline_plot", "timeline"]
