"""From a family's arguments to its model: checked, then built, or loaded from a folder that says the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from importlib import import_module
from inspect import signature
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from lit_symopt.errors import ConfigError
from lit_symopt.models.deferred import Deferred
from lit_symopt.models.materialize import active_zero_init, outside_zero_init
from lit_symopt.models.pretrained import load_pretrained, read_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Attention = Literal["sdpa", "eager", "flash_attention_2"]
Experts = Literal["eager", "grouped_mm"]
Entries = Mapping[str, Any]


def transformers_class(name: str) -> type[PreTrainedModel]:
    """A model class of transformers; its file is imported outside `zero.Init`, which changes classes defined inside."""
    with outside_zero_init():
        found: type[PreTrainedModel] = getattr(import_module("transformers"), name)
    return found


def build_model(
    kind: type[PreTrainedModel],
    entries: Entries,
    *,
    family: type,
    configure: Callable[[Entries], PretrainedConfig],
    held: Callable[[PretrainedConfig], Entries],
    pretrained: str | None,
    attention: str,
    experts: str | None = None,
    gradient_checkpointing: bool = False,
    deferred: bool = False,
) -> PreTrainedModel | Deferred:
    """A model of a family with fresh weights, or with those of a folder.

    Inside `deepspeed.zero.Init` it is partitioned as it is built, with the same weights.

    Args:
        kind: transformers' class, e.g. `Qwen3ForCausalLM`.
        entries: the arguments that say the architecture, by name.
        family: our class, whose signature has the defaults.
        configure: the configuration that the entries mean.
        held: what a configuration says about each entry.
        pretrained: a `save_pretrained` folder, or `None` for fresh weights.
        attention: transformers' attention kernel.
        experts: how the experts of a layer are multiplied; `None` for a model without any.
        gradient_checkpointing: recompute activations in the backward pass.
        deferred: describe the model without building it.

    Raises:
        ConfigError: for an architecture that cannot be built, a folder that is none, or entries that contradict it.
    """
    if pretrained is None:
        refuse_impossible(entries)
        config = configure(entries)
        config._attn_implementation = attention
        config._experts_implementation = experts
        load = None
    else:
        _refuse_contradictions(entries, pretrained, family=family, model_type=_model_type(kind), held=held)
        config = read_config(pretrained)
        config._attn_implementation = attention
        if experts is not None:
            config._experts_implementation = experts
        load = partial(_load, pretrained, attention=attention, experts=experts)
    describe = partial(_fresh, kind, config, name=family.__name__, attention=attention)
    build = load or describe
    later = deferred or active_zero_init() is not None
    described = Deferred.described(describe, build, draws=load is None) if later else None
    model = build() if described is None else described.model
    if gradient_checkpointing:
        # The second name is that of older versions of transformers; newer ones warn of it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if described is None or deferred:
        return described or model
    described.materialize()
    return model


def _fresh(kind: type[PreTrainedModel], config: PretrainedConfig, *, name: str, attention: str) -> PreTrainedModel:
    try:
        return kind(deepcopy(config))  # transformers writes into it
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{name} with attention={attention!r} cannot be built here: {error}") from error


def _load(folder: str, *, attention: str, experts: str | None) -> PreTrainedModel:
    model = load_pretrained(folder, attention=attention)
    if experts is not None:
        model.set_experts_implementation(experts)
    return model


def refuse_impossible(entries: Entries) -> None:
    """Checks what can be said of an architecture by the names of its entries alone; `None` stands for "none".

    Integers must be at least 1 and floating numbers positive, except `attention_dropout`, in [0, 1). Heads come in
    equal groups, `head_dim` is even, and no more experts are selected than there are.

    Raises:
        ConfigError: naming the entry and its value.
    """
    for name, value in entries.items():
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
        if name == "attention_dropout":
            if not 0 <= value < 1:
                raise ConfigError(f"attention_dropout={value} must be in [0, 1)")
        elif isinstance(value, float) and not (isfinite(value) and value > 0):
            raise ConfigError(f"{name}={value} must be positive and finite")
    _refuse_impossible_heads(entries)
    selected, experts = entries.get("num_experts_per_tok", 1), entries.get("num_experts", 1)
    if selected > experts:
        raise ConfigError(
            f"num_experts_per_tok={selected} is more than num_experts={experts}: a token is sent to as many different "
            f"experts as it selects; give num_experts_per_tok at most {experts}"
        )


def _refuse_impossible_heads(entries: Entries) -> None:
    queries, keys, width = entries["num_attention_heads"], entries["num_key_value_heads"], entries["hidden_size"]
    if queries % keys:
        raise ConfigError(
            f"num_key_value_heads={keys} does not divide num_attention_heads={queries}; each key head serves equally "
            "many query heads"
        )
    if "head_dim" not in entries and width % queries:
        raise ConfigError(f"hidden_size={width} is no multiple of num_attention_heads={queries}: heads are equal parts")
    head_dim = entries.get("head_dim", width // queries)
    if head_dim % 2:
        said = "" if "head_dim" in entries else " (hidden_size / num_attention_heads)"
        raise ConfigError(f"head_dim={head_dim}{said} must be even: rotary embeddings turn pairs of dimensions")


def _model_type(kind: type[PreTrainedModel]) -> str:
    config: Any = kind.config_class
    return str(config.model_type)


def _refuse_contradictions(
    entries: Entries, folder: str, *, family: type, model_type: str, held: Callable[[PretrainedConfig], Entries]
) -> None:
    config = read_config(folder)
    if config.model_type != model_type:
        raise ConfigError(f"{folder} holds a {config.model_type!r} model, not a {model_type!r} one")
    defaults, said = signature(family).parameters, held(config)
    for name, value in entries.items():
        if value not in (said[name], defaults[name].default):
            raise ConfigError(
                f"{name}={value} contradicts pretrained={folder!r}, which has {name}={said[name]}; leave {name} out"
            )
