"""Watching routers at work: hooks that are there only while somebody looks.

Shape legend:  N tokens, E experts, K experts a token is sent to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lit_symopt.errors import ConfigError
from lit_symopt.metrics.passes import in_backward, tensors_in
from lit_symopt.metrics.routers import Router

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What one router did with the tokens of one forward pass.

    Attributes:
        layer: which of the watched routers.
        logits: `[N, E]`, float32 or float64.
        selected: integers `[N, K]`: the experts that each token was really sent to.
        shift: `‖1ᵀW‖/√E` of its weight.
    """

    layer: int
    logits: Tensor
    selected: Tensor
    shift: Tensor


class RouterWatch(AbstractContextManager["RouterWatch"]):
    """Calls `sink` with a `Routing` for each forward pass of each router; a context manager.

    Logits are computed again from the router's input. Which experts were selected is, in this order:

    1. an integer tensor `[..., K]` of distinct experts that leaves the router, as in transformers;
    2. such a tensor that reaches a module beside it that holds a stack of experts;
    3. the indices of the last `topk` over E values between the router and the end of the module around it;
    4. the `top_k` largest logits, if the router or a module around it declares `top_k`.

    Nothing of the pass changes: what is computed here is out of autograd's sight and draws no random numbers. The
    passes that activation checkpointing repeats during backward are not counted.

    Args:
        routers: what to watch; see `find_routers`.
        sink: called in the forward pass.
        unless: passes during which this is true are not counted.

    Raises:
        ConfigError: in the forward pass, if none of the four ways tells which experts were selected.

    Example:
        >>> from lit_symopt.blocks import Block, BlockTaxonomy, Role
        >>> from lit_symopt.metrics import find_routers
        >>> moe = nn.Sequential(nn.Linear(8, 4))
        >>> routers = find_routers(moe, BlockTaxonomy([Block("0.weight", role=Role.ROUTER)]), top_k=2)
        >>> seen = []
        >>> with RouterWatch(routers, seen.append):
        ...     _ = moe(torch.ones(3, 8))
        >>> [tuple(routing.selected.shape) for routing in seen]
        [(3, 2)]
    """

    def __init__(
        self,
        routers: Sequence[Router],
        sink: Callable[[Routing], None],
        *,
        unless: Callable[[], bool] | None = None,
    ) -> None:
        self.routers = tuple(routers)
        self.sink = sink
        self.unless = unless
        self.seen = 0
        self._handles: list[RemovableHandle] = []
        self._pending: dict[int, tuple[Tensor, Tensor]] = {}
        self._running: dict[nn.Module | None, _Running] = {}  # by the module around a router that is running now

    def __enter__(self) -> RouterWatch:
        # Before the routers' own hooks: a router may be the module around another one.
        for parent in dict.fromkeys(router.parent for router in self.routers):
            if parent is not None:
                self._bracket(parent)
        for layer, router in enumerate(self.routers):
            self._watch(layer, router)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(finish=kind is None)

    def close(self, *, finish: bool = True) -> None:
        """Remove the hooks.

        Args:
            finish: report what is still waiting; otherwise it is dropped.
        """
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in sorted(self._pending) if finish else ():
            self._resolve(layer, ())
        self._pending.clear()
        self._running.clear()

    def _counts(self) -> bool:
        return not in_backward() and (self.unless is None or not self.unless())

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _watch(self, layer: int, router: Router) -> None:
        def before(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if self._counts():
                self._settle(router.parent)  # other routers of the same module, and this one's last pass
                self._resolve(layer, ())
                inputs = _inputs(router, (*arguments, *keywords.values()))
                self._pending[layer] = router.logits(inputs), router.shift()

        def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if not self._counts() or self._emit(layer, output):
                return
            running = self._running.get(router.parent)
            if running is not None and running.mode is None:
                running.listen()

        def reached(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if self._counts():
                self._emit(layer, (*arguments, *keywords.values()))

        self._handles.append(router.module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(router.module.register_forward_hook(after))
        self._handles += [holder.register_forward_pre_hook(reached, with_kwargs=True) for holder in router.holders]

    def _bracket(self, parent: nn.Module) -> None:
        def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if self._counts():
                self._running[parent] = _Running()

        def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if not self._counts() or parent not in self._running:
                return
            self._running[parent].stop()
            if output is None:  # the pass has failed: nothing to report
                self._pending.clear()
            self._settle(parent)
            del self._running[parent]

        self._handles.append(parent.register_forward_pre_hook(before))
        # `always_call`: also if forward raises, so that the mode is left.
        self._handles.append(parent.register_forward_hook(after, always_call=True))

    # -- what was selected ---------------------------------------------------------------------------------------

    def _emit(self, layer: int, values: Any) -> bool:
        """Reports the waiting pass of a layer if there are expert indices among the values."""
        if layer not in self._pending:
            return True
        logits, shift = self._pending[layer]
        selected = next((found for v in tensors_in(values) if (found := _selection(v, logits)) is not None), None)
        if selected is None:
            return False
        del self._pending[layer]
        self.seen += 1
        with torch.no_grad():
            self.sink(Routing(layer=layer, logits=logits, selected=selected, shift=shift))
        return True

    def _settle(self, parent: nn.Module | None) -> None:
        """Reports what waits for the module around it, now that it ends or another router begins."""
        running = self._running.get(parent)
        if running is not None:
            for layer, router in enumerate(self.routers):
                if router.parent is parent:
                    self._resolve(layer, reversed(running.found))
            running.found.clear()

    def _resolve(self, layer: int, candidates: Iterable[Tensor]) -> None:
        """Reports the waiting pass of a layer from the indices of a `topk`, else from the logits."""
        if self._emit(layer, tuple(candidates)):
            return
        router, logits = self.routers[layer], self._pending[layer][0]
        if router.top_k is None:
            del self._pending[layer]
            raise ConfigError(
                f"it cannot be seen which experts {router.name!r} selects: no indices leave it or reach stacked "
                f"experts, no topk over its {router.experts} scores runs beside it, and no module around it declares "
                "`top_k`. Give top_k (the callbacks have it as an argument)."
            )
        self._emit(layer, logits.topk(router.top_k, dim=-1).indices)


class _Running:
    """A module around routers while its forward runs, and the indices that `topk` returned in it."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self.mode: ExitStack | None = None

    def listen(self) -> None:
        """Collect indices from here on."""
        self.mode = ExitStack()
        self.mode.enter_context(_Listening(self.found))

    def stop(self) -> None:
        """Collect no more."""
        if self.mode is not None:
            self.mode.close()


class _Listening(TorchFunctionMode):
    def __init__(self, found: list[Tensor]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.topk, Tensor.topk):
            self.found.append(result[1].detach())
        return result


def _inputs(router: Router, values: Sequence[Any]) -> Tensor:
    """The first floating tensor of a call whose last dimension is the router's."""
    features = router.block.parts[0].n
    for value in tensors_in(values):
        if value.is_floating_point() and value.dim() > 0 and value.shape[-1] == features:
            return value
    raise ConfigError(
        f"{type(router.module).__name__} was called without a tensor [..., {features}] for {router.name!r}"
    )


def _selection(value: Tensor, logits: Tensor) -> Tensor | None:
    """A tensor as `[N, K]` if it can be the experts of N tokens: integers, in range, none twice for one token."""
    tokens, experts = logits.shape
    if value.dtype not in _INTEGERS or value.dim() < 2 or not 1 <= value.shape[-1] <= experts:
        return None
    if value.numel() != tokens * value.shape[-1]:
        return None
    rows = value.detach().reshape(tokens, -1)
    ordered = rows.sort(-1).values
    if tokens and not bool((ordered[:, 0] >= 0).all() & (ordered[:, -1] < experts).all()):
        return None
    return rows if bool((ordered[:, 1:] > ordered[:, :-1]).all()) else None
