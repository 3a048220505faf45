"""The blocks of any module, from its structure: one pass is recorded and followed, and no name is read.

`infer` is what there is to call. The steps, one a file: `lit_symopt.trace` records the operations of a pass; `follow`
carries through them which linear map wrote each entry and collects `facts`; `decide` places each parameter by them.
"""

from __future__ import annotations

from lit_symopt.infer.run import infer

__all__ = ["infer"]
