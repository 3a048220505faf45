"""The mixin is a base class for anybody's LightningModule. Oracle: a real Trainer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lit_symopt import (
    AttachOptimizer,
    Block,
    BlockTaxonomy,
    Role,
    RoleConfig,
    ScheduleConfig,
    SymOpt,
    SymOptConfig,
    SymOptMixin,
)
from lit_symopt.errors import GradientError, TaxonomyError
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


# -- inference ---------------------------------------------------------------------------------------------------


class Bare(SymOptMixin, L.LightningModule):
    """A classifier with dropout that declares nothing, and remembers which batches it was trained on."""

    symopt = SymOptConfig(lr=0.01)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 5))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, classes = batch
        self.seen = [*self.seen, x.clone()]
        loss = nn.functional.cross_entropy(self(x), classes)
        self.log("loss", loss)
        return loss


class Declared(Bare):
    """The same with its blocks declared: what an undisturbed run is."""

    def block_taxonomy(self) -> BlockTaxonomy:
        return BlockTaxonomy(
            [
                Block("net.0.weight", role=Role.LINEAR),
                Block("net.0.bias", role=Role.VECTOR),
                Block("net.3.weight", role=Role.LM_HEAD),
                Block("net.3.bias", role=Role.VECTOR, shift_invariant=True),
            ]
        )


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Random augmentation from the global generator."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.arange(8.0) + index + 0.1 * torch.randn(8), torch.tensor(index % 5)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Goes on where it stopped: whoever takes a sample takes it from everybody."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            self.position += 1
            yield torch.arange(8.0) + self.position, torch.tensor(self.position % 5)


class Batches(Sequence[tuple[Tensor, Tensor]]):
    """A loader by hand, with batches by number."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        self.batches = [(torch.randn(4, 8, generator=generator), torch.arange(4)) for _ in range(6)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        return self.batches[index]


class Data(L.LightningDataModule):
    """Counts how often its loader was asked for."""

    asked = 0

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        self.asked += 1
        return DataLoader(Samples(), batch_size=4, shuffle=True)


def _stateful() -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]

    torch.manual_seed(5)  # it draws its own seed when it is made
    return StatefulDataLoader(Samples(), batch_size=4, shuffle=True)


LOADERS: dict[str, Any] = {
    "shuffled by the global generator": lambda: DataLoader(Samples(), batch_size=4, shuffle=True),
    "shuffled by a generator of its own": lambda: DataLoader(
        Samples(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "a stream that remembers where it is": lambda: DataLoader(Stream(), batch_size=4),
    "a data module": Data,
    "a sequence of batches": Batches,
}


def fitted(module: Bare, folder: Path, data: Any) -> Bare:
    torch.manual_seed(7)
    module.load_state_dict(Bare().state_dict())
    torch.manual_seed(8)
    with trainer(folder) as fitting:
        fitting.fit(module, data)
    return module


@pytest.mark.parametrize("name", LOADERS)
def test_a_run_with_inferred_blocks_is_bitwise_the_one_with_declared_blocks(name: str, tmp_path: Path) -> None:
    """So the example batch moved no loader and no random state, and the pass left no trace."""
    inferred = fitted(Bare(), tmp_path, LOADERS[name]())
    declared = fitted(Declared(), tmp_path, LOADERS[name]())
    assert len(inferred.seen) == len(declared.seen) == 6
    assert all(torch.equal(a, b) for a, b in zip(inferred.seen, declared.seen, strict=True))
    ours, theirs = inferred.state_dict(), declared.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 under torch 2.13
def test_a_stateful_loader_is_not_advanced(tmp_path: Path) -> None:
    pytest.importorskip("torchdata.stateful_dataloader")
    inferred, declared = fitted(Bare(), tmp_path, _stateful()), fitted(Declared(), tmp_path, _stateful())
    assert all(torch.equal(a, b) for a, b in zip(inferred.seen, declared.seen, strict=True))


def test_asking_a_data_module_for_its_loader_leaves_no_trace_in_it(tmp_path: Path) -> None:
    data = Data()
    fitted(Bare(), tmp_path, data)
    assert data.asked == 1


def test_the_table_says_that_its_blocks_were_inferred(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted(Bare(), tmp_path, Batches())
    printed = capsys.readouterr().out
    assert "The blocks are inferred for Bare, from one pass:" in printed
    assert "lm_head" in printed
    fitted(Declared(), tmp_path, Batches())
    assert "inferred" not in capsys.readouterr().out


def test_without_training_data_the_blocks_follow_from_example_input_array() -> None:
    module = Bare()
    module.example_input_array = torch.randn(2, 8)
    found = {block.name: str(block.role) for block in module.block_taxonomy().blocks}
    assert found == {"net.0.weight": "up", "net.0.bias": "vector", "net.3.weight": "down", "net.3.bias": "vector"}


def test_the_pass_is_run_once_and_again_when_other_parameters_are_trained() -> None:
    module = Bare()
    module.example_input_array = torch.randn(2, 8)
    first = module.block_taxonomy()
    assert module.block_taxonomy() is first
    module.net[0].bias.requires_grad_(False)
    assert [block.name for block in module.block_taxonomy().blocks] == ["net.0.weight", "net.3.weight", "net.3.bias"]


def test_without_anything_to_run_the_error_says_what_to_give() -> None:
    with pytest.raises(TaxonomyError, match=r"block_taxonomy\(\).*has no training data.*set example_input_array"):
        Bare().configure_optimizers()


def test_training_data_that_cannot_be_looked_at_are_refused_by_kind(tmp_path: Path) -> None:
    class Once:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            yield torch.randn(4, 8), torch.arange(4)

    with pytest.raises(TaxonomyError, match="the training data are a Once"):
        fitted(Bare(), tmp_path, Once())


@pytest.mark.parametrize(
    ("mark", "said"), [("device_mesh", "sharded"), ("ds_shape", "sharded"), ("meta", "on the meta")]
)
def test_blocks_are_not_inferred_from_parameters_that_are_elsewhere(mark: str, said: str) -> None:
    module = Bare()
    module.example_input_array = torch.randn(2, 8)
    if mark == "meta":
        module.to("meta")
    else:
        setattr(module.get_parameter("net.0.weight"), mark, (4, 8))  # as FSDP2 and DeepSpeed mark them
    with pytest.raises(TaxonomyError, match=rf"block_taxonomy\(\).*'net.0.weight' is {said}.* already.*small instance"):
        module.configure_optimizers()


# -- the callback that attaches ----------------------------------------------------------------------------------


def attaching(fitting: L.Trainer) -> int:
    callbacks: list[L.Callback] = fitting.callbacks  # type: ignore[attr-defined]
    return sum(isinstance(callback, AttachOptimizer) for callback in callbacks)


def test_the_mixin_brings_one_callback_that_attaches_however_often_it_is_fitted(tmp_path: Path) -> None:
    module = Classifier()
    with trainer(tmp_path) as fitting:
        assert attaching(fitting) == 0
        fitting.fit(module, batches())
        assert attaching(fitting) == 1
        fitting.fit(module, batches())
        assert attaching(fitting) == 1
    with trainer(tmp_path, callbacks=[AttachOptimizer()]) as fitting:
        fitting.fit(module, batches())
        assert attaching(fitting) == 1


def test_it_comes_after_the_callbacks_of_the_classes_that_the_mixin_is_put_before(tmp_path: Path) -> None:
    class Own(L.LightningModule):
        def configure_callbacks(self) -> Sequence[L.Callback] | L.Callback:
            return L.pytorch.callbacks.Timer()

    class Both(SymOptMixin, Own):
        pass

    kinds = [type(callback).__name__ for callback in Both().configure_callbacks()]
    assert kinds == ["Timer", "AttachOptimizer"]


def test_a_gradient_error_that_an_accelerator_reports_late_is_raised_when_training_ends(tmp_path: Path) -> None:
    class Poisoned(Classifier):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.trainer.global_step == 5:  # the last one: no later step could report it
                optimizer._finite.defer = True  # as on an accelerator
                self.get_parameter("net.0.weight").grad[0, 0] = float("nan")  # type: ignore[index]

    with trainer(tmp_path) as fitting, pytest.raises(GradientError, match=r"net\.0\.weight"):
        fitting.fit(Poisoned(), batches())
