"""Ranges around the stages of Lightning's training step, as `lit_symopt.profiling.costs` names them.

| range | from | to |
|---|---|---|
| `train/data` | the end of a batch (`on_train_batch_end`) | the start of the next (`on_train_batch_start`) |
| `train/forward` | `training_step` | its end |
| `train/backward` | the strategy's backward pass, with its hooks | its end |
| `train/optimizer` | the strategy's optimizer step; holds forward and backward where they are its closure | its end |
| `train/validation` | `on_validation_start` | `on_validation_end` |

The inner range counts: in manual optimization `train/forward` contains the others. `train/data` also has what Lightning
does between two batches: moving the batch to the device, writing to loggers, saving checkpoints. What other callbacks
do in a hook counts as the stage in which the hook is called. What a strategy's engine does around the optimizer, such
as DeepSpeed's norm of the gradient and its gathering of the weights, is in `train/optimizer` and belongs to no role.

The hooks of a callback are no place to open and close the middle three: none is called where a forward pass begins,
and a range opened at the start of a batch would cross torch's own range around an optimizer with a closure. So the
methods of the strategy that Lightning calls are wrapped, only while a window is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

from lightning.pytorch.strategies import Strategy

from lit_symopt.profiling.costs import STAGE_RANGE, Stage
from lit_symopt.ranges import named

_METHODS: dict[str, Stage] = {"training_step": "forward", "backward": "backward", "optimizer_step": "optimizer"}


class Stages:
    """The ranges of one window: `begin`, then `enter` and `leave` in hooks, then `end`.

    Args:
        strategy: the Trainer's.
        close: closes a range; see `Windows.leave`.
    """

    def __init__(self, strategy: Strategy, close: Callable[[AbstractContextManager[None]], None]) -> None:
        self._strategy = strategy
        self._close = close
        self._open: AbstractContextManager[None] | None = None
        self._wrapped: dict[str, Callable[..., Any] | None] = {}

    def begin(self) -> None:
        """Wraps the strategy's methods, unless they are."""
        if self._wrapped:
            return
        for method, stage in _METHODS.items():
            self._wrapped[method] = vars(self._strategy).get(method)  # an instance may have been given one of its own
            setattr(self._strategy, method, self._within(stage, getattr(self._strategy, method)))

    def enter(self, stage: Stage) -> None:
        """Ends the stage that was entered last, and begins one."""
        self.leave()
        self._open = named(f"{STAGE_RANGE}{stage}")
        self._open.__enter__()

    def leave(self) -> None:
        """Ends the stage that was entered last, if it has not ended."""
        if self._open is not None:
            entered, self._open = self._open, None
            self._close(entered)

    def end(self) -> None:
        """Ends every stage, and gives the strategy its methods back."""
        self.leave()
        for method, own in self._wrapped.items():
            if own is None:
                delattr(self._strategy, method)
            else:
                setattr(self._strategy, method, own)
        self._wrapped = {}

    def _within(self, stage: Stage, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def inside(*args: Any, **kwargs: Any) -> Any:
            range_ = named(f"{STAGE_RANGE}{stage}")
            range_.__enter__()
            try:
                return method(*args, **kwargs)
            finally:
                self._close(range_)

        return inside
