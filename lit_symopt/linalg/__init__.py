"""Polar factors and inverse roots of batches of matrices [..., m, n], and the rows they are made of."""

from lit_symopt.linalg.execution import EAGER, Backend, Execution
from lit_symopt.linalg.polar import Precision, inverse_root, polar
from lit_symopt.linalg.rows import WHOLE, Rows, RowShards

__all__ = [
    "EAGER",
    "WHOLE",
    "Backend",
    "Execution",
    "Precision",
    "RowShards",
    "Rows",
    "inverse_root",
    "polar",
]
