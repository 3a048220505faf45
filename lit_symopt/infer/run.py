"""`infer`: record a pass, follow it, decide, and say what is open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lit_symopt.blocks import Block, BlockTaxonomy
from lit_symopt.errors import ConfigError, TaxonomyError
from lit_symopt.infer.decide import decide
from lit_symopt.infer.deciding import Deciding
from lit_symopt.infer.follow import follow
from lit_symopt.infer.siblings import decide_siblings
from lit_symopt.objective import Objective
from lit_symopt.trace import record


def infer(
    module: nn.Module,
    example_batch: object,
    *,
    known: Sequence[Block] = (),
    loss: Callable[[nn.Module, Any], Any] | None = None,
) -> BlockTaxonomy:
    """The taxonomy of a module, from what one pass does with its parameters.

    The pass runs without gradients, as `Objective.run` calls the module; its operations are recorded, not its
    activations. The module is left as it was. What decides:

    - a look-up by ids of the batch is an embedding, one by positions a position table; used in a product too: tied;
    - what writes the factors of scores under a softmax are queries and keys, what is averaged by it are values, and
      the rows that meet in one head are its layout; pairs of rows that are mixed are planes of a rotary embedding;
    - a map into an activation into another map is an MLP; what passes through the activation is the gate;
    - a map whose outputs are chosen among and then weigh other activations is a router;
    - a map whose outputs enter a logarithmic softmax, or are returned as `logits`, is the head.

    Args:
        module: any module that `Objective` can call.
        example_batch: what it is called with. A few tokens are enough.
        known: blocks, as patterns, for parameters that the structure does not decide; they go before what was seen.
        loss: what to call as `loss(module, example_batch)` instead of what `Objective` would.

    Returns:
        One block a trainable parameter, with its full name.

    Raises:
        TaxonomyError: naming every parameter that is not decided, what was seen of it, and the block to write.
        ConfigError: if the module cannot be called with the batch, or has no storage (meta device, sharded).

    Example:
        >>> from torch import nn, ones
        >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> [(block.name, str(block.role)) for block in infer(mlp, ones(2, 4)).blocks]
        [('0.weight', 'up'), ('0.bias', 'vector'), ('2.weight', 'down'), ('2.bias', 'vector')]
    """
    _refuse_without_storage(module)
    objective = Objective(module, example_batch, loss=loss)
    trace = record(objective.run, module, example_batch)
    varied = frozenset(
        name
        for name, buffer in module.named_buffers()
        if not buffer.is_floating_point() and buffer.numel() and bool((buffer != buffer.flatten()[0]).any())
    )
    names = _names(module)
    shapes = {first: tuple(module.get_parameter(first).shape) for first in names}
    frozen = frozenset(first for first in names if not module.get_parameter(first).requires_grad)
    deciding = decide(follow(trace, varied=varied, frozen=frozen), shapes)
    decide_siblings(deciding)
    return _taxonomy(module, deciding, names, known)


def _taxonomy(
    module: nn.Module, deciding: Deciding, names: dict[str, tuple[str, ...]], known: Sequence[Block]
) -> BlockTaxonomy:
    name = f"inferred for {type(module).__name__}"
    blocks: list[Block] = []
    undecided: list[str] = []
    for first, every in names.items():
        if not module.get_parameter(first).requires_grad:
            continue
        given = [block for block in known if block.matches(every)]
        if given:
            blocks.extend(replace(block, name=first) for block in given)
        elif first in deciding.blocks:
            blocks.append(deciding.blocks[first])
        else:
            undecided.append(first)
    idle = [block.name for block in known if not any(block.matches(every) for every in names.values())]
    if idle:
        raise TaxonomyError(
            f"{name}: {', '.join(map(repr, idle))} of `known` match no parameter; correct or remove them"
        )
    if undecided:
        raise TaxonomyError(_question(name, deciding, undecided))
    taxonomy = BlockTaxonomy(blocks, name=name)
    taxonomy.assign(module)
    return taxonomy


def _question(name: str, deciding: Deciding, undecided: list[str]) -> str:
    lines = [f"{name}: one pass does not decide the place of {len(undecided)} trainable parameter(s):"]
    for parameter in undecided:
        seen = deciding.facts.seen(parameter)
        reason = deciding.reasons.get(parameter) or (
            "is used in a way that is not understood" if seen else "took no part in the pass, nor did one like it"
        )
        lines.append(f"  {parameter!r} {deciding.shapes[parameter]}: {reason}")
    lines.append("Say what they are, or freeze them:")
    lines.append("  infer(module, batch, known=[")
    lines += [f"      {_suggestion(parameter, deciding)}" for parameter in undecided]
    lines.append("  ])")
    lines.append("or give the module a method block_taxonomy() that returns a BlockTaxonomy of all its blocks.")
    return "\n".join(lines)


def _suggestion(name: str, deciding: Deciding) -> str:
    shape = deciding.shapes[name]
    if name in deciding.suggestions:
        return f'Block("{name}", {deciding.suggestions[name]}),'
    if sum(size > 1 for size in shape) < 2:
        return f'Block("{name}", role=Role.VECTOR),'
    if len(shape) == 2:
        return f'Block("{name}", role=Role.LINEAR),'
    if "merged" in deciding.reasons.get(name, ""):
        return f'Block("{name}", role=Role.LINEAR, layout=Layout.flatten()),  # one matrix with {shape[0]} rows'
    return f'Block("{name}", role=Role.LINEAR, layout=Layout.experts()),  # {shape[0]} matrices'


def _names(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """All names of every parameter, by the first one."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {every[0]: tuple(every) for every in names.values()}


def _refuse_without_storage(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ConfigError(
                f"{name!r} is on the meta device and has no values to run a pass with; infer from a small instance of "
                "the same architecture, or build the module on a real device"
            )
        if hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_shape"):
            raise ConfigError(f"{name!r} is sharded; infer before the module is, and pass the taxonomy on")
