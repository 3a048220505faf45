"""Inference on small modules whose blocks follow from their definition. Oracle: that definition, written beside each.

The architectures of `tests/infer/modules.py` are tested in `test_architectures.py`; here are the heads, losses and
other parts that they lack, and in `test_infer_*.py` MLPs, attentions and mixtures.
"""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_symopt import Block, BlockTaxonomy, Role
from lit_symopt.infer import infer
from lit_symopt.layout import Layout
from tests.infer.small import Residual, blocks, roles, tokens


class Lit(L.LightningModule):
    def __init__(self, net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self.net(x), y)


def _by_hand(logits: Tensor, classes: Tensor) -> Tensor:
    return (logits.logsumexp(-1) - logits.gather(-1, classes[:, None]).squeeze(-1)).mean()


@pytest.mark.parametrize(
    ("loss", "head", "shift"),
    [
        (F.cross_entropy, "lm_head", True),
        (_by_hand, "lm_head", True),
        (lambda z, y: z.logsumexp(-1).mean(), "linear", False),  # an energy: every shift is seen
        (lambda z, y: F.nll_loss(F.log_softmax(2 * z, -1), y), "lm_head", True),
        (lambda z, y: F.cross_entropy(3 * torch.tanh(z / 3), y), "lm_head", False),
        (lambda z, y: F.cross_entropy(z.clamp(-3, 3), y), "lm_head", False),
        (lambda z, y: F.cross_entropy(z, y) + 0.1 * z.logsumexp(-1).pow(2).mean(), "lm_head", False),
        (lambda z, y: F.mse_loss(z[:, 0], y.float()), "linear", False),
    ],
)
def test_the_loss_tells_the_head_and_whether_it_sees_a_shift_of_all_logits(
    loss: Callable[[Tensor, Tensor], Tensor], head: str, shift: bool
) -> None:
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5))
    found = blocks(Lit(net, loss), (torch.randn(6, 8), torch.arange(6) % 5))
    if head == "linear":  # the last map is then the second one of the MLP
        assert found["net.2.weight"].role is Role.DOWN
        return
    assert str(found["net.2.weight"].role) == head
    assert found["net.2.weight"].symmetry.shift_invariant == found["net.2.bias"].symmetry.shift_invariant == shift
    assert found["net.0.weight"].role is Role.LINEAR


def test_a_top_k_accuracy_in_a_training_step_makes_no_router() -> None:
    def with_accuracy(logits: Tensor, classes: Tensor) -> Tensor:
        hits = (logits.topk(2, -1).indices == classes[:, None]).any(-1).float().mean()
        return F.cross_entropy(logits, classes) + 0 * hits

    found = roles(Lit(nn.Linear(8, 5), with_accuracy), (torch.randn(6, 8), torch.arange(6) % 5))
    assert found == {"net.weight": "lm_head", "net.bias": "vector"}


# -- everything else ---------------------------------------------------------------------------------------------


def test_convolutions_and_their_norms() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    found = blocks(Lit(net, F.cross_entropy), (torch.randn(2, 3, 9, 9), torch.arange(2)))
    assert (found["net.0.weight"].role, str(found["net.0.weight"].layout)) == (Role.CONV, "flatten()")
    assert {found[f"net.{name}"].along for name in ("0.bias", "1.weight", "1.bias")} == {"conv"}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_linear_maps(kind: type[nn.LSTM] | type[nn.GRU]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.cells, self.head = nn.Embedding(11, 6), kind(6, 7), nn.Linear(7, 11)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.cells(self.embed(ids))[0])
            return out

    found = roles(Recurrent(), tokens(2, 5))
    assert {role for name, role in found.items() if name.startswith("cells.weight")} == {"linear"}
    assert (found["embed.weight"], found["head.weight"]) == ("embedding", "lm_head")


def test_no_name_is_read() -> None:
    """The same module with its names exchanged has the same roles in the same order."""

    class Named(nn.Module):
        def __init__(self, names: tuple[str, ...]) -> None:
            super().__init__()
            self.names = names
            parts = [nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)]
            for name, part in zip(names, parts, strict=True):
                self.add_module(name, part)

        def forward(self, x: Tensor) -> Tensor:
            gate, up, down = (getattr(self, name) for name in self.names)
            out: Tensor = x + down(F.silu(gate(x)) * up(x))
            return out

    plain = roles(Named(("gate", "up", "down")), torch.randn(2, 8))
    mixed = roles(Named(("lm_head", "router", "q_proj")), torch.randn(2, 8))
    assert list(plain.values()) == list(mixed.values()) == ["gate", "up", "down"]


def test_a_compiled_module_is_followed_as_it_is() -> None:
    module = Residual(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(8, 12), b=nn.Linear(12, 8))
    compiled = torch.compile(module, backend="eager")
    plain, found = roles(module, torch.randn(3, 8)), roles(compiled, torch.randn(3, 8))  # type: ignore[arg-type]
    assert {name.removeprefix("_orig_mod."): role for name, role in found.items()} == plain


def test_known_blocks_go_before_what_was_seen() -> None:
    module = Residual(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(8, 8, bias=False), b=nn.Linear(8, 8, bias=False))
    given = Block("*.weight", role=Role.LINEAR, layout=Layout.matrix())
    assert {block.role for block in infer(module, torch.randn(2, 8), known=[given]).blocks} == {Role.LINEAR}


def test_the_taxonomy_says_that_it_was_inferred_and_for_what() -> None:
    assert infer(nn.Linear(3, 2), torch.randn(1, 3)).name == "inferred for Linear"
    assert repr(BlockTaxonomy.infer(nn.Linear(3, 2), torch.randn(1, 3))).startswith("BlockTaxonomy(2 blocks")


def test_a_table_of_tokens_may_begin_with_a_prompt_looked_up_by_position() -> None:
    """As in CPM-Ant: `cat(arange, ids)` in one table."""

    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(14, 8), nn.Linear(8, 11)

        def forward(self, ids: Tensor) -> Tensor:
            prompt = torch.arange(3).expand(len(ids), 3)
            out: Tensor = self.head(self.embed(torch.cat([prompt, ids], 1)))[:, 3:]
            return out

    assert roles(Prompted(), tokens(2, 5))["embed.weight"] == "embedding"
