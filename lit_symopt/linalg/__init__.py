"""Polar factors and inverse roots of batches of matrices [..., m, n]."""

from lit_symopt.linalg.polar import Precision, inverse_root, polar

__all__ = ["Precision", "inverse_root", "polar"]
