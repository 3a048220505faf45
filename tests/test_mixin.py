"""The mixin is a base class for anybody's LightningModule. Oracle: a real Trainer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_symopt import Block, BlockTaxonomy, Role, RoleConfig, ScheduleConfig, SymOpt, SymOptConfig, SymOptMixin
from lit_symopt.errors import TaxonomyError
from lit_symopt.table import block_rows, format_table, print_table


class Classifier(SymOptMixin, L.LightningModule):
    """Somebody's own module, with a frozen part."""

    symopt = SymOptConfig(lr=0.01, schedule=ScheduleConfig(kind="linear", warmup_steps=2, total_steps=6))

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        self.net[1].weight.requires_grad_(False)
        self.rates: list[float] = []

    def block_taxonomy(self) -> BlockTaxonomy:
        return BlockTaxonomy([Block("*.weight", role=Role.LINEAR), Block("*.bias", role=Role.VECTOR)])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        self.rates.append(optimizer.param_groups[0]["lr"])  # type: ignore[union-attr]
        return nn.functional.mse_loss(self.net.forward(batch), batch)


@contextmanager
def trainer(folder: Path, **options: Any) -> Iterator[L.Trainer]:
    yield L.Trainer(
        accelerator="cpu",
        max_steps=6,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def batches() -> DataLoader[Tensor]:
    return DataLoader(torch.randn(48, 8, generator=torch.Generator().manual_seed(0)), batch_size=8)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_a_trainer_fits_a_module_with_the_mixin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Classifier()
    frozen = module.get_parameter("net.1.weight").detach().clone()
    with trainer(tmp_path) as fitting:
        fitting.fit(module, batches())
    assert isinstance(fitting.optimizers[0], SymOpt)
    assert module.rates == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])
    assert torch.equal(module.get_parameter("net.1.weight"), frozen)
    printed = capsys.readouterr().out
    assert printed.count("parameter ") == 1
    assert "net.1.weight" in printed
    assert "frozen" in printed


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_gradient_accumulation_and_clipping_work_as_with_any_optimizer(tmp_path: Path) -> None:
    module = Classifier()
    with trainer(tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.5) as fitting:
        fitting.fit(module, batches())
    assert fitting.global_step == 6


def test_a_module_without_blocks_is_refused_with_the_way_out() -> None:
    class Bare(SymOptMixin, L.LightningModule):
        pass

    with pytest.raises(TaxonomyError, match=r"give the module a method block_taxonomy\(\)"):
        Bare().configure_optimizers()


def test_the_mixin_alone_is_refused() -> None:
    with pytest.raises(TypeError, match="SymOptMixin and LightningModule"):
        SymOptMixin().configure_optimizers()


def test_equal_layers_share_a_row_and_unequal_ones_do_not() -> None:
    module = Classifier()
    config = SymOptConfig(lr=0.01, roles={"vector": RoleConfig(lr=0.5)})
    optimizer = SymOpt.for_module(module, config=config)
    rows = {row[0]: row[1:] for row in block_rows(optimizer, module.block_taxonomy().frozen(module))}
    assert rows["net.{0..2}.weight (2)"][:2] == ("8×8", "linear")
    assert rows["net.{0..2}.bias (3)"][-1] == "0.5"
    assert rows["net.1.weight"][1] == "frozen"


def test_the_table_is_plain_in_a_log_and_rich_in_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = SymOpt.for_module(Classifier())
    print_table(optimizer)
    assert capsys.readouterr().out == format_table(optimizer) + "\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_table(optimizer)
    assert "┃" in capsys.readouterr().out
