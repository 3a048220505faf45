"""Metrics of routers and logits: torchmetrics `Metric`s that add up over ranks and know no Trainer.

`find_routers` and `find_heads` find what to watch from a module's taxonomy; `RouterWatch` and `HeadWatch` hand over
what passes there. `ExpertLoad`, `RouterStatistics` and `LogitStatistics` say what it means. `History` keeps the raw
arrays, `heat_map` draws them.
"""

from lit_symopt.metrics.heads import Head, HeadWatch, find_heads
from lit_symopt.metrics.history import History
from lit_symopt.metrics.layers import over_layers
from lit_symopt.metrics.load import ExpertLoad, imbalance
from lit_symopt.metrics.logits import LogitStatistics, sample_positions, shift_of
from lit_symopt.metrics.pictures import heat_map
from lit_symopt.metrics.routers import Router, find_routers
from lit_symopt.metrics.stability import RouterStatistics
from lit_symopt.metrics.watch import RouterWatch, Routing

__all__ = [
    "ExpertLoad",
    "Head",
    "HeadWatch",
    "History",
    "LogitStatistics",
    "Router",
    "RouterStatistics",
    "RouterWatch",
    "Routing",
    "find_heads",
    "find_routers",
    "heat_map",
    "imbalance",
    "over_layers",
    "sample_positions",
    "shift_of",
]
