"""Operation counts. Oracle: torch's own counter of the products of what really runs; it sees no decomposition."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_symopt.linalg.polar import Method, Precision, method_for, polar_by
from lit_symopt.profiling.operations import (
    Operations,
    compute_dtype,
    element_operations,
    polar_operations,
    rule_operations,
)
from lit_symopt.rules import RULES, get_rule
from lit_symopt.rules.rows import POLAR, RowShards

METHODS: tuple[Method, ...] = get_args(Method)
SHAPES = [(1, 7, 7), (3, 11, 5), (2, 4, 9), (1, 6, 1), (2, 200, 70), (1, 64, 130), (2, 90, 70)]


def counted(run: Any, *arguments: Any, **options: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run(*arguments, **options)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_products_of_a_polar_factor_are_those_that_torch_counts(method: Method, shape: tuple[int, ...]) -> None:
    count, m, n = shape
    expected = polar_operations(method, m=m, n=n, count=count)
    assert counted(polar_by, method, torch.randn(shape)) == expected.products


@pytest.mark.parametrize("method", ["eigh", "iteration"])
@pytest.mark.parametrize("here", [5, 2, 0])
def test_row_shards_multiply_their_own_rows_and_the_whole_root(method: Method, here: int) -> None:
    count, m, n = 3, 9, 4
    rows = RowShards(count=m, valid=None, all_reduce=lambda x, how: x)
    expected = polar_operations(method, m=m, n=n, count=count, rows=here)
    assert counted(polar_by, method, torch.randn(count, here, n), rows=rows) == expected.products


@pytest.mark.parametrize("rule", [name for name in RULES if name != "adamw"])
@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("centered", [False, True])
def test_the_products_of_a_rule_are_those_that_torch_counts(rule: str, precision: Any, centered: bool) -> None:
    count, m, n = 2, 9, 5
    options = {"rule": rule, "centered": centered, "scale": "none", "precision": precision}
    expected = rule_operations(options, m=m, n=n, count=count, dtype=torch.float32, device_type="cpu")
    done = counted(get_rule(rule).function, torch.randn(count, m, n), centered=centered, precision=precision)
    assert done == expected.products
    assert (expected.decompositions > 0) == (rule in POLAR and precision not in ("tf32", "bf16", "fp16"))
    assert expected.elementwise > 0 or rule in POLAR


@pytest.mark.parametrize("rule", sorted(POLAR))
@pytest.mark.parametrize(
    ("precision", "dtype", "device"),
    [
        ("auto", torch.float32, "cpu"),
        ("bf16", torch.float32, "cpu"),
        ("fp16", torch.float32, "cpu"),
        ("tf32", torch.float32, "cpu"),
        ("exact", torch.float32, "cpu"),
        ("auto", torch.float32, "cuda"),
        ("fp32", torch.float32, "cuda"),
        ("auto", torch.float64, "cuda"),
    ],
)
def test_the_dtype_of_a_polar_factor_is_that_of_its_products(
    rule: str, precision: Any, dtype: torch.dtype, device: str
) -> None:
    seen: set[torch.dtype] = set()

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
                seen.add(args[0].dtype)
            return func(*args, **(kwargs or {}))

    options = {"rule": rule, "precision": precision}
    said = compute_dtype(options, side=5, dtype=dtype, device_type=device)
    with Products():  # type: ignore[no-untyped-call]
        polar_by(method_for(precision, dtype=dtype, device_type=device, side=5), torch.randn(9, 5, dtype=dtype))
    assert seen == {said}


def test_row_rules_are_computed_in_the_dtype_their_precision_promises() -> None:
    def dtype(precision: str, of: torch.dtype) -> torch.dtype:
        return compute_dtype({"rule": "row_norm", "precision": precision}, side=1, dtype=of, device_type="cpu")

    assert dtype("auto", torch.float32) == dtype("bf16", torch.float32) == torch.float32
    assert dtype("fp32", torch.float32) == dtype("auto", torch.float64) == torch.float64


@pytest.mark.parametrize(
    ("rule", "scale", "plain", "centered"),
    [  # operations an entry: the scale 1, a projection 2, a row norm 3, an inner product 2
        ("sgd", "none", 1, 1 + 4),
        ("sign", "inverse_fan_in", 1 + 1, 1 + 1 + 4),
        ("spectral", "rms", 1, 1 + 4),
        ("spectral", "nuclear", 1 + 2, 1 + 2 + 4),
        ("row_norm", "rms", 1 + 3, 1 + 3 + 4),
        ("spectral_then_row", "none", 1 + 3, 1 + 3 + 4),
        ("row_then_spectral", "none", 1 + 3, 1 + 3 + 6),
        ("row_then_spectral", "row_nuclear", 1 + 3 + 2 + 3, 1 + 3 + 6 + 2 + 5),
        ("adamw", "none", 0, 2),
    ],
)
def test_what_is_done_element_by_element_adds_up_by_hand(rule: str, scale: str, plain: int, centered: int) -> None:
    for given, each in ((False, plain), (True, centered)):
        options = {"rule": rule, "centered": given, "scale": scale, "precision": "auto"}
        whole = rule_operations(options, m=9, n=5, count=2, dtype=torch.float32, device_type="cpu")
        here = rule_operations(options, m=9, n=5, count=2, rows=4, dtype=torch.float32, device_type="cpu")
        assert (whole.elementwise, here.elementwise) == (2 * 9 * 5 * each, 2 * 4 * 5 * each)


def test_momentum_decay_and_step_are_counted_for_every_element_and_all_of_adamw_at_once() -> None:
    def each(**options: object) -> int:
        return element_operations({"rule": "spectral", "momentum": 0.9, "momentum_kind": "ema", **options})

    assert (each(momentum=0.0), each(), each(momentum_kind="nesterov"), each(rule="adamw")) == (3, 6, 7, 14)


def test_operations_add_up() -> None:
    one, other = Operations(products=1, decompositions=2, elementwise=4), Operations(products=8, elementwise=16)
    assert one + other == Operations(products=9, decompositions=2, elementwise=20)
    assert (one + other).total == 31


def test_a_decomposition_is_counted_for_the_shorter_side_only() -> None:
    for method in METHODS:
        assert polar_operations(method, m=40, n=6) == polar_operations(method, m=6, n=40)
    assert polar_operations("eigh", m=40, n=6).decompositions == polar_operations("eigh", m=400, n=6).decompositions


def test_an_empty_matrix_takes_nothing() -> None:
    options = {"rule": "spectral", "centered": True, "scale": "nuclear", "precision": "auto"}
    assert rule_operations(options, m=0, n=5, dtype=torch.float32, device_type="cpu") == Operations()
