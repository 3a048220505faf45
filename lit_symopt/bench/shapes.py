"""What a step is timed on: the parameters of a model by name, shape, role and layout, and no model.

| `--shapes` | what it is |
|---|---|
| `qwen3_0p6b`, `olmoe_tiny`, ... | the parameters of the model of the recipe `configs/<name>.yaml` |
| `qwen3_scaled` | 20 layers, hidden 256, 4 query and 2 key-value heads of 64, 768 neurons, vocabulary 8,192 |
| `olmoe_scaled` | 12 layers, hidden 256, 4 heads of 64, 32 experts of 128 neurons, vocabulary 8,192 |
| a file | see `lit_symopt.bench.shape_file` |

The vocabulary of the scaled lists is small so that their time is that of the matrices and not that of AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_symopt.blocks import Block
from lit_symopt.errors import ConfigError

CONFIGS = Path("configs")
LAYERS = "num_hidden_layers"
SHORT = {"gpt_oss": "gpt_oss_small", "tiny": "qwen3_tiny"}
"""Short names of recipes."""

SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_scaled": (
        "Qwen3",
        {
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 768,
            LAYERS: 20,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
    ),
    "olmoe_scaled": (
        "OLMoE",
        {
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 128,
            LAYERS: 12,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_experts": 32,
            "num_experts_per_tok": 4,
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class ShapeList:
    """Parameters to be updated.

    Attributes:
        name: of the list.
        blocks: with the full name of a parameter, its shape, role and layout.
        layers: how many a model of it has; `None` where nobody says.
    """

    name: str
    blocks: tuple[Block, ...]
    layers: int | None = None

    @property
    def elements(self) -> int:
        """Numbers in all parameters."""
        return sum(prod(shape_of_block(block)) for block in self.blocks)

    def only(self, keep: Callable[[Block], bool], *, name: str | None = None) -> ShapeList:
        """The blocks that `keep` wants."""
        return replace(self, name=name or self.name, blocks=tuple(block for block in self.blocks if keep(block)))


def shape_of_block(block: Block) -> tuple[int, ...]:
    """The shape that an assigned block has."""
    assert block.shape is not None, block.name
    return block.shape


def shape_list(name: str, *, layers: int | None = None) -> ShapeList:
    """The list of that name, or in that file.

    Args:
        name: see the module.
        layers: in place of the model's own number; not for files, which have none.

    Raises:
        ConfigError: for a name that is neither a list, a recipe nor a file, with the known ones; for a file that does
            not parse, with the line; for `layers` that nothing can follow.

    Example:
        >>> one = shape_list("qwen3_scaled", layers=1)
        >>> len(one.blocks), one.elements
        (14, 4981632)
        >>> one.blocks[1].name, str(one.blocks[1].role), one.blocks[1].shape
        ('model.model.layers.0.self_attn.q_proj.weight', 'query', (256, 256))
    """
    if layers is not None and layers < 1:
        raise ConfigError(f"--layers {layers}: a model has at least one layer")
    name = SHORT.get(name, name)
    if name in SCALED:
        kind, arguments = SCALED[name]
        return _of_model(name, f"lit_symopt.models.{kind}", arguments, layers)
    recipe = _recipe(name)
    if recipe is not None:
        return _of_recipe(name, recipe, layers)
    if not Path(name).is_file():
        raise ConfigError(
            f"--shapes {name}: no list, no recipe and no file of that name; known: {', '.join(known_lists())}, or a "
            "file with a list of shapes (YAML or JSON)"
        )
    if layers is not None:
        raise ConfigError(
            f"--layers {layers}: the file {name} lists its parameters one by one and has no layers to be fewer of; "
            "shorten the file"
        )
    from lit_symopt.bench.shape_file import read_shapes

    return read_shapes(Path(name))


def known_lists() -> list[str]:
    """Names of the scaled lists and of the recipes that are here, those that are no overlays."""
    recipes = {path.stem for folder in _folders() for path in folder.glob("*.yaml")}
    return [*SCALED, *sorted(recipes)]


def _folders() -> list[Path]:
    """Where recipes are: below the working directory, else in the tree of an editable installation."""
    return [folder for folder in (CONFIGS, Path(__file__).parents[2] / CONFIGS) if folder.is_dir()]


def _recipe(name: str) -> Path | None:
    return next((path for folder in _folders() if (path := folder / f"{name}.yaml").is_file()), None)


def _of_recipe(name: str, path: Path, layers: int | None) -> ShapeList:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        model: Any = OmegaConf.to_container(OmegaConf.load(path).model, resolve=True)
        kind, arguments = model["class_path"], dict(model.get("init_args") or {})
    except (OmegaConfBaseException, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} says of no model how it is built (model.class_path, model.init_args): {error}"
        ) from error
    arguments.pop("symopt", None)
    return _of_model(name, kind, arguments, layers)


def _of_model(name: str, kind: str, arguments: dict[str, Any], layers: int | None) -> ShapeList:
    from lit_symopt.blocks import BlockTaxonomy

    module, _, attribute = kind.rpartition(".")
    if layers is not None:
        arguments = {**arguments, LAYERS: layers}
    with torch.device("meta"):
        model: nn.Module = getattr(import_module(module), attribute)(**arguments)
    blocks: Iterable[Block] = BlockTaxonomy.of(model).assign(model)
    return ShapeList(name=name, blocks=tuple(blocks), layers=arguments.get(LAYERS))
