"""`audit`: a taxonomy, proved on a live model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator, nn

from lit_symopt.audit.evaluate import Evaluator
from lit_symopt.audit.experts import routing, untrained
from lit_symopt.audit.laboratory import Laboratory, Limits
from lit_symopt.audit.loss import prove
from lit_symopt.audit.points import Values, fitted, generic, given, sharpened
from lit_symopt.audit.report import AuditReport
from lit_symopt.audit.sites import Anatomy, anatomy
from lit_symopt.audit.updates import commuting
from lit_symopt.blocks import Block, BlockTaxonomy, Role
from lit_symopt.config import SymOptConfig
from lit_symopt.errors import ConfigError, TaxonomyError
from lit_symopt.objective import LossFunction
from lit_symopt.optim import groups_for

DEFAULT_LIMITS = Limits()


def audit(
    module: nn.Module,
    batch: object,
    *,
    taxonomy: BlockTaxonomy | None = None,
    config: SymOptConfig | None = None,
    loss: LossFunction | None = None,
    loss_only: bool = False,
    seed: int = 0,
    elements: int = 2,
    limits: Limits = DEFAULT_LIMITS,
) -> AuditReport:
    """Act on the weights of a module with its declared symmetries, and see that the loss does not move.

    For every symmetry a random, large group element acts on all the blocks it must act on together, at the module's
    own weights and at generic ones, in fp32 and in float64; the row gives the largest relative change of the loss. A
    control, the same element without one of its blocks, must move the loss, or the row proves nothing. Then, for each
    block, the optimizer's updates of transformed gradients (real ones, at `precision: fp32`) are compared with its
    transformed updates: `‖U(gG) - gU(G)‖ / ‖U(G)‖`.

    The module is left as it is, bit by bit; what is exchanged are the weights of two copies, one in float64. That has
    its cost: besides the module about fifteen times the memory of its weights in float32 (ten with `loss_only`), and
    minutes for 100 million parameters on a CPU. A small configuration of the same architecture shows the same.

    Args:
        module: any module.
        batch: what it is trained on; a few hundred tokens are enough.
        taxonomy: its blocks; default: what it declares, else what its structure shows.
        config: stack and overrides; default: the module's `symopt`, else the symmetric stack.
        loss: the loss, as `loss(module, batch)`; default: see `lit_symopt.objective.Objective`.
        loss_only: leave the updates out, for stacks whose rules do not commute.
        seed: of the group elements.
        elements: how many are tried of each symmetry.
        limits: what counts as unmoved and as moved.

    Raises:
        TaxonomyError: if the taxonomy does not cover the module.
        ConfigError: if the config centers a block whose shift the loss sees, or the module cannot be called.

    Example:
        >>> from lit_symopt import Block, BlockTaxonomy, Layout, Role
        >>> _ = torch.manual_seed(0)
        >>> mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> blocks = [Block("0.weight", role=Role.UP), Block("2.weight", role=Role.DOWN, layout=Layout.transposed()),
        ...           Block("*.bias", role=Role.VECTOR)]
        >>> report = audit(mlp, torch.randn(5, 6), taxonomy=BlockTaxonomy(blocks))
        >>> [(row.symmetry, row.verdict) for row in report.loss][0]
        ('neurons: permutation', 'pass')
    """
    taxonomy = taxonomy or taxonomy_of(module, batch)
    config = config or getattr(module, "symopt", None) or SymOptConfig()
    if not isinstance(config, SymOptConfig):
        raise ConfigError(f"the symopt of {type(module).__name__} is {config!r}, not a SymOptConfig")
    trained = taxonomy.assign(module)
    groups_for(trained, module, config)  # what is wrong with the config is said before anything is computed
    model = _anatomy(taxonomy, module, trained)
    heads = [block for block in trained if block.role is Role.LM_HEAD]
    tied = [block for block in trained if block.role is Role.TIED_EMBEDDING]
    single, wide = (
        Evaluator(module, batch, dtype=dtype, loss=loss, classes=bool(heads or tied))
        for dtype in (torch.float32, torch.float64)
    )
    own = given(module)
    base = single.loss(own)
    if base != base or abs(base) == float("inf"):
        raise ConfigError(
            f"the loss of {type(module).__name__} on this batch is {base}: nothing can be told from it. A causal "
            "language model needs sequences of two tokens or more."
        )
    double = _in_float64(wide, own)
    generator = Generator().manual_seed(seed)
    buffers = frozenset(_routing_buffers(model, module))
    sharp = sharpened(own, model)
    drawn = generic(sharp, model, generator, routing=buffers)
    laboratory = Laboratory(
        single,
        double,
        given=own,
        sharpened=sharp,
        generic=drawn,
        fitted=fitted(drawn, model, single.gradients),
        limits=limits,
        elements=elements,
    )
    found = prove(laboratory, model, module, seed=seed)
    updates = () if loss_only else commuting(single, own, trained, config, limits=limits, elements=elements, seed=seed)
    narrow = "" if double is None or double.widens else ", float64 with the module's own float32 inside"
    narrow = narrow if double else ", fp32 alone: the module does not run in float64"
    headline = f"{type(module).__name__}, loss {base:.4f}, stack {config.stack}{narrow}"
    return AuditReport(loss=tuple(found), updates=tuple(updates), headline=headline)


def taxonomy_of(module: nn.Module, batch: object) -> BlockTaxonomy:
    """What the module declares, or that of the known architecture inside it, or else what its structure shows."""
    if callable(getattr(module, "block_taxonomy", None)):
        return BlockTaxonomy.of(module)
    try:
        return BlockTaxonomy.of(module)
    except TaxonomyError:
        return BlockTaxonomy.infer(module, batch)


def _in_float64(evaluator: Evaluator, values: Values) -> Evaluator | None:
    """The evaluator as it works: a module keeps its float32 inside float64 if it cannot do without.

    None for a module that does not run in float64 at all; the headline says either.
    """
    for evaluator.widens in (True, False):
        try:
            evaluator.loss(values)
        except (RuntimeError, TypeError):
            continue
        return evaluator
    return None


def _anatomy(taxonomy: BlockTaxonomy, module: nn.Module, trained: list[Block]) -> Anatomy:
    """Sites of all blocks, those of frozen parameters included: a joint action moves them too."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    blocks, unclaimed = list(trained), []
    for parameter, known in names.items():
        if parameter.requires_grad:
            continue
        claims = [block for block in taxonomy.blocks if block.matches(known)]
        if len(claims) == 1:
            shape = tuple(parameter.shape)
            blocks.append(replace(claims[0], name=known[0], shape=shape, aliases=tuple(known[1:])))
        else:
            unclaimed.append(known[0])
    return anatomy(blocks, frozen=unclaimed)


def _routing_buffers(model: Anatomy, module: nn.Module) -> list[str]:
    shapes = untrained(model, module)
    sites = [site for site in model.sites if site.kind == "mixture"]
    return [name for site in sites for name in routing(site, shapes)]
