"""Layouts find the matrices of a stored tensor and put them back exactly. Oracle: slicing by hand."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_symopt import Layout
from lit_symopt.errors import ConfigError, TaxonomyError
from lit_symopt.layout import Axis, GateUpOrder, QKVOrder, Stored

# E experts, H heads, h head dimension, I neurons, d features
E, H, h, I, d = 3, 4, 2, 5, 6  # noqa: E741

CASES: dict[str, tuple[Layout, tuple[int, ...]]] = {
    "matrix": (Layout.matrix(), (7, d)),
    "matrix in_out": (Layout.matrix(stored="in_out"), (7, d)),
    "transposed": (Layout.transposed(), (d, I)),
    "column": (Layout.column(), (3, 4)),
    "row": (Layout.row(), (5,)),
    "heads rows": (Layout.heads(H), (H * h, d)),
    "heads columns": (Layout.heads(H, dim="columns"), (d, H * h)),
    "gate_up stacked": (Layout.gate_up("stacked"), (2 * I, d)),
    "gate_up interleaved": (Layout.gate_up("interleaved"), (2 * I, d)),
    "gate_up stacked pairs": (Layout.gate_up("stacked", pairs=True), (2 * I, d)),
    "gate_up interleaved pairs": (Layout.gate_up("interleaved", pairs=True), (2 * I, d)),
    "gate_up in_out": (Layout.gate_up("interleaved", stored="in_out"), (d, 2 * I)),
    "gate_up in_out pairs": (Layout.gate_up("interleaved", pairs=True, stored="in_out"), (d, 2 * I)),
    "gate_up in_out stacked": (Layout.gate_up("stacked", stored="in_out"), (d, 2 * I)),
    "qkv stacked": (Layout.qkv(4, 2, h, order="stacked"), (8 * h, d)),
    "qkv stacked whole": (Layout.qkv(4, 2, h, order="stacked", whole=True), (8 * h, d)),
    "qkv per_head": (Layout.qkv(4, 4, h, order="per_head"), (12 * h, d)),
    "qkv per_head whole": (Layout.qkv(4, 4, h, order="per_head").whole(), (12 * h, d)),
    "qkv per_group": (Layout.qkv(4, 2, h, order="per_group"), (8 * h, d)),
    "qkv per_group whole": (Layout.qkv(4, 2, h, order="per_group", whole=True), (8 * h, d)),
    "qkv in_out whole": (Layout.qkv(2, 2, h, order="stacked", whole=True, stored="in_out"), (d, 6 * h)),
    "qkv in_out": (Layout.qkv(2, 2, h, order="stacked", stored="in_out"), (d, 6 * h)),
    "split rows": (Layout.split([4, 3]), (7, d)),
    "split columns": (Layout.split([4, 2], dim="columns", inner=[Layout.heads(2), Layout.transposed()]), (8, 6)),
    "flatten": (Layout.flatten(), (4, 3, 2, 2)),
    "experts": (Layout.experts(), (E, 4, d)),
    "experts transposed": (Layout.experts(Layout.transposed()), (E, d, I)),
    "olmoe": (Layout.experts(Layout.gate_up("stacked")), (E, 2 * I, d)),
    "olmoe pairs": (Layout.experts(Layout.gate_up("stacked", pairs=True)), (E, 2 * I, d)),
    "gpt-oss": (Layout.experts(Layout.gate_up("interleaved", stored="in_out")), (E, d, 2 * I)),
    "gpt-oss pairs": (Layout.experts(Layout.gate_up("interleaved", pairs=True, stored="in_out")), (E, d, 2 * I)),
    "experts of convolutions": (Layout.experts(Layout.flatten()), (E, 4, 3, 2)),
}
# Merging dimensions that do not lie side by side in memory is a copy in torch; everything else must be a view.
COPIES = {
    "gate_up stacked pairs",
    "olmoe pairs",
    "gate_up in_out pairs",
    "gpt-oss pairs",
    "qkv per_head whole",
    "qkv per_group whole",
}


def numbered(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


@pytest.mark.parametrize("name", CASES)
def test_a_round_trip_is_exact(name: str) -> None:
    layout, shape = CASES[name]
    tensor = numbered(*shape)
    assert torch.equal(layout.from_matrices(layout.to_matrices(tensor), shape), tensor)


@pytest.mark.parametrize("name", CASES)
def test_a_stack_of_equal_tensors_is_laid_out_like_each_of_them(name: str) -> None:
    layout, shape = CASES[name]
    stack = numbered(2, *shape)
    together = layout.to_matrices(stack, batch_dims=1)
    for index in range(2):
        for matrix, alone in zip(together, layout.to_matrices(stack[index]), strict=True):
            assert torch.equal(matrix[index], alone)
    assert torch.equal(layout.from_matrices(together, shape, batch_dims=1), stack)


@pytest.mark.parametrize("name", CASES)
def test_parts_tell_the_shapes_of_the_matrices(name: str) -> None:
    layout, shape = CASES[name]
    parts, matrices = layout.parts(shape), layout.to_matrices(numbered(*shape))
    assert [(*part.batch, part.m, part.n) for part in parts] == [tuple(matrix.shape) for matrix in matrices]
    assert sum(part.count * part.m * part.n for part in parts) == torch.Size(shape).numel()


@pytest.mark.parametrize("name", CASES)
def test_matrices_are_views_wherever_torch_can_make_one(name: str) -> None:
    layout, shape = CASES[name]
    tensor = numbered(*shape)
    shared = all(
        matrix.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        for matrix in layout.to_matrices(tensor)
    )
    assert shared == (name not in COPIES)


def test_heads_are_rows_or_columns_side_by_side() -> None:
    tensor = numbered(H * h, d)
    (rows,) = Layout.heads(H).to_matrices(tensor)
    (columns,) = Layout.heads(H, dim="columns").to_matrices(tensor.T)
    for head in range(H):
        block = tensor[head * h : (head + 1) * h]
        assert torch.equal(rows[head], block)
        assert torch.equal(columns[head], block.T)


def test_gate_and_up_are_found_stacked_and_interleaved() -> None:
    gate, up = numbered(I, d), 100 + numbered(I, d)
    interleaved = torch.stack([gate, up], dim=1).view(2 * I, d)
    for fused, layout in (
        (torch.cat([gate, up]), Layout.gate_up("stacked")),
        (interleaved, Layout.gate_up("interleaved")),
        (interleaved.T, Layout.gate_up("interleaved", stored="in_out")),
    ):
        (branches,) = layout.to_matrices(fused)
        assert torch.equal(branches[0], gate)
        assert torch.equal(branches[1], up)
        (pairs,) = layout.with_pairs(True).to_matrices(fused)
        assert torch.equal(pairs, torch.cat([gate, up], dim=1))


@pytest.mark.parametrize("order", ["stacked", "per_head", "per_group"])
def test_fused_queries_keys_and_values_are_told_apart(order: str) -> None:
    q_heads, kv_heads = (4, 4) if order == "per_head" else (4, 2)
    q, k, v = numbered(q_heads, h, d), 100 + numbered(kv_heads, h, d), 200 + numbered(kv_heads, h, d)
    if order == "stacked":
        fused = torch.cat([q, k, v])
    else:
        group = q_heads // kv_heads
        fused = torch.cat(
            [torch.cat([q[g * group : (g + 1) * group], k[g, None], v[g, None]]) for g in range(kv_heads)]
        )
    layout = Layout.qkv(q_heads, kv_heads, h, order=order)  # type: ignore[arg-type]
    (heads,) = layout.to_matrices(fused.flatten(0, 1))
    assert torch.equal(heads, fused)
    for found, expected in zip(layout.whole().to_matrices(fused.flatten(0, 1)), (q, k, v), strict=True):
        assert torch.equal(found, expected.flatten(0, 1))


def test_fans_follow_the_storage_and_not_the_rows_a_rule_sees() -> None:
    def fans(layout: Layout, *shape: int) -> tuple[int, int]:
        (part,) = layout.parts(shape)
        return part.fan_out, part.fan_in

    assert fans(Layout.matrix(), 8, 2) == (8, 2)
    assert fans(Layout.matrix(stored="in_out"), 8, 2) == (2, 8)
    assert fans(Layout.transposed(), 8, 2) == (8, 2)
    assert fans(Layout.heads(4), 8, 6) == (2, 6)
    assert fans(Layout.heads(4, dim="columns"), 6, 8) == (6, 2)
    assert fans(Layout.experts(Layout.gate_up("stacked")), 3, 10, 4) == (5, 4)
    assert fans(Layout.experts(Layout.gate_up("interleaved", stored="in_out", pairs=True)), 3, 4, 10) == (5, 4)


@given(
    n=st.integers(1, 5), size=st.integers(0, 4), other=st.integers(0, 5), columns=st.booleans(), experts=st.booleans()
)
def test_any_number_of_heads_and_experts_goes_both_ways(
    n: int, size: int, other: int, columns: bool, experts: bool
) -> None:
    layout = Layout.heads(n, dim="columns" if columns else "rows")
    shape: tuple[int, ...] = (other, n * size) if columns else (n * size, other)
    if experts:
        layout, shape = Layout.experts(layout), (2, *shape)
    tensor = numbered(*shape)
    assert torch.equal(layout.from_matrices(layout.to_matrices(tensor), shape), tensor)


@pytest.mark.parametrize(
    ("layout", "shape", "says"),
    [
        (Layout.heads(4), (6, 8), "6 rows are not divisible by 4 heads"),
        (Layout.heads(3, dim="columns"), (6, 8), "8 columns are not divisible by 3 heads"),
        (Layout.gate_up("stacked"), (7, 8), "7 outputs"),
        (Layout.matrix(), (7,), "needs 2 dimensions, not 1"),
        (Layout.matrix(), (7, 2, 3), r"Layout.experts\(...\)"),
        (Layout.experts(), (7, 2), r"\[E, ...\]"),
        (Layout.flatten(), (7, 2), r"at least 3 dimensions"),
        (Layout.qkv(4, 2, 2, order="stacked"), (10, 3), "is 10, not 8 heads x 2"),
        (Layout.split([3, 3]), (7, 2), "add up to 6, not to its 7 rows"),
    ],
)
def test_a_layout_that_does_not_fit_says_why(layout: Layout, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(TaxonomyError, match=says):
        layout.parts(shape)


def test_options_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ConfigError, match="'stacked', 'interleaved'"):
        Layout.gate_up("mixed")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="kv must divide q"):
        Layout.qkv(3, 2, 4, order="stacked")
    with pytest.raises(ConfigError, match="per_group"):
        Layout.qkv(4, 2, 4, order="per_head")
    with pytest.raises(ConfigError, match="number of heads must be at least 1"):
        Layout.heads(0)
    with pytest.raises(ConfigError, match="'out_in', 'in_out'"):
        Layout.matrix(stored="rows")  # type: ignore[arg-type]


# ---- cells

Laid = tuple[Layout, tuple[int, ...]]
small = st.integers(1, 3)
STORED: tuple[Stored, ...] = ("out_in", "in_out")
AXES: tuple[Axis, ...] = ("rows", "columns")
BRANCHES: tuple[GateUpOrder, ...] = ("stacked", "interleaved")
ORDERS: tuple[QKVOrder, ...] = ("stacked", "per_head", "per_group")
stored = st.sampled_from(STORED)


@st.composite
def two_dimensional(draw: st.DrawFn) -> Laid:
    """A layout of a matrix or of fused matrices, and a shape that it fits."""
    kind, at = draw(st.sampled_from(["matrix", "transposed", "heads", "gate_up", "qkv"])), draw(stored)
    fused, features = draw(small), draw(small)
    if kind == "heads":
        count, dim = draw(small), draw(st.sampled_from(AXES))
        shape = (count * fused, features) if dim == "rows" else (features, count * fused)
        return Layout.heads(count, dim=dim, stored=at), shape
    if kind == "gate_up":
        layout = Layout.gate_up(draw(st.sampled_from(BRANCHES)), pairs=draw(st.booleans()), stored=at)
        fused *= 2
    elif kind == "qkv":
        order, kv = draw(st.sampled_from(ORDERS)), draw(small)
        q, head_dim = kv * (1 if order == "per_head" else draw(small)), fused
        layout = Layout.qkv(q, kv, head_dim, order=order, whole=draw(st.booleans()), stored=at)
        fused = (q + 2 * kv) * head_dim
    else:
        layout = Layout.matrix(stored=at) if kind == "matrix" else Layout.transposed(stored=at)
    return layout, ((fused, features) if at == "out_in" else (features, fused))


@st.composite
def split(draw: st.DrawFn) -> Laid:
    """Pieces along rows or columns; each is one matrix or anything that has as many columns or rows as the first."""
    first, shape = draw(two_dimensional())
    dim = draw(st.sampled_from(AXES))
    pieces, sizes = [first], [shape[0] if dim == "rows" else shape[1]]
    for _ in range(draw(st.integers(0, 2))):
        pieces.append(draw(st.sampled_from([first, Layout.matrix(), Layout.transposed(stored="in_out")])))
        sizes.append(sizes[0])
    shape = (sum(sizes), shape[1]) if dim == "rows" else (shape[0], sum(sizes))
    return Layout.split(sizes, dim=dim, inner=pieces), shape


@st.composite
def laid_out(draw: st.DrawFn) -> Laid:
    """Any layout with a shape that it fits, nested as deep as the constructors allow."""
    kind = draw(st.sampled_from(["plain", "split", "column", "row", "flatten"]))
    if kind == "plain":
        layout, shape = draw(two_dimensional())
    elif kind == "split":
        layout, shape = draw(split())
    elif kind == "flatten":
        layout, shape = Layout.flatten(stored=draw(stored)), (draw(small), draw(small), draw(small))
    else:
        layout = Layout.column() if kind == "column" else Layout.row()
        shape = tuple(draw(st.lists(small, min_size=2, max_size=3)))
    for _ in range(draw(st.integers(0, 2))):
        layout, shape = Layout.experts(layout), (draw(st.integers(0, 3)), *shape)
    return layout, shape


def counted(layout: Layout, shape: tuple[int, ...]) -> Counter[tuple[int, int, int, int]]:
    """How many matrices of each kind (m, n, fan_out, fan_in)."""
    kinds: Counter[tuple[int, int, int, int]] = Counter()
    for part in layout.parts(shape):
        kinds[part.m, part.n, part.fan_out, part.fan_in] += part.count
    return +kinds


def one_by_one(layout: Layout, tensor: Tensor) -> list[Tensor]:
    """Every matrix of a tensor, in the order of the layout."""
    return [m for batch in layout.to_matrices(tensor) for m in batch.reshape(-1, *batch.shape[-2:])]


def check_cells(layout: Layout, shape: tuple[int, ...]) -> None:
    cells, tensor = layout.cells(shape), numbered(*shape)
    sizes = [torch.Size(piece).numel() for _, piece in cells]
    assert sum(sizes) == tensor.numel()
    stretches = [stretch.view(piece) for (_, piece), stretch in zip(cells, tensor.flatten().split(sizes), strict=True)]
    kinds = sum((counted(cell, piece) for cell, piece in cells), Counter[tuple[int, int, int, int]]())
    assert kinds == counted(layout, shape)

    whole = one_by_one(layout, tensor)
    parts = [m for (cell, _), stretch in zip(cells, stretches, strict=True) for m in one_by_one(cell, stretch)]
    if len(layout.parts(shape)) > 1:  # a stack of several parts comes part by part, its cells expert by expert
        whole, parts = (sorted(matrices, key=lambda m: float(m.flatten()[0])) for matrices in (whole, parts))
    assert len(parts) == len(whole)
    for part, matrix in zip(parts, whole, strict=True):
        assert torch.equal(part, matrix)
    # A cell is one contiguous stretch because it cannot be cut further.
    assert all(cell.cells(piece) == ((cell, piece),) for cell, piece in cells)


@pytest.mark.parametrize("name", CASES)
def test_the_cells_of_every_known_storage_are_stretches_that_hold_its_matrices(name: str) -> None:
    check_cells(*CASES[name])


@settings(max_examples=400, deadline=None, derandomize=True)
@given(case=laid_out())
def test_the_cells_of_any_layout_are_stretches_that_hold_its_matrices(case: Laid) -> None:
    check_cells(*case)


CELLS = {
    "matrix": 1,
    "transposed": 1,
    "heads rows": H,
    "heads columns": 1,
    "gate_up stacked": 2,
    "gate_up interleaved": 1,
    "gate_up stacked pairs": 1,
    "gate_up in_out stacked": 1,
    "qkv stacked": 8,
    "qkv stacked whole": 3,
    "qkv per_group": 8,
    "qkv per_group whole": 1,
    "qkv in_out": 1,
    "split rows": 2,
    "split columns": 1,
    "flatten": 1,
    "column": 1,
    "olmoe": 2 * E,
    "olmoe pairs": E,
    "gpt-oss": E,
}


@pytest.mark.parametrize(("name", "count"), CELLS.items())
def test_what_lies_alone_in_storage_is_a_cell_of_its_own(name: str, count: int) -> None:
    layout, shape = CASES[name]
    assert len(layout.cells(shape)) == count


def test_a_single_group_of_heads_lies_as_if_stacked() -> None:
    layout = Layout.qkv(4, 1, h, order="per_group", whole=True)
    assert [shape for _, shape in layout.cells((6 * h, d))] == [(4 * h, d), (h, d), (h, d)]


def test_the_cells_of_a_layout_that_does_not_fit_say_why() -> None:
    with pytest.raises(TaxonomyError, match="6 rows are not divisible by 4 heads"):
        Layout.experts(Layout.heads(4)).cells((2, 6, 8))
