"""`SymOpt` is an ordinary torch optimizer, and each group does what its rule says. Oracles: torch and equations."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_symopt import Block, BlockTaxonomy, Layout, Role, RoleConfig, SymOpt, SymOptConfig, polar
from lit_symopt.errors import CheckpointError, ConfigError, GradientError, TaxonomyError
from lit_symopt.finite import FiniteCheck


class Net(nn.Module):
    """Three equal layers with biases between an embedding and a head."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.head = nn.Linear(8, 12)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return self.head(hidden)  # type: ignore[no-any-return]

    def block_taxonomy(self) -> BlockTaxonomy:
        return BlockTaxonomy(
            [
                Block("embedding.weight", role=Role.EMBEDDING),
                Block("layers.*.weight", role=Role.LINEAR),
                Block("layers.*.bias", role=Role.VECTOR),
                Block("head.weight", role=Role.LM_HEAD),
                Block("head.bias", role=Role.VECTOR, shift_invariant=True),
            ]
        )


def train(net: Net, optimizer: torch.optim.Optimizer, steps: int = 5, first: int = 0) -> list[float]:
    """Losses of steps on batches that depend on the step number only."""
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 12, (16,), generator=generator)
        loss = nn.functional.cross_entropy(net(tokens).float(), (tokens * 5 + 1) % 12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(net: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


STACKS = ["symmetric", "muon", "polargrad", "ssd", "scion", "adamw"]


def test_adamw_groups_are_torch_adamw_exactly() -> None:
    ours, theirs = Net(), Net()
    optimizer = SymOpt(ours.parameters(), lr=1e-2, rule="adamw", betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    reference = torch.optim.AdamW(
        theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )
    train(ours, optimizer, 20), train(theirs, reference, 20)
    assert_same(weights(ours), weights(theirs))


def test_sgd_groups_are_torch_sgd() -> None:
    ours, theirs = Net(), Net()
    optimizer = SymOpt(ours.parameters(), lr=1e-2, rule="sgd", momentum=0.9, momentum_kind="nesterov")
    reference = torch.optim.SGD(theirs.parameters(), lr=1e-2, momentum=0.9, nesterov=True)
    train(ours, optimizer, 10), train(theirs, reference, 10)
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_step_is_its_defining_equation() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(6, 4), torch.randn(3, 6, 4)
    weight = nn.Parameter(start.clone())
    optimizer = SymOpt([weight], lr=0.1, rule="spectral", momentum=0.9, scale="aspect", weight_decay=0.5, radius=2.0)
    expected, momentum = start.clone(), torch.zeros(6, 4)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * 2.0 * (6 / 4) ** 0.5 * polar(momentum, precision="exact")
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stack", STACKS)
def test_batching_equal_blocks_changes_nothing(stack: Any) -> None:
    """One optimizer over all layers against one optimizer a parameter, which cannot batch."""
    together, alone = Net(), Net()
    config = SymOptConfig(stack=stack)
    optimizer = SymOpt.for_module(together, config=config)
    groups = SymOpt.for_module(alone, config=config).param_groups
    singles = [
        SymOpt([{**{k: v for k, v in group.items() if k != "param_names"}, "params": [parameter]}])
        for group in groups
        for parameter in group["params"]
    ]
    train(together, optimizer)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 12, (16,), generator=generator)
        alone.zero_grad()
        nn.functional.cross_entropy(alone(tokens), (tokens * 5 + 1) % 12).backward()
        for single in singles:
            single.step()
    for a, b in zip(weights(together), weights(alone), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_number_of_operations_does_not_grow_with_equal_layers() -> None:
    def operations(layers: int) -> int:
        net = Net(layers=layers)
        config = SymOptConfig(roles={"vector": RoleConfig(rule="sign", momentum=0.9)})  # torch's AdamW loops on CPU
        optimizer = SymOpt.for_module(net, config=config)
        train(net, optimizer, 2)
        with torch.profiler.profile() as profile:
            optimizer.step()
        # On CPU a foreach call runs one kernel a tensor inside; only the top-level calls are launches.
        return sum(1 for event in profile.events() if event.cpu_parent and "SymOpt.step" in event.cpu_parent.name)

    assert operations(16) == operations(4) > 0


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_state_dict_round_trip_is_bitwise(stack: Any, dtype: torch.dtype) -> None:
    net = Net(dtype)
    optimizer = SymOpt.for_module(net, config=SymOptConfig(stack=stack))
    train(net, optimizer)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Net(dtype, seed=1)
    resumed.load_state_dict(saved["net"])
    again = SymOpt.for_module(resumed, config=SymOptConfig(stack=stack))
    again.load_state_dict(saved["optimizer"])
    for old, new in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert {key: value.dtype for key, value in old.items()} == {key: value.dtype for key, value in new.items()}
    assert train(net, optimizer, first=5) == train(resumed, again, first=5)
    assert_same(weights(net), weights(resumed))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_deepcopy_and_pickle_go_on_alike(copied: Callable[[Any], Any]) -> None:
    net = Net(torch.bfloat16)
    optimizer = SymOpt.for_module(net)
    train(net, optimizer)
    twin, twin_optimizer = copied((net, optimizer))
    assert train(net, optimizer, first=5) == train(twin, twin_optimizer, first=5)
    assert_same(weights(net), weights(twin))


def test_the_same_seed_gives_the_same_weights_twice() -> None:
    runs = []
    for _ in range(2):
        net = Net()
        train(net, SymOpt.for_module(net), 10)
        runs.append(weights(net))
    assert_same(*runs)


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    weight = nn.Parameter(torch.eye(2))
    optimizer = SymOpt([weight], rule="spectral")

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert not torch.equal(weight.detach(), torch.eye(2))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_and_missing_gradients(set_to_none: bool) -> None:
    used, unused = nn.Parameter(torch.eye(2)), nn.Parameter(torch.eye(2))
    optimizer = SymOpt([used, unused], rule="row_norm")
    used.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(unused.detach(), torch.eye(2))
    assert unused not in optimizer.state
    optimizer.zero_grad(set_to_none=set_to_none)
    assert (used.grad is None) == set_to_none


def test_groups_can_be_added_and_lr_schedulers_drive_each() -> None:
    first, second = nn.Parameter(torch.eye(2)), nn.Parameter(torch.eye(2))
    optimizer = SymOpt([first], lr=1.0, rule="row_norm", momentum=0.0)
    optimizer.add_param_group({"params": [second], "rule": "spectral", "lr": 0.5, "name": "late"})
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=1)
    first.grad = second.grad = torch.eye(2)
    optimizer.step()
    scheduler.step()
    torch.testing.assert_close(first.detach(), 0.5 * torch.eye(2))
    torch.testing.assert_close(second.detach(), 0.75 * torch.eye(2))
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.5]


def test_gradient_clipping_does_not_move_a_scale_invariant_rule() -> None:
    nets = [Net(), Net()]
    for net, limit in zip(nets, (1e-3, 1e3), strict=True):
        optimizer = SymOpt.for_module(net, config=SymOptConfig(roles={"vector": RoleConfig(rule="sign", momentum=0.9)}))
        nn.functional.cross_entropy(net(torch.arange(12)), torch.arange(12)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), limit)
        optimizer.step()
    for a, b in zip(weights(nets[0]), weights(nets[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# -- half precision ------------------------------------------------------------------------------------------------


def test_no_update_of_a_bf16_parameter_is_lost_to_rounding() -> None:
    """lr·U is below half a unit in the last place of the weight: without a master nothing would ever move."""
    weight = nn.Parameter(torch.full((4, 4), 1.0, dtype=torch.bfloat16))
    optimizer = SymOpt([weight], lr=1e-4, rule="sign", momentum=0.0)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    torch.testing.assert_close(weight.float(), torch.full((4, 4), 0.99), rtol=2**-8, atol=0.0)
    assert optimizer.state[weight]["master"].dtype == torch.float32


def test_bf16_weights_are_the_rounded_masters_of_an_fp32_run() -> None:
    half, full = Net(torch.bfloat16), Net()
    full.load_state_dict(half.state_dict())
    optimizers = [SymOpt.for_module(net) for net in (half, full)]
    for step in range(5):
        torch.manual_seed(step)
        for a, b in zip(half.parameters(), full.parameters(), strict=True):
            b.grad = torch.randn_like(a).float()
            a.grad = b.grad.bfloat16()
            b.grad = a.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(half.parameters(), full.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16())
        assert torch.equal(optimizers[0].state[a]["master"], b)


def test_weights_loaded_after_a_step_win_over_the_master() -> None:
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = SymOpt([weight], lr=1e-3, rule="row_norm")
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with torch.no_grad():
        weight.copy_(torch.full((2, 2), 5.0))
    optimizer.step()
    assert weight.float().min() > 4.9


def test_without_masters_no_state_but_the_momentum_is_kept() -> None:
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = SymOpt([weight], lr=0.5, rule="row_norm", master_weights=False)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert list(optimizer.state[weight]) == ["momentum_buffer"]
    assert optimizer.state[weight]["momentum_buffer"].dtype == torch.float32
    torch.testing.assert_close(weight.float(), torch.full((2, 2), 1 - 0.5 / 2**0.5), rtol=2**-8, atol=0.0)


def test_state_is_one_number_an_element_for_symmetry_rules_and_two_for_adamw() -> None:
    for rule, numbers in (("spectral", 1), ("row_norm", 1), ("adamw", 2)):
        weight = nn.Parameter(torch.eye(4))
        optimizer = SymOpt([weight], rule=rule)
        weight.grad = torch.eye(4)
        optimizer.step()
        assert sum(value.numel() for value in optimizer.state[weight].values() if value.ndim) == numbers * 16


# -- gradients that must be refused --------------------------------------------------------------------------------


def poison(net: Net, value: float) -> None:
    gradient = net.get_parameter("layers.1.weight").grad
    assert gradient is not None
    gradient[2, 3] = value


def everything(net: Net, optimizer: SymOpt) -> list[Tensor]:
    state = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
    return weights(net) + state


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_changes_nothing_and_is_named(stack: Any, bad: float) -> None:
    net = Net()
    optimizer = SymOpt.for_module(net, config=SymOptConfig(stack=stack))
    train(net, optimizer)
    before = everything(net, optimizer)
    poison(net, bad)
    with pytest.raises(GradientError, match=r"1 parameter\(s\) is not finite: 'layers.1.weight'"):
        optimizer.step()
    assert_same(before, everything(net, optimizer))


@pytest.mark.parametrize("stack", STACKS)
def test_a_deferred_refusal_masks_every_write_and_raises_at_the_next_step(stack: Any) -> None:
    """What happens on an accelerator, run on CPU: the flag masks the writes, and the error comes one step late."""
    net = Net()
    optimizer = SymOpt.for_module(net, config=SymOptConfig(stack=stack))
    optimizer._finite = FiniteCheck(defer=True)
    train(net, optimizer)
    before = everything(net, optimizer)
    poison(net, float("nan"))
    optimizer.step()
    assert_same(before, everything(net, optimizer))
    with pytest.raises(GradientError, match=r"layers\.1\.weight"):
        optimizer.step()
    assert_same(before, everything(net, optimizer))
    optimizer.check()  # raised once, not for ever


def test_a_gradient_scaler_finds_the_overflow_before_the_optimizer_does() -> None:
    net = Net()
    optimizer = SymOpt.for_module(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for value in (1.0, float("inf")):
        before = weights(net)
        optimizer.zero_grad()
        scaler.scale(value * net(torch.arange(12)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))
        assert moved == (value == 1.0)
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_step_can_be_refused_as_well(dtype: torch.dtype) -> None:
    net = Net(dtype)
    optimizer = SymOpt.for_module(net)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    before = weights(net)
    with pytest.raises(GradientError, match=r"and 1 more|is not finite"):
        optimizer.step()
    assert_same(before, weights(net))
    assert not any(entry for entry in optimizer.state.values())


def test_huge_finite_gradients_are_not_mistaken_for_infinite_ones() -> None:
    weight = nn.Parameter(torch.eye(4))
    optimizer = SymOpt([weight], rule="spectral", momentum=0.0, lr=1.0)
    weight.grad = 1e38 * torch.eye(4)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.zeros(4, 4), rtol=0, atol=1e-5)


def test_sparse_gradients_are_refused_by_name() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = SymOpt([("table", embedding.weight)], rule="row_norm")
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(GradientError, match=r"'table' is sparse.*sparse=False"):
        optimizer.step()


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match="complex"):
        SymOpt([nn.Parameter(torch.eye(2, dtype=torch.complex64))], rule="spectral")


# -- configuration that must be refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "has no rule"),
        ({"rule": "shampoo"}, "shampoo.*spectral"),
        ({"rule": "spectral", "scale": "big"}, "'big'"),
        ({"rule": "row_norm", "scale": "aspect"}, "aspect.*row_norm"),
        ({"rule": "adamw", "scale": "rms"}, "rms.*adamw"),
        ({"rule": "spectral", "alpha": 1.0}, "alpha=1.0 belongs to scale 'nuclear'"),
        ({"rule": "spectral", "lr": -1.0}, r"lr=-1.0 must be a finite number of at least 0"),
        ({"rule": "spectral", "lr": float("nan")}, "lr=nan"),
        ({"rule": "spectral", "momentum": 1.0}, r"momentum=1.0 must be in \[0, 1\)"),
        ({"rule": "spectral", "momentum_kind": "heavy"}, "'ema', 'nesterov'"),
        ({"rule": "spectral", "precision": "fp8"}, "'fp8'"),
        ({"rule": "spectral", "row_damping": -0.1}, "row_damping=-0.1"),
        ({"rule": "spectral", "row_damping": 0.1}, "row_damping=0.1 has no meaning for the rule 'spectral'"),
        ({"rule": "spectral", "layout": "heads"}, "must be a Layout"),
        ({"rule": "spectral", "nesterov": True}, "unknown key.*'nesterov'; known: name, role"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SymOpt([nn.Parameter(torch.eye(2))], **options)


def test_matrix_rules_on_other_tensors_ask_what_they_hold() -> None:
    with pytest.raises(ConfigError, match=r"acts on matrices.*\(3,\) is none"):
        SymOpt([nn.Parameter(torch.ones(3))], rule="spectral")
    with pytest.raises(TaxonomyError, match="not divisible by 2 heads"):
        SymOpt([nn.Parameter(torch.ones(3, 3))], rule="spectral", layout=Layout.heads(2))


def test_flat_partitions_in_place_of_matrices_are_never_updated_as_vectors() -> None:
    """What DeepSpeed ZeRO does to a group: a flat slice of several parameters takes their place."""
    optimizer = SymOpt.for_module(Net())
    for group in optimizer.param_groups:
        flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in group["params"]]))
        flat.grad = torch.ones_like(flat)
        group["params"], group["param_names"] = [flat], group["param_names"][:1]
    with pytest.raises(ConfigError, match=r"'embedding'.*'embedding.weight'.*\(96,\).*attach\(engine\)"):
        optimizer.step()


def test_a_refused_group_is_not_half_added() -> None:
    optimizer = SymOpt([nn.Parameter(torch.eye(2))], rule="spectral")
    for bad in ({"rule": "unknown"}, {"name": "group0"}):
        with pytest.raises(ConfigError):
            optimizer.add_param_group({"params": [nn.Parameter(torch.eye(2))], **bad})
    assert len(optimizer.param_groups) == 1


def test_a_checkpoint_of_another_stack_or_model_is_refused_and_nothing_loaded() -> None:
    net = Net()
    optimizer = SymOpt.for_module(net)
    train(net, optimizer)
    before = everything(net, optimizer)
    for other, says in (
        (SymOpt.for_module(Net(), config=SymOptConfig(stack="polargrad")), r"linear: momentum_kind is 'ema' there"),
        (SymOpt.for_module(Net(layers=2)), r"only here \['layers.2.weight'\]"),
        (torch.optim.AdamW(Net().parameters()), r"its groups are \[None\], this optimizer's are \['embedding'"),
    ):
        with pytest.raises(CheckpointError, match=says):
            optimizer.load_state_dict(other.state_dict())
        assert_same(before, everything(net, optimizer))


def test_a_checkpoint_with_state_of_another_shape_is_refused() -> None:
    saved, optimizer = (SymOpt([("w", nn.Parameter(torch.eye(n)))], rule="spectral") for n in (3, 4))
    saved.param_groups[0]["params"][0].grad = torch.eye(3)
    saved.step()
    with pytest.raises(CheckpointError, match=r"'w': shape \(3, 3\) there and \(4, 4\) here"):
        optimizer.load_state_dict(saved.state_dict())


# -- degenerate matrices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["spectral", "right_spectral", "left_spectral", "row_norm", "row_then_spectral"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (1, 5), (5, 1)])
@pytest.mark.parametrize("centered", [False, True])
def test_degenerate_shapes_are_updated_without_fuss(rule: str, shape: tuple[int, int], centered: bool) -> None:
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = SymOpt([weight], lr=1.0, rule=rule, momentum=0.0, centered=centered)
    weight.grad = torch.ones(shape)
    optimizer.step()
    assert weight.isfinite().all()
    # Equal rows are a pure shift: centered, nothing is left; otherwise every entry of the one column direction moves.
    assert bool(weight.any()) == (weight.numel() > 0 and not centered)


@pytest.mark.parametrize("stack", STACKS)
def test_zero_gradients_move_nothing_but_the_decay(stack: Any) -> None:
    net = Net()
    optimizer = SymOpt.for_module(net, config=SymOptConfig(stack=stack, weight_decay=0.0))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = weights(net)
    optimizer.step()
    assert_same(before, weights(net))


def test_explain_says_what_a_parameter_gets_and_why() -> None:
    optimizer = SymOpt.for_module(Net(), lr=0.01)
    text = optimizer.explain("head.weight")
    for fragment in ("lm_head", "S_V × O(d)", "row_then_spectral", "12 × 8", "projected off", "arXiv:2605.18106"):
        assert fragment in text
    assert "polar(D(M) M) with row damping 0.1" in text
    assert "W ← (1 − 0.06·0.1) W − 0.06 · 0.693 (scale rms) · U" in text  # six times the base rate; 0.2·√12
    nuclear = SymOpt([("w", nn.Parameter(torch.eye(2)))], rule="spectral", scale="nuclear", alpha=0.5, radius=3.0)
    assert "− 0.001 · 3 · ⟨M, U⟩^0.5 · U" in nuclear.explain("w")
    assert "polar     eigenvalue decomposition of the Gram matrix in float64 (precision auto)" in nuclear.explain("w")
    nuclear.param_groups[0]["precision"] = "fp16"
    assert "polar     five steps in float16 (precision fp16)" in nuclear.explain("w")
    assert "polar" not in SymOpt([("w", nn.Parameter(torch.eye(2)))], rule="row_norm").explain("w")
    with pytest.raises(ConfigError, match=r"'head.wait'; the nearest are 'head.weight'"):
        optimizer.explain("head.wait")


def test_a_step_without_any_gradient_says_that_it_does_nothing() -> None:
    built_over_other_parameters = SymOpt([("w", nn.Parameter(torch.eye(3)))], rule="spectral")
    with pytest.warns(UserWarning, match=r"no parameter of the optimizer has a gradient.*after fully_shard"):
        built_over_other_parameters.step()
