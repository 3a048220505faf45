"""Building a model later, and only a part of it on each process: with the weights that the same seed gives at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lit_symopt.errors import ConfigError
from lit_symopt.models.materialize import (
    active_zero_init,
    adopt,
    fill_from_rank_zero,
    give_storage,
    outside_zero_init,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Deferred:
    """A model on the meta device, and how to build it.

    Attributes:
        model: every tensor of it on the meta device.
        build: makes it whole on the CPU, drawing what it draws from torch's global generator.
        random_state: of that generator before the model was described.
        dtype: torch's default dtype then.
    """

    model: PreTrainedModel
    build: Callable[[], PreTrainedModel]
    random_state: Tensor
    dtype: torch.dtype

    @staticmethod
    def described(
        describe: Callable[[], PreTrainedModel], build: Callable[[], PreTrainedModel], *, draws: bool
    ) -> Deferred:
        """A deferred model; the random state moves on as if it had been built.

        Args:
            describe: makes the same model without weights that matter.
            build: makes it with its weights.
            draws: whether `build` draws its weights; else it reads them, and draws nothing.
        """
        state, dtype = torch.get_rng_state(), torch.get_default_dtype()
        drawing = _DrawnAndDropped()
        with outside_zero_init():
            with drawing, torch.device("meta"):
                model = describe()
            with drawing:
                model.initialize_weights()  # transformers leaves it out on the meta device
        if not draws:
            torch.set_rng_state(state)
        return Deferred(model, build, state, dtype)

    def materialize(self) -> None:
        """Give the model its weights; a collective call where it is sharded, or is to be by `zero.Init`.

        Raises:
            ConfigError: if a tensor of the model is no parameter and no buffer, so that nothing can be said of it.
        """
        sharded = any(hasattr(parameter, "device_mesh") for parameter in self.model.parameters())
        if sharded or active_zero_init() is not None:
            give_storage(self.model)
            fill_from_rank_zero(self.model, self.whole)
        else:
            adopt(self.model, self.whole())
        for name, module in self.model.named_modules():
            hidden = [key for key, value in vars(module).items() if isinstance(value, Tensor) and value.is_meta]
            if hidden:
                raise ConfigError(
                    f"{type(module).__name__} at {name!r} keeps {hidden[0]!r} as a plain attribute, which cannot be "
                    f"handed out; build the model with deferred=False"
                )

    def whole(self) -> PreTrainedModel:
        """The whole model in this process; no random state moves."""
        with torch.random.fork_rng(devices=[]), _default_dtype(self.dtype), torch.device("cpu"):
            torch.set_rng_state(self.random_state)
            return self.build()


class _DrawnAndDropped(TorchDispatchMode):
    """Random numbers for tensors on the meta device are drawn on the CPU, one tensor at a time, and thrown away.

    So torch's global generator ends where it would have ended had the tensors been there.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
        return func(*args, **kwargs)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_meta:
        return torch.empty_like(value, device="cpu")
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "meta" else value


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
