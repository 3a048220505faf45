"""The loss of a module at other weights. The module itself is never written: a copy is, in fp32 or in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lit_symopt.audit.moves import Edit, Relabel
from lit_symopt.audit.points import Values
from lit_symopt.errors import ConfigError
from lit_symopt.objective import LossFunction, Objective


class Evaluator:
    """A copy of a module in one dtype, in evaluation mode, whose weights are exchanged for each evaluation.

    Args:
        module: any module; left as it is.
        batch: the batch.
        dtype: float32 or float64.
        loss: as `Objective` takes it.
        classes: the output of a plain module is the logits of a head: its targets are classes.

    Attributes:
        widens: whether the module's own requests for float32 are answered with float64.
    """

    def __init__(
        self, module: nn.Module, batch: object, *, dtype: torch.dtype, loss: LossFunction | None, classes: bool
    ) -> None:
        self.dtype = dtype
        duplicate = copied(module).eval()
        self.module = duplicate.double() if dtype == torch.float64 else duplicate.float()
        self.widens = dtype == torch.float64
        self.objective = Objective(self.module, batch, loss=loss, classes=classes)
        self.tensors: dict[str, Tensor] = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        self._seeded = loss is None and classes

    def loss(self, values: Values, *, labels: Tensor | None = None, relabels: Relabel = "both") -> float:
        """The loss at these weights, with token ids or classes permuted by `labels`."""
        with self._at(values), torch.no_grad(), self._precision():
            return float(self._loss(labels, relabels))

    def gradients(self, values: Values, *, labels: Tensor | None = None) -> tuple[float, dict[str, Tensor]]:
        """The loss, and the gradient of every parameter that gets one, at these weights."""
        with self._at(values):
            parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
            with torch.enable_grad():
                value = self._loss(labels, "both")
            found: tuple[Tensor | None, ...] = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        gradients = {name: g.detach() for name, g in zip(parameters, found, strict=True) if g is not None}
        return float(value.detach()), gradients

    def choices(self, values: Values, *, labels: Tensor | None = None, relabels: Relabel = "both") -> list[Tensor]:
        """The sorted indices of every top-k selection during one pass."""
        with self._at(values), torch.no_grad(), self._precision(), _Selections() as selections:
            self._loss(labels, relabels)
        return [found.sort(-1).values for found in selections.found]

    def edited(self, values: Values, edits: Mapping[str, Edit]) -> dict[str, Tensor]:
        """All values, some of them edited in float64 and rounded to the dtype of the evaluator."""
        changed = {name: edit.change(values[edit.source].double()).to(self.dtype) for name, edit in edits.items()}
        for name, tensor in changed.items():
            if tensor.shape != values[name].shape:
                raise ConfigError(f"{name!r} {tuple(values[name].shape)} would become {tuple(tensor.shape)}")
        return {**values, **changed}

    def token_tables(self, names: Sequence[str], labels: Tensor) -> list[str]:
        """Those of the given tables that are looked up with the token ids of the batch.

        Found by permuting all token ids and seeing which lookups change accordingly.
        """
        tables = {id(self.tensors[name]): name for name in names}
        with torch.no_grad(), _Lookups(tables) as before:
            self.objective.loss()
        with torch.no_grad(), _Lookups(tables) as after:
            self.objective.loss(self.objective.vocabulary_relabeled(labels))
        moved = {name: labels.to(ids.device)[ids] for name, ids in before.found.items()}
        return [
            name
            for name, ids in before.found.items()
            if name in after.found and torch.equal(after.found[name], moved[name]) and not torch.equal(moved[name], ids)
        ]

    def absent(self, count: int) -> frozenset[int]:
        """Those of the ids below `count` that the batch does not hold as token ids."""
        order = torch.arange(count)
        moved = self.objective.vocabulary_relabeled(order.roll(-1))  # every token id becomes another one
        present = {id for one, other in _pairs(self.objective.batch, moved) for id in one[one != other].tolist()}
        return frozenset(order.tolist()) - present

    def relabeled(self, labels: Tensor, relabels: Relabel) -> object:
        """The batch with its token ids or classes permuted."""
        if relabels == "classes" and self._targets is None:
            return self.objective.classes_relabeled(labels)
        return self.objective.batch if relabels == "classes" else self.objective.vocabulary_relabeled(labels)

    def _loss(self, labels: Tensor | None, relabels: Relabel) -> Tensor:
        batch = self.objective.batch if labels is None else self.relabeled(labels, relabels)
        if self._targets is None:
            return self.objective.loss(batch)
        logits = self.objective.logits(batch)
        assert logits is not None
        targets = self._targets
        if labels is not None and relabels != "tokens":
            targets = labels.to(targets.device)[targets]
        return cross_entropy(logits.flatten(0, -2), targets.flatten())

    @cached_property
    def _targets(self) -> Tensor | None:
        """Seeded classes for the logits of a plain module, which come with no loss of their own."""
        if not self._seeded or hasattr(getattr(self.module, "config", None), "model_type"):
            return None
        with torch.no_grad():
            logits = self.objective.logits()
        if logits is None:
            return None
        drawn = torch.randint(logits.shape[-1], logits.shape[:-1], generator=torch.Generator().manual_seed(0))
        return drawn.to(logits.device)

    def _precision(self) -> AbstractContextManager[object]:
        return _Widened() if self.widens else nullcontext()

    @contextmanager
    def _at(self, values: Values) -> Iterator[None]:
        before = {name: tensor.data for name, tensor in self.tensors.items()}
        try:
            for name, tensor in self.tensors.items():
                tensor.data = values[name].to(tensor.dtype)
            yield
        finally:
            for name, tensor in self.tensors.items():
                tensor.data = before[name]


def _pairs(one: Any, other: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors in the same places of two batches."""
    if isinstance(one, Tensor):
        yield one, other
    elif isinstance(one, (Mapping, tuple, list)):
        for key in one if isinstance(one, Mapping) else range(len(one)):
            yield from _pairs(one[key], other[key])


def copied(module: nn.Module) -> nn.Module:
    """A copy of a module without its gradients; a Trainer around it is shared, not copied.

    Raises:
        ConfigError: if the module cannot be copied.
    """
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    shared: dict[int, Any] = {}
    trainer = getattr(module, "_trainer", None)
    if trainer is not None:
        shared[id(trainer)] = trainer
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        duplicate = copy.deepcopy(module, shared)
    except (TypeError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{type(module).__name__} cannot be copied, and an audit works on a copy: {error}") from error
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    for child in duplicate.modules():
        # transformers' grouped matrix products know no float64; the plain loop over experts is the definition.
        config: Any = getattr(child, "config", None)
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"
    return duplicate


class _Selections(TorchDispatchMode):
    """Remembers the indices of every top-k."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.topk.default:
            self.found.append(result[1].clone())
        return result


class _Lookups(TorchFunctionMode):
    """Remembers the ids with which tables are first looked up."""

    def __init__(self, tables: Mapping[int, str]) -> None:
        super().__init__()
        self.tables = tables
        self.found: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.embedding and id(args[1]) in self.tables:
            self.found.setdefault(self.tables[id(args[1])], args[0].clone())
        return func(*args, **(kwargs or {}))


class _Widened(TorchFunctionMode):
    """Turns every request for float32 into one for float64.

    Modules compute norms, softmax and rotary embeddings in float32 whatever the dtype of their weights. A float64 copy
    of such a module still has float32 rounding in it, 1e-7 and more, which would hide small violations.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        wide = [torch.float64 if argument is torch.float32 else argument for argument in args]
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*wide, **named)
