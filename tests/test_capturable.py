"""Steps that a CUDA graph can capture: the same as others, from rates on the device, and without a look at it.

On a CPU a recording of the operations of a step stands for the graph; on a GPU it is a graph (not yet run).
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_symopt import Block, BlockTaxonomy, Layout, Role, ScheduleConfig, SymOpt, SymOptConfig, SymOptMixin
from lit_symopt.errors import ConfigError, GradientError
from lit_symopt.finite import FiniteCheck, Refusal
from lit_symopt.rules.rows import POLAR
from lit_symopt.schedule import build_scheduler, factor
from lit_symopt.table import print_table
from lit_symopt.update import update
from tests.matrices import generator
from tests.sharding.processes import Ranks
from tests.synchronizations import Recording, synchronizations

STACKS: Any = ["symmetric", "muon", "polargrad", "ssd", "scion", "adamw"]

RULES: dict[str, dict[str, Any]] = {
    "spectral": {"rule": "spectral", "scale": "rms"},
    "nesterov": {"rule": "spectral", "momentum_kind": "nesterov", "scale": "spectral"},
    "nuclear": {"rule": "spectral", "scale": "nuclear", "radius": 0.5},
    "centered": {"rule": "left_spectral", "centered": True},
    "row_then_spectral": {"rule": "row_then_spectral", "scale": "row_nuclear", "centered": True, "row_damping": 0.1},
    "row_norm": {"rule": "row_norm", "scale": "rms"},
    "row_norm, damped": {"rule": "row_norm", "row_damping": 0.1, "momentum_kind": "nesterov"},
    "row_norm, centered": {"rule": "row_norm", "centered": True, "row_damping": 0.1},
    "row_norm, nuclear": {"rule": "row_norm", "scale": "nuclear"},
    "radius 0": {"rule": "sign", "radius": 0.0},
    "sgd": {"rule": "sgd", "momentum": 0.0},
    "adamw": {"rule": "adamw"},
    "centered adamw": {"rule": "adamw", "centered": True},
}


class Net(nn.Module):
    """Equal layers with biases and a stack of experts, between an embedding and a head."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.experts = nn.Parameter(torch.randn(4, 16, 8) / 4)
        self.head = nn.Linear(8, 12)
        self.to(dtype)

    def block_taxonomy(self) -> BlockTaxonomy:
        return BlockTaxonomy(
            [
                Block("embedding.weight", role=Role.EMBEDDING),
                Block("layers.*.weight", role=Role.LINEAR),
                Block("layers.*.bias", role=Role.VECTOR),
                Block("experts", role=Role.UP, layout=Layout.experts()),
                Block("head.weight", role=Role.LM_HEAD),
                Block("head.bias", role=Role.VECTOR, shift_invariant=True),
            ]
        )


def give_gradients(parameters: Any, seed: int) -> None:
    """New gradients, in the same memory if there is any."""
    source = generator(seed)
    for parameter in parameters:
        fresh = torch.randn(parameter.shape, generator=source).to(parameter.device, parameter.dtype)
        parameter.grad = fresh if parameter.grad is None else parameter.grad.copy_(fresh)


def held(optimizer: SymOpt) -> list[Tensor]:
    """Copies of weights and state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = [optimizer.state[parameter][key] for parameter in parameters for key in sorted(optimizer.state[parameter])]
    return [tensor.detach().clone() for tensor in (*parameters, *states)]


def of_stack(stack: Any, *, capturable: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Net, SymOpt]:
    net = Net(dtype)
    config = SymOptConfig(stack=stack, weight_decay=0.1, precision="bf16", capturable=capturable)
    optimizer = SymOpt.for_module(net, config=config)
    optimizer._finite = FiniteCheck(defer=True)
    return net, optimizer


def of_rule(rule: str, *, capturable: bool = True, dtype: torch.dtype = torch.float32, **options: Any) -> SymOpt:
    source = generator(0)
    shapes = [(6, 8), (6, 8), (12, 8)]
    parameters = [nn.Parameter(torch.randn(shape, generator=source).to(dtype)) for shape in shapes]
    options = {"weight_decay": 0.2, "precision": "bf16", **RULES[rule], **options}
    optimizer = SymOpt(parameters, lr=1e-2, capturable=capturable, **options)
    optimizer._finite = FiniteCheck(defer=True)
    return optimizer


def parameters_of(optimizer: SymOpt) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def assert_close(left: list[Tensor], right: list[Tensor]) -> None:
    """Equal but for the rounding of the rates to float32."""
    for one, other in zip(left, right, strict=True):
        size = max(0.1, float(one.abs().max()))  # what was added up to an entry may be larger than the entry
        torch.testing.assert_close(one, other, rtol=1e-6 if one.dtype == torch.float32 else 2**-7, atol=1e-6 * size)


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


# ---- the same steps


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stack_takes_the_same_steps_under_a_schedule(stack: Any, dtype: torch.dtype) -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_steps=2, total_steps=6)
    found = []
    for capturable in (True, False):
        net, optimizer = of_stack(stack, capturable=capturable, dtype=dtype)
        scheduler, rates = build_scheduler(optimizer, schedule), []
        for step in range(5):
            give_gradients(net.parameters(), step)
            optimizer.step()
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
            scheduler.step()
        found.append((held(optimizer), torch.tensor(rates)))
        assert all(isinstance(group["lr"], Tensor) == capturable for group in optimizer.param_groups)
    assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    torch.testing.assert_close(
        found[0][1][:, 0], found[0][1][1, 0] * torch.tensor([factor(step, schedule) for step in range(5)])
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masters", [True, False])
def test_a_rule_takes_the_same_steps(rule: str, dtype: torch.dtype, masters: bool) -> None:
    found = []
    for capturable in (True, False):
        optimizer = of_rule(rule, capturable=capturable, dtype=dtype, master_weights=masters)
        for step in range(4):
            give_gradients(parameters_of(optimizer), step)
            optimizer.step()
        found.append(held(optimizer))
    assert_close(*found)


@pytest.mark.parametrize("rule", ["spectral", "sgd", "adamw", "centered adamw"])
def test_tensors_with_gaps_take_the_same_steps(rule: str) -> None:
    found = []
    for capturable in (True, False):
        weights = [nn.Parameter(torch.randn(8, 6, generator=generator(seed)).t()) for seed in range(2)]
        optimizer = SymOpt(weights, weight_decay=0.1, precision="bf16", capturable=capturable, **RULES[rule])
        for step in range(3):
            give_gradients(weights, step)
            optimizer.step()
        found.append(held(optimizer))
    assert_close(*found)


def test_equal_blocks_of_groups_with_rates_of_their_own_are_one_batch() -> None:
    def batches(capturable: bool) -> tuple[int, list[Tensor]]:
        groups = [
            {"params": [nn.Parameter(torch.randn(6, 8, generator=generator(index)))], "lr": 10.0**-index}
            for index in range(3)
        ]
        optimizer = SymOpt(groups, weight_decay=0.1, rule="spectral", precision="bf16", capturable=capturable)
        give_gradients(parameters_of(optimizer), 0)
        optimizer.step()
        assert optimizer._prepared is not None
        return len(optimizer._prepared.buckets), held(optimizer)

    (count, found), (as_many, expected) = batches(True), batches(False)
    assert count == as_many == 1
    assert_close(found, expected)


def test_a_small_decay_is_not_lost_to_rounding() -> None:
    """1 − lr·wd in float32 would be 1 − 1.19e-7 here, and by a fifth too strong at every step."""
    weight = nn.Parameter(torch.linspace(1.0, 2.0, 4096))
    before = weight.detach().double()
    optimizer = SymOpt([weight], lr=1e-3, weight_decay=1e-4, rule="sgd", momentum=0.0, capturable=True)
    weight.grad = torch.zeros_like(weight)
    for _ in range(100):
        optimizer.step()
    lost = 1 - (weight.detach().double() / before).mean()
    assert float(lost) == pytest.approx(100 * 1e-7, rel=0.1)


# ---- as a graph has them


def as_if_captured(monkeypatch: pytest.MonkeyPatch, on: bool = True) -> None:
    """There is no capture on a CPU: the two modules that ask for one are told that there is."""
    for module in ("optim", "finite"):
        monkeypatch.setattr(f"lit_symopt.{module}.capturing", lambda: on)


def recorded(optimizer: SymOpt, monkeypatch: pytest.MonkeyPatch) -> Recording:
    """The operations of the next step, which is taken."""
    as_if_captured(monkeypatch)
    recording = Recording()
    with recording:
        optimizer.step()
    as_if_captured(monkeypatch, False)
    return recording


def change_rates(optimizer: SymOpt, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"].fill_(1e-2 / (1 + step))
        group["weight_decay"].fill_(0.1 * step)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operations_of_a_step_are_those_of_any_other(
    stack: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated with other gradients and rates they do what steps do, to the bit."""
    found = []
    for replayed in (True, False):
        net, optimizer = of_stack(stack, dtype=dtype)
        recording = None
        for step in range(7):
            give_gradients(net.parameters(), step)
            change_rates(optimizer, step)
            if replayed and step == 1:
                recording = recorded(optimizer, monkeypatch)
            elif recording is not None:
                recording.replay()
            else:
                optimizer.step()
        optimizer.check()
        found.append(held(optimizer))
    assert_same(*found)


@pytest.mark.parametrize("stack", STACKS)
def test_a_bad_gradient_of_a_replay_changes_nothing_and_waits_until_somebody_asks(
    stack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, optimizer = of_stack(stack)
    give_gradients(net.parameters(), 0)
    optimizer.step()
    recording = recorded(optimizer, monkeypatch)
    before = held(optimizer)
    assert net.experts.grad is not None
    net.experts.grad[1, 2, 3] = float("nan")
    recording.replay()
    assert_same(before, held(optimizer))
    give_gradients(net.parameters(), 1)
    recording.replay()
    assert not torch.equal(before[0], held(optimizer)[0])
    with pytest.raises(GradientError, match=r"1 parameter\(s\) is not finite: 'experts'"):
        optimizer.check()
    optimizer.check()  # once, not for ever
    recording.replay()
    optimizer.check()


def test_a_step_that_is_not_replayed_says_what_replays_have_met(monkeypatch: pytest.MonkeyPatch) -> None:
    net, optimizer = of_stack("muon")
    give_gradients(net.parameters(), 0)
    optimizer.step()
    recording = recorded(optimizer, monkeypatch)
    assert net.experts.grad is not None
    net.experts.grad.fill_(float("inf"))
    recording.replay()
    give_gradients(net.parameters(), 1)
    optimizer.step()  # which brings the flag to the host
    with pytest.raises(GradientError, match="'experts'"):
        optimizer.step()
    optimizer.step()


@pytest.mark.parametrize("stack", STACKS)
def test_a_refused_step_changes_nothing(stack: Any) -> None:
    net, optimizer = of_stack(stack)
    give_gradients(net.parameters(), 0)
    optimizer.step()
    before = held(optimizer)
    assert net.head.weight.grad is not None
    net.head.weight.grad[0, 0] = float("inf")
    optimizer.step()
    assert_same(before, held(optimizer))
    with pytest.raises(GradientError, match=r"head\.weight"):
        optimizer.step()


def test_on_a_cpu_a_bad_gradient_raises_at_once() -> None:
    optimizer = of_rule("spectral")
    optimizer._finite = FiniteCheck()
    give_gradients(parameters_of(optimizer), 0)
    gradient = parameters_of(optimizer)[1].grad
    assert gradient is not None
    gradient[0, 0] = float("nan")
    with pytest.raises(GradientError, match=r"group0\[1\]"):
        optimizer.step()


@pytest.mark.parametrize("rule", [rule for rule in RULES if RULES[rule]["rule"] not in POLAR])
def test_fused_writes_read_rates_where_they_are(rule: str) -> None:
    """Polar factors look at norms on a CPU, where that costs nothing; on the meta device it is seen that only there."""
    optimizer = of_rule(rule)
    give_gradients(parameters_of(optimizer), 0)
    optimizer.step()
    assert optimizer._prepared is not None
    refused = Refusal(torch.tensor(True)).on(torch.device("cpu"))
    for bucket in optimizer._prepared.buckets:
        assert synchronizations(lambda bucket=bucket: update(bucket, refused=refused)) == []  # type: ignore[misc]


def test_a_step_is_not_captured_with_rates_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = of_rule("spectral", capturable=False)
    give_gradients(parameters_of(optimizer), 0)
    optimizer.step()
    as_if_captured(monkeypatch)
    with pytest.raises(ConfigError, match=r"group 'group0': a CUDA graph captures .* capturable=True"):
        optimizer.step()


@pytest.mark.parametrize("change", ["nothing taken", "another rate", "another gradient"])
def test_a_step_is_not_captured_before_one_like_it_was_taken(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = of_rule("spectral")
    first, *others = parameters_of(optimizer)
    give_gradients([first, *others], 0)
    if change != "nothing taken":
        optimizer.step()
    if change == "another rate":
        optimizer.param_groups[0]["lr"] = 0.5
    if change == "another gradient":
        first.grad = None
    before = held(optimizer)
    as_if_captured(monkeypatch)
    with pytest.raises(ConfigError, match="before one like it was taken"):
        optimizer.step()
    as_if_captured(monkeypatch, False)
    assert_same(before, held(optimizer))
    optimizer.step()
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)


def test_what_is_captured_borrows_nothing_that_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = of_rule("spectral")
    give_gradients(parameters_of(optimizer), 0)
    optimizer.step()
    with monkeypatch.context() as patch:
        patch.setattr(optimizer._arena, "empty", None)
        recorded(optimizer, patch)
    optimizer.step()
    assert optimizer.kept_scratch(torch.device("cpu")) > 0


# ---- saved and loaded


def loaded_from_a_file(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    loaded: dict[str, Any] = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    return loaded


def test_a_saved_state_is_plain_and_loads_whether_capturable_or_not() -> None:
    net, optimizer = of_stack("symmetric")
    build_scheduler(optimizer, ScheduleConfig(warmup_steps=4))
    give_gradients(net.parameters(), 0)
    optimizer.step()
    saved = loaded_from_a_file(optimizer.state_dict())
    rates = [(group["lr"], group["weight_decay"], group["initial_lr"]) for group in saved["param_groups"]]
    assert {type(rate) for three in rates for rate in three} == {float}
    assert rates[0] == (0.00125, 0.1, 0.005)  # not 0.10000000149
    for capturable in (True, False):
        other_net, other = of_stack("symmetric", capturable=capturable)
        other_net.load_state_dict(net.state_dict())
        other.load_state_dict(loaded_from_a_file(optimizer.state_dict()))
        assert {group["capturable"] for group in other.param_groups} == {capturable}
        assert {isinstance(group["lr"], Tensor) for group in other.param_groups} == {capturable}
        back = other.state_dict()
        assert [(g["lr"], g["weight_decay"]) for g in back["param_groups"]] == [rate[:2] for rate in rates]
        assert_same(held(other), held(optimizer))
        for one, two in ((net, optimizer), (other_net, other)):
            give_gradients(one.parameters(), 1)
            two.step()
        assert_close(held(other), held(optimizer))
        net, optimizer = other_net, other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("when", [0, 3])
def test_replays_go_on_from_what_is_loaded(dtype: torch.dtype, when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates and state are filled in place; state that was saved before the first step is that of none."""
    net, optimizer = of_stack("symmetric", dtype=dtype)
    for step in range(when):
        give_gradients(net.parameters(), step)
        optimizer.step()
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    give_gradients(net.parameters(), when)
    optimizer.step()
    expected = held(optimizer)

    change_rates(optimizer, 5)
    recording = recorded(optimizer, monkeypatch)
    give_gradients(net.parameters(), 17)
    assert net.experts.grad is not None
    net.experts.grad.fill_(float("nan"))
    recording.replay()  # the flag of which belongs to what is left behind
    net.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    give_gradients(net.parameters(), when)
    recording.replay()
    optimizer.check()
    assert_same(held(optimizer), expected)
    net.experts.grad.fill_(float("nan"))
    recording.replay()
    with pytest.raises(GradientError, match="'experts'"):
        optimizer.check()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_have_rates_of_their_own_and_go_on_alike(copied: Callable[[Any], Any]) -> None:
    net, optimizer = of_stack("muon")
    give_gradients(net.parameters(), 0)
    optimizer.step()
    other_net, other = copied((net, optimizer))
    assert other.param_groups[0]["lr"] is not optimizer.param_groups[0]["lr"]
    for one, two in ((net, optimizer), (other_net, other)):
        give_gradients(one.parameters(), 1)
        two.step()
    assert_same(held(optimizer), held(other))


def test_a_tensor_that_is_given_as_rate_stays_the_one_that_is_read() -> None:
    rate = torch.tensor(0.0)
    weight = nn.Parameter(torch.eye(3))
    optimizer = SymOpt([weight], lr=rate, rule="spectral", capturable=True)  # type: ignore[arg-type]
    assert optimizer.param_groups[0]["lr"] is rate
    weight.grad = torch.eye(3)
    optimizer.step()
    assert torch.equal(weight, torch.eye(3))
    rate.fill_(0.5)
    optimizer.step()
    assert not torch.equal(weight, torch.eye(3))


# ---- what people see


def test_tables_and_explanations_show_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    _, optimizer = of_stack("muon")
    assert "W ← (1 − 0.02·0.1) W − 0.02" in optimizer.explain("layers.1.weight")
    print_table(optimizer)
    assert "0.02" in capsys.readouterr().out


class Linear(SymOptMixin, L.LightningModule):
    symopt = SymOptConfig(
        stack="muon", capturable=True, precision="bf16", schedule=ScheduleConfig(kind="linear", total_steps=4)
    )

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4, bias=False)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.net(batch).square().mean()  # type: ignore[no-any-return]

    def block_taxonomy(self) -> BlockTaxonomy:
        return BlockTaxonomy([Block("net.weight", role=Role.LINEAR)])


# What Lightning's monitor does with a rate that is a tensor, for all optimizers.
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
def test_a_trainer_drives_logs_and_saves_the_rates(tmp_path: Path) -> None:
    trainer = L.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        callbacks=[LearningRateMonitor()],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Linear(), DataLoader(torch.ones(6, 4), batch_size=2))  # type: ignore[arg-type]
    (file,) = tmp_path.rglob("metrics.csv")
    rates = [line.split(",") for line in file.read_text().splitlines()]
    column = next(index for index, name in enumerate(rates[0]) if name.startswith("lr-SymOpt"))
    assert [float(row[column]) for row in rates[1:] if row[column]] == pytest.approx([0.02, 0.015, 0.01])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == 0.005
    (base,) = saved["lr_schedulers"][0]["base_lrs"]
    assert isinstance(base, float)
    assert base == 0.02


# ---- what cannot be


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"precision": "exact"}, "a singular value decomposition, which waits .* choose precision 'bf16' or 'auto'"),
        ({"precision": "fp32"}, "12 × 8 matrices in precision 'fp32' .* an eigenvalue decomposition"),
        ({"dtype": torch.float64}, "torch.float64 take a singular value .* and float32 parameters"),
        ({"backend": "gram-newton-schulz"}, "backend 'gram-newton-schulz' cannot be captured"),
        ({"devices": ["cpu", "meta"]}, "on cpu and meta; make a group for each device"),
        ({"devices": ["meta"]}, "once these have memory"),
        ({"capturable": "yes"}, "capturable='yes' must be True or False"),
    ],
)
def test_what_cannot_be_captured_is_refused(
    options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_symopt.groups.require_backend", lambda *_: None)  # whether the package is installed
    dtype, devices = options.pop("dtype", torch.float32), options.pop("devices", ["cpu"])
    weights = [nn.Parameter(torch.zeros(12, 8, dtype=dtype, device=device)) for device in devices]
    with pytest.raises(ConfigError, match=f"group 'group0': capturable.*{says}|group 'group0': {says}"):
        SymOpt(weights, **{"rule": "spectral", "capturable": True, **options})


def test_precision_fp32_of_large_matrices_is_products_and_can_be_captured() -> None:
    weight = nn.Parameter(torch.zeros(257, 300))
    SymOpt([weight], rule="spectral", precision="fp32", capturable=True)
    SymOpt([nn.Parameter(torch.zeros(3, 3))], rule="adamw", precision="exact", capturable=True)


def test_a_config_reaches_every_group_and_a_config_that_cannot_be_is_refused() -> None:
    _, optimizer = of_stack("symmetric")
    assert {group["capturable"] for group in optimizer.param_groups} == {True}
    assert not any(group["capturable"] for group in SymOpt.for_module(Net()).param_groups)
    with pytest.raises(ConfigError, match="capturable=True: polar factors"):
        SymOpt.for_module(Net(), config=SymOptConfig(capturable=True, precision="exact"))


def attached() -> str:
    optimizer = SymOpt([nn.Parameter(torch.zeros(12, 8))], rule="spectral", capturable=True)
    try:
        optimizer.attach(torch.distributed.group.WORLD)
    except ConfigError as error:
        return str(error)
    return ""


def test_what_processes_exchange_is_not_captured() -> None:
    with Ranks(2) as ranks:
        for said in ranks(attached):
            assert "capturable=True: steps under DDP exchange updates" in said


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_replays_steps(stack: Any, dtype: torch.dtype) -> None:
    found = []
    for captured in (True, False):
        net = Net(dtype).cuda()
        config = SymOptConfig(stack=stack, weight_decay=0.1, capturable=True)
        optimizer = SymOpt.for_module(net, config=config)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in range(2):
                give_gradients(net.parameters(), step)
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            with torch.cuda.graph(graph):  # which takes no step
                optimizer.step()
        for step in range(2, 7):
            give_gradients(net.parameters(), step)
            change_rates(optimizer, step)
            if captured:
                graph.replay()
            else:
                optimizer.step()
        optimizer.check()
        found.append(held(optimizer))
        if captured:
            before = held(optimizer)
            assert net.experts.grad is not None
            net.experts.grad.fill_(float("nan"))
            graph.replay()
            assert_same(before, held(optimizer))
            with pytest.raises(GradientError, match="'experts'"):
                optimizer.check()
    assert_same(*found)
