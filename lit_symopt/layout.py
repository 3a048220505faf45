"""How a stored tensor holds the matrices of a block.

A layout is data about storage, not mathematics: it says which views of a parameter are the matrices that an update
acts on, and how to put the updated matrices back. Rows of a matrix are its *units* (what a row rule normalizes),
columns its *features*.

Shape legend:  R stored rows, C stored columns, H heads, h head dimension, E experts, I neurons, d features,
               m x n one matrix as a rule sees it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

from lit_symopt.errors import ConfigError, TaxonomyError

Stored = Literal["out_in", "in_out"]
Axis = Literal["rows", "columns"]
GateUpOrder = Literal["stacked", "interleaved"]
QKVOrder = Literal["stacked", "per_head", "per_group"]
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A batch of equal matrices inside a stored tensor.

    Attributes:
        batch: leading dimensions that count matrices (experts, heads, gate and up); `()` for a single matrix.
        m, n: rows (units) and columns (features) of each matrix as a rule sees it.
        fan_out, fan_in: outputs and inputs of each matrix as a linear map, for the scales `spectral` and `aspect`.
    """

    batch: Shape = ()
    m: int
    n: int
    fan_out: int
    fan_in: int

    @property
    def count(self) -> int:
        """Number of matrices in the batch."""
        return prod(self.batch)


@dataclass(frozen=True)
class Layout(ABC):
    """How a stored tensor holds its matrices; make one with the named constructors below.

    `to_matrices` returns views wherever torch can make one, and `from_matrices` is its exact inverse. `stored` says
    whether stored rows are outputs (`"out_in"`, torch's `Linear`) or inputs (`"in_out"`, GPT-2's `Conv1D`, gpt-oss
    experts). It decides the fans of the linear map; which units a row rule sees is a separate fact (`transposed`).

    Example:
        >>> import torch
        >>> weight = torch.arange(24.0).view(4, 6)
        >>> heads = Layout.heads(2, dim="columns")
        >>> [tuple(part.shape) for part in heads.to_matrices(weight)]
        [(2, 4, 3)]
        >>> torch.equal(heads.from_matrices(heads.to_matrices(weight), weight.shape), weight)
        True
    """

    stored: Stored = "out_in"

    def __post_init__(self) -> None:
        _choice("stored", self.stored, ("out_in", "in_out"))

    # -- the vocabulary ------------------------------------------------------------------------------------------

    @staticmethod
    def matrix(*, stored: Stored = "out_in") -> Layout:
        """The tensor `[R, C]` is one matrix; its rows are the units."""
        return _Matrix(stored)

    @staticmethod
    def transposed(*, stored: Stored = "out_in") -> Layout:
        """The tensor `[R, C]` is one matrix whose *columns* are the units (a down projection's neurons)."""
        return _Transposed(stored)

    @staticmethod
    def column() -> Layout:
        """A tensor of any shape as one column `[numel, 1]`: entries are units with one feature (biases, gains)."""
        return _Vector()

    @staticmethod
    def row() -> Layout:
        """A tensor of any shape as one row `[1, numel]`: a single unit, normalized as a whole."""
        return _Vector(as_row=True)

    @staticmethod
    def heads(n: int, *, dim: Axis = "rows", stored: Stored = "out_in") -> Layout:
        """`n` heads side by side along stored rows (`[H·h, d]` → `[H, h, d]`) or columns (`[d, H·h]` → `[H, d, h]`)."""
        return _Heads(stored, n, dim)

    @staticmethod
    def gate_up(order: GateUpOrder, *, pairs: bool = False, stored: Stored = "out_in") -> Layout:
        """Gate and up fused along the output dimension, `[2I, d]` (or `[d, 2I]` with `stored="in_out"`).

        Neurons are always rows. `pairs=False`: two matrices, `[2, I, d]`, gate first. `pairs=True`: one matrix
        `[I, 2d]` whose row j is the neuron `[gate_j, up_j]`.
        """
        return _GateUp(stored, order, pairs)

    @staticmethod
    def qkv(
        q: int, kv: int, head_dim: int, *, order: QKVOrder, whole: bool = False, stored: Stored = "out_in"
    ) -> Layout:
        """Queries, keys and values fused along the output dimension, one matrix a head: `[q + 2·kv, h, d]`.

        Args:
            q, kv: number of query heads and of key (and value) heads; kv divides q.
            head_dim: h.
            order: `"stacked"` all q, all k, all v; `"per_head"` q, k, v of head 0, then of head 1 (GPT-NeoX, needs
                q = kv); `"per_group"` the queries of a group, its key, its value (Falcon).
            whole: three matrices q, k, v with all their heads instead of one matrix a head.
            stored: `"in_out"` when the fused dimension is the columns.
        """
        return _QKV(stored, q, kv, head_dim, order, whole)

    @staticmethod
    def split(sizes: Sequence[int], *, dim: Axis = "rows", inner: Layout | Sequence[Layout] | None = None) -> Layout:
        """Pieces of the given sizes along stored rows or columns, each with its inner layout (default `matrix()`)."""
        chosen = _Matrix() if inner is None else inner
        inners = (chosen,) * len(sizes) if isinstance(chosen, Layout) else tuple(chosen)
        return _Split("out_in", tuple(sizes), dim, inners)

    @staticmethod
    def flatten(*, stored: Stored = "out_in") -> Layout:
        """A convolution `[out, in, k...]` as the matrix `[out, in·k...]`."""
        return _Flatten(stored)

    @staticmethod
    def experts(inner: Layout | None = None) -> Layout:
        """A stack `[E, ...]` of experts, each with the inner layout (default `matrix()`)."""
        inner = inner or _Matrix()
        return _Experts(inner.stored, inner)

    # -- what a layout does --------------------------------------------------------------------------------------

    @abstractmethod
    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """The matrices a tensor of this shape holds.

        Raises:
            TaxonomyError: if the layout does not fit the shape.
        """

    @abstractmethod
    def to_matrices(self, tensor: Tensor, *, batch_dims: int = 0) -> tuple[Tensor, ...]:
        """The matrices of `tensor`, `[*leading, *batch, m, n]` for each part, as views wherever torch can make one.

        Args:
            tensor: the stored tensor, or a stack of equal ones.
            batch_dims: number of leading dimensions of `tensor` that stack equal stored tensors.
        """

    @abstractmethod
    def from_matrices(self, matrices: Sequence[Tensor], shape: Sequence[int], *, batch_dims: int = 0) -> Tensor:
        """The exact inverse of `to_matrices`: a tensor `[*leading, *shape]` made of the given matrices."""

    def cells(self, shape: Sequence[int]) -> tuple[tuple[Layout, Shape], ...]:
        """The contiguous stretches of storage on which the layout acts alone: what can be updated apart from the rest.

        Put one after the other in the order given, row by row, the stretches are the tensor, each of the shape beside
        its layout. An expert of a stack, a head of rows or a stacked gate is such a cell; heads along columns or
        interleaved branches are not, and their tensor is one cell. The cells' parts, counted out, are the parts of
        the whole, but in the order of storage: every matrix of the first expert before those of the second.

        Raises:
            TaxonomyError: if the layout does not fit the shape.

        Example:
            >>> olmoe = Layout.experts(Layout.gate_up("stacked"))
            >>> [(str(layout), shape) for layout, shape in olmoe.cells((2, 6, 4))]
            [('matrix()', (3, 4)), ('matrix()', (3, 4)), ('matrix()', (3, 4)), ('matrix()', (3, 4))]
        """
        self.parts(shape)  # fits, or says why not
        return self._cells(tuple(shape))

    def _cells(self, shape: Shape) -> tuple[tuple[Layout, Shape], ...]:
        return ((self, shape),)

    def whole(self) -> Layout:
        """The same storage with heads merged: whole matrices, as Muon updates them."""
        return self

    def with_pairs(self, pairs: bool) -> Layout:
        """The same storage with gate and up as neuron pairs or as separate matrices, where it fuses the two."""
        return self

    def _misfit(self, shape: Sequence[int], why: str) -> TaxonomyError:
        return TaxonomyError(f"the layout {self} does not fit the shape {tuple(shape)}: {why}")

    def _two_dimensional(self, shape: Sequence[int]) -> tuple[int, int]:
        if len(shape) != 2:
            raise self._misfit(
                shape,
                f"it needs 2 dimensions, not {len(shape)} (for stacks Layout.experts(...), "
                f"for convolutions Layout.flatten(), for vectors Role.VECTOR)",
            )
        return shape[0], shape[1]

    def _part(self, rows: int, columns: int, *, batch: Shape = ()) -> Part:
        """A part whose matrices are seen as they are stored, `[rows, columns]`."""
        fan_out, fan_in = (rows, columns) if self.stored == "out_in" else (columns, rows)
        return Part(batch=batch, m=rows, n=columns, fan_out=fan_out, fan_in=fan_in)

    def _text(self, name: str, *arguments: str) -> str:
        stored = () if self.stored == "out_in" else ("stored='in_out'",)
        return f"{name}({', '.join(arguments + stored)})"


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not a layout option; known: {', '.join(map(repr, known))}")


@dataclass(frozen=True)
class _Matrix(Layout):
    def __str__(self) -> str:
        return self._text("matrix")

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        rows, columns = self._two_dimensional(shape)
        return (self._part(rows, columns),)

    def to_matrices(self, tensor: Tensor, *, batch_dims: int = 0) -> tuple[Tensor, ...]:
        return (tensor,)

    def from_matrices(self, matrices: Sequence[Tensor], shape: Sequence[int], *, batch_dims: int = 0) -> Tensor:
        return matrices[0]


@dataclass(frozen=True)
class _Transposed(Layout):
    def __str__(self) -> str:
        return self._text("transposed")

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        rows, columns = self._two_dimensional(shape)
        return (replace(self._part(rows, columns), m=columns, n=rows),)

    def to_matrices(self, tensor: Tensor, *, batch_dims: int = 0) -> tuple[Tensor, ...]:
        return (tensor.mT,)

    def from_matrices(self, matrices: Sequence[Tensor], shape: Sequence[int], *, batch_dims: int = 0) -> Tensor:
        return matrices[0].mT


@dataclass(frozen=True)
class _Vector(Layout):
    as_row: bool = False

    def __str__(self) -> str:
        return "row()" if self.as_row else "column()"

    def _matrix(self, shape: Sequence[int]) -> Shape:
        return (1, prod(shape)) if self.as_row else (prod(shape), 1)

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        m, n = self._matrix(shape)
        return (Part(m=m, n=n, fan_out=prod(shape), fan_in=1),)

    def to_matrices(self, tensor: Tensor, *, batch_dims: int = 0) -> tuple[Tensor, ...]:
        return (tensor.reshape(*tensor.shape[:batch_dims], *self._matrix(tensor.shape[batch_dims:])),)

    def from_matrices(self, matrices: Sequence[Tensor], shape: Sequence[int], *, batch_dims: int = 0) -> Tensor:
        return matrices[0].reshape(*matrices[0].shape[:batch_dims], *shape)


@dataclass(frozen=True)
class _Heads(Layout):
    n: int = 1
    dim: Axis = "rows"

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("dim", self.dim, ("rows", "columns"))
        if self.n < 1:
            raise ConfigError(f"Layout.heads(n={self.n}): the number of heads must be at least 1")

    def __str__(self) -> str:
        return self._text("heads", str(self.n), f"dim={self.dim!r}")

    def whole(self) -> Layout:
        return _Matrix(self.stored)

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        rows, columns = self._two_dimensional(shape)
        total = rows if self.dim == "rows" else columns
        if total % self.n:
            raise self._misfit(shape, f"its {total} {self.dim} are not divisible by {self.n} heads")
        if self.dim == "rows":
            rows //= self.n
        else:
            columns //= self.n
        return (self._part(rows, columns, batch=(self.n,)),)

    def _cells(self, shape: Shape) -> tuple[tuple[Layout, Shape], ...]:
        if self.dim == "columns":
            return super()._cells(shape)
        rows, columns = shape
        return ((_Matrix(self.stored), (rows // self.n, columns)),) * self.n

    def to_matrices(self, tensor: Tensor, *, batch_dims: int = 0) -> tuple[Tensor, ...]:
        if self.dim == "rows":
            return (torch.unflatten(tensor, -2, (self.n, tensor.shape[-2] // self.n)),)
        return (torch.unflatten(tensor, -1, (self.n, tensor.shape[-1] // self.n)).movedim(-2, -3),)

    def from_matrices(self, matrices: Sequence[Tensor], shape: Sequence[int], *, batch_dims: int = 0) -> Tensor:
        if self.dim == "rows":
            return matrices[0].flatten(-3, -2)
        return matrices[0].movedim(-3, -2).flatten(-2, -1)


@dataclass(frozen=True)
class _GateUp(Layout):
    order: GateUpOrder = "stacked"
    pairs: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("order", self.order, ("stacked", "interleaved"))

    def __str__(self) -> str:
        return self._text("gate_up", repr(self.order), *(("pairs=True",) if self.pairs else ()))

    def with_pairs(self, pairs: bool) -> Layout:
        return replace(self, pairs=pairs)

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        rows, columns = self._two_dimensional(shape)
        fused, features = (rows, columns) if self.stored == "out_in" else (columns, rows)
        if fused % 2:
            raise self._misfit(shape, f"{fused} outputs cannot be gate and up in equal parts")
        neurons = fused // 2
        # Each of gate and up is a map from the features to the neurons, whichever way its rows are seen.
        if self.pairs:
            return (Part(m=neurons, n=2 * features, fan_out=neurons, fan_in=features),)
        return (Part(batch=(2,), m=neurons, n=features, fan_out=neurons, fan_in=features),)

    def _cells(self, shape: Shape) -> tuple[tuple[Layout, Shape], ...]:
        if self.stored == "in_out" or self.order == "interleaved" or self.pairs:
            return super()._cells(shape)
        rows, columns = shape
        return ((_Matrix(), (rows // 2, columns)),) * 2

    def to_matrices(self, tensor: Tensor, *, batch_dims: int = 0) -> tuple[Tensor, ...]:
        rows = tensor if self.stored == "out_in" else tensor.mT
        neurons = rows.shape[-2] // 2
        if self.order == "stacked":
            branches = torch.unflatten(rows, -2, (2, neurons))
        else:
            branches = torch.unflatten(rows, -2, (neurons, 2)).movedim(-2, -3)
        return (branches.movedim(-3, -2).flatten(-2, -1) if self.pairs else branches,)

    def from_matrices(self, matrices: Sequence[Tensor], shape: Sequence[int], *, batch_dims: int = 0) -> Tensor:
        (matrix,) = matrices
        branches = torch.unflatten(matrix, -1, (2, matrix.shape[-1] // 2)).movedim(-2, -3) if self.pairs else matrix
        rows = branches.flatten(-3, -2) if self.order == "stacked" else branches.movedim(-3, -2).flatten(-3, -2)
        return rows if self.stored == "out_in" else rows.mT


@dataclass(frozen=True)
class _QKV(Layout):
    q: int = 1
    kv: int = 1
    head_dim: int = 1
    order: QKVOrder = "stacked"
    merged: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("order", self.order, ("stacked", "per_head", "per_group"))
        if min(self.q, self.kv, self.head_dim) < 1 or self.q % self.kv:
            raise ConfigError(f"Layout.{self}: kv must divide q, and all three numbers must be at least 1")
        if self.order == "per_head" and self.q != self.kv:
            raise ConfigError(f"Layout.{self}: order 'per_head' needs as many query as key heads; use 'per_group'")

    def __str__(self) -> str:
        arguments = [str(self.q), str(self.kv), str(self.head_dim), f"order={self.order!r}"]
        return self._text("qkv", *arguments, *(("whole=True",) if self.merged else ()))

    def whole(self) -> Layout:
        return replace(self, merged=True)

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        rows, columns = self._two_dimensional(shape)
        fused, features = (rows, columns) if self.stored == "out_in" else (columns, rows)
        total = self.q + 2 * self.kv
        if fused != total * self.head_dim:
            raise self._misfit(shape, f"the fused dimension is {fused}, not {total} heads x {self.head_dim}")

        def part(batch: Shape, outputs: int) -> Part:
            m, n = (outputs, features) if self.stored == "out_in" else (features, outputs)
            return Part(batch=batch, m=m, n=n, fan_out=outputs, fan_in=features)

        if not self.merged:
            return (part((total,), self.head_dim),)
        return tuple(part((), heads * self.head_dim) for heads in (self.q, self.kv, self.kv))

    def _cells(self, shape: Shape) -> tuple[tuple[Layout, Shape], ...]:
        # One key head means one group: its queries, its key and its value lie as if they were stacked.
        if self.stored == "in_out" or (self.merged and self.order != "stacked" and self.kv > 1):
            return super()._cells(shape)
        heads = (self.q, self.kv, self.kv) if self.merged else (1,) * (self.q + 2 * self.kv)
        return tuple((_Matrix(), (count * self.head_dim, shape[1])) for count in heads)

    def to_matrices(self, tensor: Tensor, *, batch_dims: int = 0) -> tuple[Tensor, ...]:
        rows = tensor if self.stored == "out_in" else tensor.mT
        heads = torch.unflatten(rows, -2, (self.q + 2 * self.kv, self.head_dim))
        parts = self._groups(heads) if self.merged else (heads,)
        return parts if self.stored == "out_in" else tuple(part.mT for part in parts)

    def from_matrices(self, matrices: Sequence[Tensor], shape: Sequence[int], *, batch_dims: int = 0) -> Tensor:
        parts = list(matrices) if self.stored == "out_in" else [matrix.mT for matrix in matrices]
        rows = self._ungroup(parts) if self.merged else parts[0].flatten(-3, -2)
        return rows if self.stored == "out_in" else rows.mT

    def _groups(self, heads: Tensor) -> tuple[Tensor, ...]:
        """`[..., q + 2·kv, h, d]` → q `[..., q·h, d]`, k and v `[..., kv·h, d]`."""
        if self.order == "stacked":
            return tuple(piece.flatten(-3, -2) for piece in torch.split(heads, [self.q, self.kv, self.kv], dim=-3))
        group = self.q // self.kv
        groups = torch.unflatten(heads, -3, (self.kv, group + 2))
        return tuple(piece.flatten(-4, -2) for piece in torch.split(groups, [group, 1, 1], dim=-3))

    def _ungroup(self, parts: list[Tensor]) -> Tensor:
        if self.order == "stacked":
            return torch.cat(parts, -2)
        group = self.q // self.kv
        sizes = (group, 1, 1)
        return torch.cat(
            [
                torch.unflatten(part, -2, (self.kv, size, self.head_dim))
                for part, size in zip(parts, sizes, strict=True)
            ],
            -3,
        ).flatten(-4, -2)


@dataclass(frozen=True)
class _Split(Layout):
    sizes: tuple[int, ...] = ()
    dim: Axis = "rows"
    inners: tuple[Layout, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("dim", self.dim, ("rows", "columns"))
        if len(self.sizes) != len(self.inners) or not self.sizes or min(self.sizes) < 1:
            raise ConfigError(f"Layout.{self}: needs one positive size for each of {len(self.inners)} inner layouts")

    def __str__(self) -> str:
        inner = ", ".join(map(str, self.inners))
        return f"split({self.sizes}, dim={self.dim!r}, inner=({inner}))"

    @property
    def _axis(self) -> int:
        return -2 if self.dim == "rows" else -1

    def whole(self) -> Layout:
        return replace(self, inners=tuple(inner.whole() for inner in self.inners))

    def with_pairs(self, pairs: bool) -> Layout:
        return replace(self, inners=tuple(inner.with_pairs(pairs) for inner in self.inners))

    def _shapes(self, shape: Sequence[int]) -> list[Shape]:
        rows, columns = self._two_dimensional(shape)
        return [(size, columns) if self.dim == "rows" else (rows, size) for size in self.sizes]

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        rows, columns = self._two_dimensional(shape)
        total = rows if self.dim == "rows" else columns
        if sum(self.sizes) != total:
            raise self._misfit(shape, f"the sizes add up to {sum(self.sizes)}, not to its {total} {self.dim}")
        inner = zip(self.inners, self._shapes(shape), strict=True)
        return tuple(part for layout, piece in inner for part in layout.parts(piece))

    def _cells(self, shape: Shape) -> tuple[tuple[Layout, Shape], ...]:
        if self.dim == "columns":
            return super()._cells(shape)
        inner = zip(self.inners, self._shapes(shape), strict=True)
        return tuple(cell for layout, piece in inner for cell in layout.cells(piece))

    def to_matrices(self, tensor: Tensor, *, batch_dims: int = 0) -> tuple[Tensor, ...]:
        pieces = zip(self.inners, torch.split(tensor, list(self.sizes), dim=self._axis), strict=True)
        return tuple(matrix for layout, piece in pieces for matrix in layout.to_matrices(piece, batch_dims=batch_dims))

    def from_matrices(self, matrices: Sequence[Tensor], shape: Sequence[int], *, batch_dims: int = 0) -> Tensor:
        remaining, pieces = list(matrices), []
        for layout, piece in zip(self.inners, self._shapes(shape), strict=True):
            count = len(layout.parts(piece))
            pieces.append(layout.from_matrices(remaining[:count], piece, batch_dims=batch_dims))
            remaining = remaining[count:]
        return torch.cat(pieces, self._axis)


@dataclass(frozen=True)
class _Flatten(Layout):
    def __str__(self) -> str:
        return self._text("flatten")

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        if len(shape) < 3:
            raise self._misfit(shape, "a convolution has at least 3 dimensions; use Layout.matrix()")
        rows, columns = shape[0], prod(shape[1:])
        return (self._part(rows, columns),)

    def to_matrices(self, tensor: Tensor, *, batch_dims: int = 0) -> tuple[Tensor, ...]:
        return (tensor.flatten(batch_dims + 1),)

    def from_matrices(self, matrices: Sequence[Tensor], shape: Sequence[int], *, batch_dims: int = 0) -> Tensor:
        return torch.unflatten(matrices[0], -1, tuple(shape[1:]))


@dataclass(frozen=True)
class _Experts(Layout):
    inner: Layout = _Matrix()

    def __str__(self) -> str:
        return f"experts({self.inner})"

    def whole(self) -> Layout:
        return replace(self, inner=self.inner.whole())

    def with_pairs(self, pairs: bool) -> Layout:
        return replace(self, inner=self.inner.with_pairs(pairs))

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        if len(shape) < 3:
            raise self._misfit(shape, "a stack of experts has at least 3 dimensions, [E, ...]")
        return tuple(replace(part, batch=(shape[0], *part.batch)) for part in self.inner.parts(shape[1:]))

    def _cells(self, shape: Shape) -> tuple[tuple[Layout, Shape], ...]:
        return self.inner.cells(shape[1:]) * shape[0]

    def to_matrices(self, tensor: Tensor, *, batch_dims: int = 0) -> tuple[Tensor, ...]:
        return self.inner.to_matrices(tensor, batch_dims=batch_dims + 1)

    def from_matrices(self, matrices: Sequence[Tensor], shape: Sequence[int], *, batch_dims: int = 0) -> Tensor:
        return self.inner.from_matrices(matrices, shape[1:], batch_dims=batch_dims + 1)
