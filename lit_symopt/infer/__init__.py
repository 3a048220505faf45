"""The blocks of any module, from its structure: one pass is recorded and followed.

Names say only which modules are members of one list; no word in them is read. `infer` is what there is to call (`run`;
`lightning` and `example` call it for a module that is being fitted). The steps:

1. `lit_symopt.trace` records the operations of a pass.
2. `follow` carries through them what made each entry of each tensor (`flow`, `labels`; the state is in `following`).
   The operations are sorted in `operations`; `elementwise`, `layers`, `places`, `products`, `scores` and `reductions`
   follow them, with `arguments` and `replay` to read and repeat one. What they find out are the `facts`.
3. `decide` places each parameter by the facts (the state is in `deciding`): `attention`, `neurons`, `vectors`, and
   `siblings` for what took no part.
"""

from __future__ import annotations

from lit_symopt.infer.run import infer

__all__ = ["infer"]
