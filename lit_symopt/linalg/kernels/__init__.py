"""Triton kernels for CUDA, each equal to what PyTorch computes without it; Triton is imported when one is called.

`symmetric_product`, `symmetric_polynomial` and `scaled_add_product` are the three launches of a `quintic_step`;
`row_rule` is a whole step of row_norm. Every source is checked against PyTorch in Triton's interpreter on a CPU, and
compiled for an H100. Not yet measured on a GPU: that is `profiles/kernels.py`.

They are called as they are, not through `torch.library.triton_op`, which would let `torch.compile` see into them: an
update is either compiled or made of these kernels, it has no gradient, and an operator costs the host a dispatch more.
"""

from lit_symopt.linalg.kernels.load import require
from lit_symopt.linalg.kernels.quintic_step import quintic_step, scaled_add_product
from lit_symopt.linalg.kernels.row_rule import row_rule
from lit_symopt.linalg.kernels.symmetric_product import symmetric_polynomial, symmetric_product

__all__ = [
    "quintic_step",
    "require",
    "row_rule",
    "scaled_add_product",
    "symmetric_polynomial",
    "symmetric_product",
]
