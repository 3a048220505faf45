"""How a module is called on a batch, and what its loss is: what inference and audit need to know of any module.

Shape legend:  B sequences or samples, T tokens, V vocabulary or classes.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lit_symopt.errors import ConfigError

LossFunction = Callable[[nn.Module, Any], Tensor]

# Integer entries of a batch that are not ids of anything in a vocabulary.
_NOT_TOKENS = ("attention_mask", "position_ids", "token_type_ids", "cache_position", "decoder_attention_mask")


class Objective:
    """A module together with a batch: one pass as training runs it, and its loss.

    What is called, and what the loss is:

    - a module with a method `training_loss(batch)`: that;
    - a LightningModule: `training_step(batch, 0)`, its logging silenced; a Trainer is put in its place if it has none;
    - a transformers model: `forward(**batch)`, and the cross-entropy of its logits, computed here so that a float64
      model has a float64 loss. Causal models predict the next token, `labels` default to `input_ids`; a classifier
      without labels gets seeded ones. Without logits, or with labels of another shape than they have, it is treated
      as any other module;
    - any other module: `forward(batch)`, `forward(*batch)` or `forward(**batch)` by the kind of the batch. The loss is
      its output if that is one number, the cross-entropy with seeded classes if `classes` is true, else the mean
      square distance of its outputs from seeded normal numbers.

    Every pass leaves parameters, buffers, attributes, gradients, mode and random state as they were, and draws the
    same random numbers (dropout).

    Args:
        module: any module.
        batch: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        loss: what to call instead of all this, as `loss(module, batch)`.
        classes: the last dimension of a plain module's output are logits of classes.

    Raises:
        ConfigError: if the batch lacks arguments that forward needs, or has some that it does not know, naming them.

    Example:
        >>> objective = Objective(nn.Linear(3, 2), torch.ones(4, 3))
        >>> objective.loss().shape, objective.logits().shape
        (torch.Size([]), torch.Size([4, 2]))
    """

    def __init__(
        self, module: nn.Module, batch: object, *, loss: LossFunction | None = None, classes: bool = False
    ) -> None:
        self.module = module
        self.batch = batch
        self.classes = classes
        self._loss = loss
        self._call = self._kind()
        if self._call in (self._transformers, self._plain):
            _bind(module, batch)

    def run(self) -> Any:
        """One pass as training runs it; returns what the module returned (a loss, or its output).

        Raises:
            ConfigError: if the module cannot be called with the batch, with the reason.
        """
        with untouched(self.module):
            try:
                return self._call(self.batch)
            except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
                raise ConfigError(
                    f"{type(self.module).__name__} cannot be called with the example batch ({_describe(self.batch)}): "
                    f"{type(error).__name__}: {error}"
                ) from error

    def loss(self, batch: object | None = None) -> Tensor:
        """The loss of the batch, or of another one like it: one differentiable number.

        Raises:
            ConfigError: if the training step returns none.
        """
        batch = self.batch if batch is None else batch
        with untouched(self.module):
            output = self._call(batch)
        if self._call == self._transformers:
            return _of_logits(self.module, output, batch)
        if self._call == self._plain:
            return _of_output(output, classes=self.classes)
        value = output["loss"] if isinstance(output, Mapping) and "loss" in output else output
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ConfigError(f"the loss of {type(self.module).__name__} is {value!r}, not one number; pass loss=...")
        return value.reshape(())

    def logits(self, batch: object | None = None) -> Tensor | None:
        """The logits of a transformers model or the output tensor of a plain one; None where training hides them."""
        if self._call not in (self._transformers, self._plain):
            return None
        with untouched(self.module):
            output = self._call(self.batch if batch is None else batch)
        found = getattr(output, "logits", output)
        return found if isinstance(found, Tensor) else None

    def vocabulary_relabeled(self, permutation: Tensor) -> object:
        """The batch with every token id `t` replaced by `permutation[t]`, in inputs and labels alike.

        Token ids are the integer tensors of two or more dimensions that are not masks, positions or segment ids;
        negative ids (ignored labels) stay.
        """
        return _map_batch(self.batch, lambda value: value.dim() >= 2, permutation)

    def classes_relabeled(self, permutation: Tensor) -> object:
        """The batch with every class `c` of its one-dimensional integer tensors replaced by `permutation[c]`.

        For a transformers classifier without labels in the batch the seeded ones are put in first.
        """
        batch = self.batch
        if self._call == self._transformers and isinstance(batch, Mapping) and "labels" not in batch:
            logits = self.logits()
            if logits is not None and logits.dim() == 2:
                batch = {**batch, "labels": _seeded_classes(logits)}
        return _map_batch(batch, lambda value: value.dim() == 1, permutation)

    # -- the four kinds ------------------------------------------------------------------------------------------

    def _kind(self) -> Callable[[Any], Any]:
        if self._loss is not None:
            return self._given
        if callable(getattr(self.module, "training_loss", None)):
            return self._training_loss
        if _is_lightning(self.module):
            return self._training_step
        return self._transformers if hasattr(getattr(self.module, "config", None), "model_type") else self._plain

    def _given(self, batch: Any) -> Tensor:
        assert self._loss is not None
        return self._loss(self.module, batch)

    def _training_loss(self, batch: Any) -> Tensor:
        module: Any = self.module
        loss: Tensor = module.training_loss(_as_dtype(module, batch))
        return loss

    def _training_step(self, batch: Any) -> Any:
        module: Any = self.module
        with _outside_training(module):
            return module.training_step(_as_dtype(module, batch), 0)

    def _transformers(self, batch: Any) -> Any:
        arguments, keywords = _arguments(_as_dtype(self.module, batch))
        known = inspect.signature(self.module.forward).parameters
        if "use_cache" in known:
            keywords.setdefault("use_cache", False)
        if "decoder_input_ids" not in known and not arguments:
            keywords.pop("labels", None)  # the loss is computed here
        return self.module(*arguments, **keywords)

    def _plain(self, batch: Any) -> Any:
        arguments, keywords = _arguments(_as_dtype(self.module, batch))
        return self.module(*arguments, **keywords)


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Puts back, after a pass, what it may change in a module: buffers, attributes, gradients, modes, random state.

    Inside, the random generators start from a fixed seed, so that two passes draw the same numbers.
    """
    modules = list(module.modules())
    kept = [({**child.__dict__}, {**child._buffers}) for child in modules]
    # transformers hooks itself when it first records router logits; its mark of having done so is an attribute, and
    # putting back only that would hook it again with every pass.
    hooks = [(hooked, {**hooked}) for child in modules for hooked in (child._forward_hooks, child._forward_pre_hooks)]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    for child, (attributes, buffers) in zip(modules, kept, strict=True):
        # The pass writes to copies: putting values back would spoil what autograd has saved.
        child.__dict__.update({name: value.clone() for name, value in attributes.items() if isinstance(value, Tensor)})
        child._buffers.update({name: value.clone() for name, value in buffers.items() if value is not None})
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        torch.default_generator.manual_seed(0)  # torch.manual_seed asks every backend, which takes milliseconds
        for device in devices:
            torch.cuda.default_generators[device.index or 0].manual_seed(0)
        try:
            yield
        finally:
            for child, (attributes, buffers) in zip(modules, kept, strict=True):
                child.__dict__.clear()
                child.__dict__.update(attributes)
                child._buffers.clear()
                child._buffers.update(buffers)
            for hooked, before in hooks:
                hooked.clear()
                hooked.update(before)
            for parameter, gradient in gradients:
                parameter.grad = gradient


@contextmanager
def _outside_training(module: Any) -> Iterator[None]:
    """Lets a training step run outside of fit: `log` does nothing, and a Trainer is there if it is asked for."""
    import lightning as L

    with ExitStack() as stack:
        for child in module.modules():
            if _is_lightning(child):
                for name in ("log", "log_dict"):
                    child.__dict__[name] = lambda *_, **__: None
                    stack.callback(child.__dict__.pop, name, None)
        if getattr(module, "_trainer", None) is None:
            logger = logging.getLogger("lightning.pytorch")
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)  # what a Trainer says of devices and tips has no reader here
            module.trainer = L.Trainer(
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            stack.callback(setattr, module, "trainer", None)
        yield


def _is_lightning(module: nn.Module) -> bool:
    return any(
        kind.__name__ == "LightningModule" and kind.__module__.startswith(("lightning.", "pytorch_lightning."))
        for kind in type(module).__mro__
    )


def _of_logits(module: nn.Module, output: Any, batch: Any) -> Tensor:
    """Cross-entropy of a transformers model's logits `[B, T, V]` or `[B, V]`."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        return _of_output(output, classes=False)
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": _arguments(batch)[0][0]}
    labels = inputs.get("labels")
    if labels is None and logits.dim() == 3 and "input_ids" in inputs:
        labels = inputs["input_ids"]
    if labels is None:
        labels = _seeded_classes(logits)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if logits.dim() == 3 and type(module).__name__.endswith(("CausalLM", "LMHeadModel")):
        logits, labels = logits[:, :-1], labels[:, 1:]
    if logits.shape[:-1] != labels.shape:
        return _of_output(output, classes=False)
    if labels.numel() == 0:
        raise ConfigError(
            "the batch has sequences of one token, which have no next token to predict; give two tokens or more"
        )
    return cross_entropy(logits.flatten(0, -2), labels.flatten().long())


def _of_output(output: Any, *, classes: bool) -> Tensor:
    """A loss for outputs of which nothing is known."""
    found = [value for value in _tensors(output) if value.is_floating_point()]
    if not found:
        raise ConfigError(f"the module returned {type(output).__name__} without a floating tensor; pass loss=...")
    if len(found) == 1 and found[0].numel() == 1:
        return found[0].reshape(())
    if classes:
        return cross_entropy(found[0].flatten(0, -2), _seeded_classes(found[0]).flatten())
    return torch.stack([((value - _seeded_normal(value)) ** 2).mean() for value in found]).sum()


def _seeded_classes(logits: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator).to(logits.device)


def _seeded_normal(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


# -- batches -----------------------------------------------------------------------------------------------------


def _arguments(batch: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def _bind(module: nn.Module, batch: object) -> None:
    """Checks a batch against the signature of a module's forward."""
    arguments, keywords = _arguments(batch)
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*arguments, **keywords)
    except TypeError as error:
        needed = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.default is parameter.empty and parameter.kind not in (2, 4)
        ]
        raise ConfigError(
            f"{type(module).__name__}.forward does not take the example batch: {error}. It needs "
            f"{', '.join(needed) or 'no arguments'}; the batch has {_describe(batch)}. Give the batch as a mapping "
            "from the names of forward's arguments."
        ) from None


def _describe(batch: object) -> str:
    arguments, keywords = _arguments(batch)
    shown = [_shown(value) for value in arguments] + [f"{name}={_shown(value)}" for name, value in keywords.items()]
    return ", ".join(shown) or "nothing"


def _shown(value: object) -> str:
    return f"{type(value).__name__}{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def _as_dtype(module: nn.Module, batch: object) -> Any:
    """The batch with its floating tensors in the dtype of the module's parameters."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())

    def cast(value: object) -> object:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, Mapping):
            return {name: cast(item) for name, item in value.items()}
        if type(value) in (tuple, list):
            return _rebuilt(value, cast)
        return value

    return cast(batch)


def _rebuilt(sequence: Any, change: Callable[[object], object]) -> object:
    return type(sequence)([change(item) for item in sequence])


def _map_batch(batch: object, wanted: Callable[[Tensor], bool], permutation: Tensor) -> object:
    def change(value: object, name: str = "") -> object:
        if isinstance(value, Mapping):
            return {key: change(item, str(key)) for key, item in value.items()}
        if type(value) in (tuple, list):
            return _rebuilt(value, change)
        if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32) or name in _NOT_TOKENS:
            return value
        if not wanted(value):
            return value
        replaced = permutation.to(value)[value.clamp_min(0).long()]
        return torch.where(value < 0, value, replaced)

    return change(batch)
