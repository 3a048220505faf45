"""A taxonomy is total and disjoint, or an error names everything that is wrong."""

import pytest
import torch
from torch import nn

from lit_symopt import Block, BlockTaxonomy, Layout, Role
from lit_symopt.blocks import Action
from lit_symopt.errors import TaxonomyError


class Tiny(nn.Module):
    """An embedding, two layers with biases, and a head that may be tied."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


EMBEDDING = Block("embedding.weight", role=Role.EMBEDDING)
LINEAR = Block("layers.*.weight", role=Role.LINEAR)
BIAS = Block("*.bias", role=Role.VECTOR)
HEAD = Block("head.weight", role=Role.LM_HEAD)


def test_every_trainable_parameter_gets_one_block_in_order() -> None:
    module = Tiny()
    blocks = BlockTaxonomy([HEAD, BIAS, LINEAR, EMBEDDING]).assign(module)
    assert [block.name for block in blocks] == [name for name, _ in module.named_parameters()]
    assert [str(block.role) for block in blocks] == ["embedding", "linear", "vector", "linear", "vector", "lm_head"]
    assert blocks[0].shape == (10, 4)


def test_a_tied_parameter_is_one_block_with_aliases() -> None:
    tied = Block("embedding.weight", role=Role.TIED_EMBEDDING)
    block = BlockTaxonomy([tied, LINEAR, BIAS]).assign(Tiny(tied=True))[0]
    assert (block.name, block.aliases) == ("embedding.weight", ("head.weight",))
    assert not block.symmetry.shift_invariant


def test_a_tied_parameter_claimed_under_both_names_is_refused() -> None:
    with pytest.raises(TaxonomyError, match=r"'embedding.weight' = 'head.weight'.*Role.TIED_EMBEDDING"):
        BlockTaxonomy([EMBEDDING, HEAD, LINEAR, BIAS]).assign(Tiny(tied=True))


def test_frozen_parameters_are_skipped_and_listed() -> None:
    module = Tiny()
    module.embedding.requires_grad_(False)
    taxonomy = BlockTaxonomy([EMBEDDING, LINEAR, BIAS, HEAD])
    assert "embedding.weight" not in [block.name for block in taxonomy.assign(module)]
    assert taxonomy.frozen(module) == [("embedding.weight", (10, 4))]


def test_a_frozen_parameter_needs_no_block() -> None:
    module = Tiny()
    module.head.requires_grad_(False)
    assert len(BlockTaxonomy([EMBEDDING, LINEAR, BIAS]).assign(module)) == 5


def test_one_error_names_every_fault() -> None:
    taxonomy = BlockTaxonomy(
        [
            Block("layers.*.weight", role=Role.QUERY, layout=Layout.heads(3)),
            Block("layers.1.weight", role=Role.LINEAR),
            Block("*.router.weight", role=Role.ROUTER),
            HEAD,
        ],
        name="Mistaken",
    )
    with pytest.raises(TaxonomyError) as caught:
        taxonomy.assign(Tiny())
    message = str(caught.value)
    for fragment in (
        "3 trainable parameter(s) belong to no block: 'embedding.weight' (10, 4), 'layers.0.bias' (4,)",
        "Add a Block for them to Mistaken, or freeze them.",
        "'layers.1.weight' (4, 4) by 'layers.*.weight' (query) and 'layers.1.weight' (linear)",
        "1 pattern(s) match no parameter: '*.router.weight' (router)",
        "'layers.0.weight': the layout heads(3, dim='rows') does not fit the shape (4, 4): its 4 rows",
    ):
        assert fragment in message


def test_an_unknown_role_lists_the_known_ones() -> None:
    with pytest.raises(TaxonomyError, match=r"unknown role 'gating'; known: embedding, lm_head"):
        Block("*", role="gating")  # type: ignore[arg-type]


def test_shift_invariance_is_the_roles_unless_declared() -> None:
    assert HEAD.symmetry.shift_invariant
    assert not Block("head.weight", role=Role.LM_HEAD, shift_invariant=False).symmetry.shift_invariant
    assert Block("router.bias", role=Role.VECTOR, shift_invariant=True).symmetry.shift_invariant
    assert str(HEAD.symmetry) == "S_V × O(d) / shift"


def test_every_role_has_a_symmetry() -> None:
    for role in Role:
        assert Block("*", role=role).symmetry.units


def test_a_taxonomy_moves_below_a_prefix() -> None:
    wrapped = nn.ModuleDict({"net": Tiny()})
    taxonomy = BlockTaxonomy([EMBEDDING, LINEAR, BIAS, HEAD]).under("net.")
    assert taxonomy.assign(wrapped)[0].name == "net.embedding.weight"


def test_a_module_without_declaration_or_known_architecture_is_refused() -> None:
    with pytest.raises(TaxonomyError, match=r"Linear declares no blocks and contains no known architecture \(.*qwen3"):
        BlockTaxonomy.of(nn.Linear(2, 2))


def test_matrices_of_a_scalar_or_a_bare_pattern_are_refused() -> None:
    module = nn.ParameterDict({"temperature": nn.Parameter(torch.ones(()))})
    with pytest.raises(TaxonomyError, match="needs 2 dimensions, not 0"):
        BlockTaxonomy([Block("temperature", role=Role.LINEAR)]).assign(module)
    assert BlockTaxonomy([Block("temperature", role=Role.VECTOR)]).assign(module)[0].shape == ()
    with pytest.raises(TaxonomyError, match="is a pattern"):
        _ = HEAD.parts


def test_how_a_group_acts_on_units_follows_the_role_unless_declared() -> None:
    assert Block("up", role=Role.UP).acts is Action.MONOMIAL
    assert Block("up", role=Role.UP, action=Action.PERMUTATION).acts is Action.PERMUTATION
    assert Block("q", role=Role.QUERY).symmetry.units == "SO(2)^(h/2)"
    assert Block("q", role=Role.QUERY, action=Action.GENERAL_LINEAR).symmetry.units == "GL(h)"
    assert all(Block("*", role=role).acts for role in Role)


def test_a_router_with_a_z_loss_is_not_blind_to_the_shift() -> None:
    assert not Block("router", role=Role.ROUTER, z_loss=True).symmetry.shift_invariant
    with pytest.raises(TaxonomyError, match="z-loss sees the shift"):
        Block("router", role=Role.ROUTER, z_loss=True, shift_invariant=True)
    with pytest.raises(TaxonomyError, match="about routers, not about role lm_head"):
        Block("head", role=Role.LM_HEAD, z_loss=True)


def test_a_vector_lies_along_something_known() -> None:
    assert Block("sinks", role=Role.VECTOR, along="heads").along == "heads"
    with pytest.raises(TaxonomyError, match=r"along='head' is nothing .* known: residual, heads, embedding"):
        Block("sinks", role=Role.VECTOR, along="head")
