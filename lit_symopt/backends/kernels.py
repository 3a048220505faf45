"""The products of the iteration by Triton kernels: half of each symmetric product, and one rounding of a X + X P.

Not yet measured on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_symopt.linalg.kernels import scaled_add_product, symmetric_polynomial, symmetric_product


class TritonProducts:
    """`lit_symopt.linalg.newton_schulz.Products` for bfloat16, float16 and float32 on CUDA, or interpreted.

    Products that are neither symmetric nor fused with a sum are torch's.
    """

    def gram(self, x: Tensor, *, tall: bool, out: Tensor) -> None:
        """XᵀX if `tall`, else XXᵀ; bitwise symmetric."""
        symmetric_product(x, transpose=tall, out=out)

    def polynomial(self, gram: Tensor, *, a: float, b: float, c: float, out: Tensor) -> None:
        """a I + b G + c G²; a I is added after the sum was rounded."""
        symmetric_polynomial(gram, b=b, c=c, out=out)
        if a:
            out.diagonal(dim1=-2, dim2=-1).add_(a)

    def multiply(self, x: Tensor, p: Tensor, *, a: float, tall: bool, out: Tensor) -> None:
        """a X + X P if `tall`, else a X + P X, of a symmetric P."""
        if a:
            scaled_add_product(x, p, a=a, transpose=tall, out=out)
        else:
            torch.bmm(x, p, out=out) if tall else torch.bmm(p, x, out=out)


TRITON = TritonProducts()
