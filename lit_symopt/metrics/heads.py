"""The heads of a module, whose outputs are its logits, and how to watch them.

Shape legend:  V vocabulary, d features.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_symopt.blocks import Block, BlockTaxonomy, Role
from lit_symopt.metrics.layers import above
from lit_symopt.metrics.logits import shift_of
from lit_symopt.metrics.passes import in_backward, tensors_in


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """A module whose output `[..., V]` are logits.

    Attributes:
        path: full name of the module.
        block: the block of its weight.
        module: the module.
        softcap: c if the model turns its logits z into `c · tanh(z/c)` afterwards, as `final_logit_softcapping` of a
            transformers configuration around it says.
    """

    path: str
    block: Block
    module: nn.Module
    softcap: float | None

    def shift(self) -> Tensor:
        """`‖1ᵀW‖/√V`, a float64 number."""
        assert self.block.layout is not None
        stored: Tensor = getattr(self.module, self.block.name.rpartition(".")[2])
        return shift_of(self.block.layout.to_matrices(stored.detach())[0])


def find_heads(module: nn.Module, taxonomy: BlockTaxonomy | None = None) -> list[Head]:
    """The heads of a module: those that own an `lm_head` block, or the tied embedding under the name of a head.

    Args:
        module: any module.
        taxonomy: its blocks; default: what the module declares, or that of a known architecture inside it.

    Raises:
        TaxonomyError: if there is no taxonomy.

    Example:
        >>> model = nn.Sequential(nn.Embedding(16, 4), nn.Linear(4, 16))
        >>> taxonomy = BlockTaxonomy([Block("0.weight", role=Role.EMBEDDING), Block("1.weight", role=Role.LM_HEAD)])
        >>> [head.path for head in find_heads(model, taxonomy)]
        ['1']
    """
    taxonomy = taxonomy or BlockTaxonomy.of(module)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    found = []
    for known in names.values():
        block = next((b for b in taxonomy.blocks if b.matches(known)), None)
        if block is None or block.role not in (Role.LM_HEAD, Role.TIED_EMBEDDING):
            continue
        for name in known:
            path = name.rpartition(".")[0]
            head = module.get_submodule(path)
            if not isinstance(head, nn.Embedding):  # a tied embedding is looked up there, not multiplied with
                found.append(
                    Head(path=path, block=replace(block, name=name), module=head, softcap=_softcap(module, path))
                )
    return found


class HeadWatch(AbstractContextManager["HeadWatch"]):
    """Calls `sink(index of the head, its logits, its shift)` for each forward pass of each head; a context manager.

    The logits are the output that the module made anyway, not a copy. They are before a soft cap. Passes during which
    `unless` is true are not counted.
    """

    def __init__(
        self,
        heads: list[Head],
        sink: Callable[[int, Tensor, Tensor], None],
        *,
        unless: Callable[[], bool] | None = None,
    ) -> None:
        self.heads = heads
        self.sink = sink
        self.unless = unless
        self.seen = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> HeadWatch:
        for index, head in enumerate(self.heads):
            self._watch(index, head)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self, *, finish: bool = True) -> None:
        """Remove the hooks; nothing is ever left to finish."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _counts(self) -> bool:
        return not in_backward() and (self.unless is None or not self.unless())

    def _watch(self, index: int, head: Head) -> None:
        shift: list[Tensor] = []

        def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if self._counts():  # before the pass: a sharded weight is whole until it ends
                shift[:] = [head.shift()]

        def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if not self._counts():
                return
            logits = next((value for value in tensors_in(output) if value.is_floating_point()), None)
            if logits is not None and shift:
                self.seen += 1
                with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
                    self.sink(index, logits.detach(), shift.pop())

        self._handles.append(head.module.register_forward_pre_hook(before))
        self._handles.append(head.module.register_forward_hook(after))


def _softcap(module: nn.Module, path: str) -> float | None:
    for place in above(path):
        cap = getattr(getattr(module.get_submodule(place), "config", None), "final_logit_softcapping", None)
        if isinstance(cap, (int, float)) and cap > 0:
            return float(cap)
    return None
