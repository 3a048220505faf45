r"""A whole step of row_norm in plain torch: momentum, row norms, centering, decay and write, block of rows by block.

    M ← β M + (1−β) G,  V = M           or, nesterov,  M ← β M + G,  V = G + β M
    U = D(V) V,   D = diag(1 / (‖Vᵢ‖ + δ·rms_j ‖Vⱼ‖))          centered: U = Π D(ΠV) ΠV,  Π = I − 11ᵀ/m
    W ← (1 − lr·wd) W − lr·scale·U

The twin of `lit_symopt.linalg.kernels.row_rule`, for every device. What an operation has written of a block, the next
one finds in the cache; nothing but some blocks and one number a row is borrowed. How often main memory is read:

| | reads | writes |
|---|---|---|
| plain | G M, W: 3 | M, W: 2 |
| damped (δ > 0) | G M; M, W: 4 | 2 |
| centered | G M; M; M, W: 5 | 2 |
| centered and damped | G M; M; M; M, W: 6 | 2 |

Nesterov's reads G once more where it reads M alone. Rows of any size are right: where the squares of a row over- or
underflow, the row is first multiplied by a power of two. On a CPU the norms are looked at: where a few rows of a block
are such (embeddings have them, of tokens not seen for long), they are picked out; under damping they need nothing, if
δ·rms is not as small. Elsewhere, where a look would stop the host, and under a flag all rows are treated as if they
were such.

Sums over rows are taken in groups of `GROUP` rows and these in order, so that no result depends on the size of the
blocks or the number of threads (but torch lets all threads add up the squares of a row that is a block by itself, from
32,768 numbers on). A weight differs from that of the rule on a whole stack by at most 8 roundings of |W| + lr·scale a
step.

Source: the rule is `lit_symopt.rules.row_norm`, Lau and Su 2026, arXiv:2605.18106.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor

from lit_symopt.layout import Layout
from lit_symopt.rules.centering import ROUNDINGS
from lit_symopt.rules.scale import ADAMW_RMS
from lit_symopt.scratch import ALIGNED, FRESH, MIB, Scratch

# m rows of n features each, r of them in a block; V the direction, U the update

GROUP = 64
"""Rows that are added up first."""

BLOCK_BYTES = {"cpu": 2 * MIB}
"""Of one tensor in a block, on a CPU for each thread: about a second-level cache. Half of it takes a tenth longer,
because more operations are called; twice as much takes as long."""
ELSEWHERE = 32 * MIB
"""On an accelerator; bounds what is borrowed."""

SMALLEST = 1 << 18
"""Numbers in a parameter, at least, if there are several alike, and, if they are centered, in a matrix: smaller ones
are faster as one batch."""

SMALL = {torch.float32: 1e-16, torch.float64: 1e-140}
"""Row norms above it have all digits: the squares of entries that underflow, each wrong by at most 2⁻¹⁵⁰ (float64:
2⁻¹⁰⁷⁵), come to 10⁻¹³ n of the square of the norm. A norm that is too large is infinite."""
UNIT = {torch.float32: 2.0**100, torch.float64: 2.0**600}
"""What smaller rows are multiplied by, and infinite ones divided: then no square of either over- or underflows."""

LONG = 400
"""Numbers in a row from which on torch leaves products with it, of matrices on a CPU, to MKL."""

FEW = 8
"""One row in so many, at the most, is picked out of a block; where there are more, all its rows are treated alike."""

SCALES = ("none", "rms", "row_rms")
ROOT = {"rms": ADAMW_RMS, "row_rms": 1.0}


def takes(options: Mapping[str, Any], layout: Layout, *written: Tensor, count: int = 1) -> bool:
    """Whether `row_step` can take the step of a parameter; all others go the general way.

    Args:
        options: of the group.
        layout: of the parameter; every matrix of it must be a contiguous view.
        written: the weight, and the momentum and the parameter beside a master if there are.
        count: parameters in the bucket.
    """
    weight = written[0]
    if options["rule"] != "row_norm" or options["scale"] not in SCALES or weight.dtype not in SMALL:
        return False
    if weight.dtype == torch.float32 and options["precision"] in ("exact", "fp32"):
        return False  # which promise float64 within
    if options["eps"] > 1 or not weight.numel():
        return False
    if (count > 1 and weight.numel() < SMALLEST) or not all(one.is_contiguous() for one in written):
        return False
    if any(one.dtype in SMALL and one.dtype != weight.dtype for one in written):
        return False  # momentum of a model that was moved to another dtype
    if options["centered"] and any(
        part.count > 1 and part.m * part.n < SMALLEST for part in layout.parts(weight.shape)
    ):
        return False  # matrices are centered one by one
    like = torch.empty(weight.shape, device="meta")
    parts = layout.to_matrices(like)
    return all(part is like or (part._base is like and part.is_contiguous()) for part in parts)


def analytic(scale: str, n: int) -> float:
    """The factor of U for rows of n features.

    >>> analytic("row_rms", 16)
    4.0
    """
    return ROOT[scale] * sqrt(n) if scale in ROOT else 1.0


def scratch_bytes(weight: Tensor, *, centered: bool = False) -> int:
    """What `row_step` borrows at the most for matrices like `weight` [..., m, n]."""
    n = weight.shape[-1]
    rows = weight.numel() // n
    block = min(rows, _block_rows(n, weight)) * n * weight.element_size()
    sums = -(-weight.shape[-2] // GROUP) * n * weight.element_size() if centered else 0
    return 7 * block + 32 * rows + sums + 12 * ALIGNED


@torch.no_grad()
def row_step(
    weight: Tensor,
    gradient: Tensor,
    momentum: Tensor | None = None,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    beta: float = 0.0,
    nesterov: bool = False,
    scale: float = 1.0,
    row_damping: float = 0.0,
    centered: bool = False,
    admitted: Tensor | None = None,
    parameter: Tensor | None = None,
    scratch: Scratch = FRESH,
) -> None:
    """A step of row_norm on each matrix of `weight` [..., m, n], rows being units; writes weight and momentum.

    Entries above 10³⁶ (float64: 10³⁰⁶) may overflow; all others, denormal ones too, give what their directions say.

    Args:
        weight: float32 or float64, contiguous, as are momentum and parameter.
        gradient: of the shape of `weight`; any floating dtype; one that is not contiguous is copied as a whole.
        momentum: as `weight`, or `None` for none: then V = G.
        lr: learning rate; a tensor of one number, on the device or the host, is not waited for.
        weight_decay: decoupled; likewise.
        beta: of the momentum.
        nesterov: which momentum, see the module.
        scale: an analytic one, see `analytic`, times the radius.
        row_damping, centered: as of `lit_symopt.rules.row_norm`.
        admitted: a boolean on the device that masks every write; `None` for yes.
        parameter: in half precision, gets the new `weight` rounded.
        scratch: what the step borrows, see `scratch_bytes`; call it inside `lend`.
    """
    if not weight.numel():
        return
    m, n = weight.shape[-2:]
    if isinstance(lr, Tensor):
        lr = lr.double()
    if isinstance(weight_decay, Tensor):
        weight_decay = weight_decay.double()
    shape = (weight.numel() // n, n)
    flat = [
        weight.view(shape),
        gradient.contiguous().view(shape),
        None if momentum is None else momentum.view(shape),
        None if parameter is None else parameter.view(shape),
    ]
    matrices: Iterator[list[Tensor | None]] = (
        iter([flat])  # only what is taken over the rows of a matrix asks where it begins
        if not centered
        else ([None if one is None else one[at : at + m] for one in flat] for at in range(0, shape[0], m))
    )
    for tensors in matrices:
        written, given, kept, half = tensors
        assert written is not None
        assert given is not None
        with scratch.lend():
            step = _Step(
                weight=written,
                gradient=given,
                momentum=kept,
                parameter=half,
                m=m,
                rate=lr * scale,
                keep=1.0 - lr * weight_decay,
                beta=beta,
                nesterov=nesterov and kept is not None,
                damping=row_damping,
                admitted=admitted,
                rows=_block_rows(n, weight),
                scratch=scratch,
                buffers={},
            )
            if centered:
                step.centered()
            elif row_damping:
                step.damped()
            else:
                step.plain()


def _block_rows(n: int, weight: Tensor) -> int:
    """Rows of a block: a multiple of `GROUP`."""
    each = BLOCK_BYTES.get(weight.device.type)
    size = ELSEWHERE if each is None else each * torch.get_num_threads()
    return max(1, size // (n * weight.element_size() * GROUP)) * GROUP


@dataclass(frozen=True, kw_only=True)
class _Step:
    """The passes over rows [r, n] of one or, if not centered, of several matrices."""

    weight: Tensor
    gradient: Tensor
    momentum: Tensor | None
    parameter: Tensor | None
    m: int
    rate: float | Tensor
    keep: float | Tensor
    beta: float
    nesterov: bool
    damping: float
    admitted: Tensor | None
    rows: int
    scratch: Scratch
    buffers: dict[str, Tensor]

    # -- the three steps ---------------------------------------------------------------------------------------------

    def plain(self) -> None:
        """Block by block."""
        norms = self._column()
        for block in self._blocks():
            v = self._direction(block, update=True)
            factor = torch.linalg.vector_norm(v, dim=-1, keepdim=True, out=norms[block])
            extreme = self._extreme(factor) if self.looks else None
            if not self.looks or (extreme is not None and len(extreme) * FEW > len(v)):
                x, _ = self._scaled_and_measured(v, factor)
                self._write(block, x, factor.clamp_(min=self._tiny).reciprocal_())
            elif extreme is not None:
                self._write_both(block, v, factor, extreme)
            else:
                self._write(block, v, factor.reciprocal_())

    def damped(self) -> None:
        """All norms, then all weights."""
        norms, factors, blocks = self._column(), self._column(), self._blocks()
        sizes, units = self._column(torch.float64), dict[int, Tensor]()
        for block in blocks:
            v = self._direction(block, update=True)
            torch.linalg.vector_norm(v, dim=-1, keepdim=True, out=norms[block])
            if not self.looks:
                _, units[block.start] = self._scaled_and_measured(v, norms[block])
        if not (self.looks and self._is_certain(self._damp(sizes.copy_(norms), sizes))):
            for block in blocks:
                if self.looks:
                    v = self._direction(block, update=False)
                    _, units[block.start] = self._scaled_and_measured(v, norms[block])
                sizes[block] = norms[block].double() / units[block.start]
            self._damp(sizes, sizes)
            for block in blocks:
                sizes[block] *= units[block.start]
            sizes.clamp_(min=self._tiny)
        factors.copy_(sizes.reciprocal_())
        if not units and self._write_by_products(factors):
            return
        # From the end: what was written last is still in the cache.
        for block in reversed(blocks):
            v = self._direction(block, update=False)
            self._write(block, self._scaled(v, units.get(block.start)), factors[block])

    def centered(self) -> None:
        """The mean of V, then the norms of ΠV, then the mean of D ΠV, then all weights."""
        norms, factors, sizes = self._column(), self._column(), self._column(torch.float64)
        damped = self._column(torch.float64) if self.damping else sizes
        blocks, units, totals = self._blocks(), dict[int, "Tensor | None"](), self._totals()
        # The sums are those of V less a row near the mean, which leaves no shift to lose digits to.
        near = self._near_the_mean()
        for block in blocks:
            v = self._direction(block, update=True)
            self._add_up(torch.sub(v, near, out=self._buffer("x", len(v))), totals, block)
        mean = near.double() + _in_order(totals) / self.m
        high = mean.to(near.dtype)
        shift = high, (mean - high).to(near.dtype)
        peak = mean.abs().max()
        peak = torch.where(peak > 0, peak, 1)
        # A row of V that is the mean but for rounding is as long as the mean.
        noise = 2 * ROUNDINGS * torch.finfo(near.dtype).eps * torch.linalg.vector_norm(mean / peak) * peak
        if self.damping:
            for block in blocks:
                self._measure_centered(block, shift, noise, norms, sizes, units)
            self._damp(sizes, damped)
        for block in blocks:
            if self.damping:
                x = self._scaled(self._minus(block, shift), units[block.start])
            else:
                x = self._measure_centered(block, shift, noise, norms, sizes, units)
            unit = units[block.start]
            whole = damped[block] if unit is None else damped[block] * unit
            # A row that is nothing but rounding gets no factor.
            factors[block] = torch.where(sizes[block] > 0, whole.clamp(min=self._tiny).reciprocal(), 0)
            self._add_up(torch.mul(x, factors[block], out=self._buffer("u", len(x))), totals, block)
        back = (_in_order(totals) * (self.rate / self.m)).to(near.dtype)
        for block in reversed(blocks):
            x = self._scaled(self._minus(block, shift), units[block.start])
            self._write(block, x, factors[block], back=back)

    # -- their parts -------------------------------------------------------------------------------------------------

    def _direction(self, block: slice, *, update: bool) -> Tensor:
        """V of a block, to be read only; with `update` the momentum is written."""
        g = self.gradient[block]
        if g.dtype != self.weight.dtype:
            g = self._buffer("gradient", len(g)).copy_(g)
        if self.momentum is None:
            return g
        buffer = self.momentum[block]
        if update:
            out = self._out(buffer)
            if self.nesterov:
                torch.add(g, buffer, alpha=self.beta, out=out)
            else:
                torch.lerp(buffer, g, 1 - self.beta, out=out)
            self._admit(buffer, out)
        if not self.nesterov:
            return buffer
        return torch.add(g, buffer, alpha=self.beta, out=self._buffer("v", len(g)))

    @property
    def looks(self) -> bool:
        """Whether norms may be looked at."""
        return self.admitted is None and self.weight.device.type == "cpu"

    def _measure(self, v: Tensor, norms: Tensor) -> tuple[Tensor, Tensor | None]:
        """`v` and its row norms; times a power of two a row, returned too, where squares need it."""
        torch.linalg.vector_norm(v, dim=-1, keepdim=True, out=norms)
        if self.looks and self._extreme(norms) is None:
            return v, None
        return self._scaled_and_measured(v, norms)

    def _extreme(self, norms: Tensor) -> Tensor | None:
        """Which rows need a power of two."""
        least, most = torch.aminmax(norms)
        if float(least) > SMALL[norms.dtype] and float(most) < inf:
            return None
        return ((norms <= SMALL[norms.dtype]) | (norms == inf)).view(-1).nonzero().view(-1)

    def _scaled_and_measured(self, v: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """`v` times a power of two for each row, which is returned too; its `norms` are replaced by those of that."""
        unit = torch.where(norms > SMALL[v.dtype], torch.ones_like(norms), UNIT[v.dtype])
        unit.masked_fill_(norms == inf, 1 / UNIT[v.dtype])
        x = self._scaled(v, unit)
        torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=norms)
        return x, unit

    def _scaled(self, v: Tensor, unit: Tensor | None) -> Tensor:
        return v if unit is None else torch.mul(v, unit, out=self._buffer("scaled", len(v)))

    def _write(self, block: slice, x: Tensor, factor: Tensor, *, back: Tensor | None = None) -> None:
        """`W ← keep·W − rate·factor·x`, and `+ back`."""
        target = self.weight[block]
        out = self._moved(target, x, factor, back=back, out=self._out(target))
        self._admit(target, out)
        if self.parameter is not None:
            self._admit(self.parameter[block], out)

    def _write_by_products(self, factors: Tensor) -> bool:
        """`W ← keep·W − rate·factor·M` in one pass, as a product 1 x 1 by 1 x n for each row, where MKL computes it.

        Both operands come from main memory, so blocks would bring nothing; a fifth faster than two operations a block.
        """
        rate, keep, v = self.rate, self.keep, self.momentum
        if v is None or self.nesterov or isinstance(rate, Tensor) or isinstance(keep, Tensor):
            return False
        if self.weight.shape[-1] < LONG or not torch.backends.mkl.is_available():
            return False
        w, v, f = (one.unsqueeze(1) for one in (self.weight, v, factors))
        w.baddbmm_(f, v, beta=keep, alpha=-rate)
        if self.parameter is not None:
            self.parameter.copy_(self.weight)
        return True

    def _write_both(self, block: slice, v: Tensor, norms: Tensor, extreme: Tensor) -> None:
        """The same where some rows are `extreme`, bit for bit what it is if all are treated as such."""
        weight = self.weight[block]
        w, x, picked = (torch.index_select(one, 0, extreme) for one in (weight, v, norms))
        self._write(block, v, norms.index_fill_(0, extreme, inf).reciprocal_())
        x, _ = self._scaled_and_measured(x, picked)
        self._moved(w, x, picked.clamp_(min=self._tiny).reciprocal_(), out=w)
        weight.index_copy_(0, extreme, w)
        if self.parameter is not None:
            self.parameter[block].index_copy_(0, extreme, w.to(self.parameter.dtype))

    def _moved(self, w: Tensor, x: Tensor, factor: Tensor, *, out: Tensor, back: Tensor | None = None) -> Tensor:
        """`out` ← keep·w − rate·factor·x + back."""
        rate, keep, late = self.rate, self.keep, 1.0
        if isinstance(rate, Tensor):
            factor, rate = factor * rate, 1.0
        # First the sum, while the other operand is in the cache, then the decay.
        if isinstance(keep, float) and abs(keep) > 0.5:
            late = keep
        else:
            w = torch.mul(w, keep, out=self._buffer("decayed", len(w)))
        torch.addcmul(w, x, factor, value=-rate / late, out=out)
        if back is not None:
            torch.add(back, out, alpha=late, out=out)
        elif late != 1.0:
            out.mul_(late)
        return out

    def _out(self, target: Tensor) -> Tensor:
        """Where the new values of a block go: itself, or beside it until a flag has admitted them."""
        return target if self.admitted is None else self._buffer("new", len(target))

    def _admit(self, target: Tensor, new: Tensor) -> None:
        if self.admitted is not None:
            torch.where(self.admitted, new.to(target.dtype), target, out=target)
        elif new is not target:
            target.copy_(new)

    def _is_certain(self, damped: Tensor) -> bool:
        """Whether N + δ·rms N is so much more than squares that underflow come to that these do not matter."""
        dtype, n = self.weight.dtype, self.weight.shape[-1]
        lost = sqrt(n * torch.finfo(dtype).tiny)
        least, most = torch.aminmax(damped)
        return float(least) * torch.finfo(dtype).eps > lost and float(most) < inf

    def _damp(self, sizes: Tensor, out: Tensor) -> Tensor:
        """`out` ← N + δ·rms N of the rows of each matrix."""
        top = sizes.max()
        relative = (sizes / torch.where(top > 0, top, 1)).square_().view(-1, self.m)
        whole = self.m // GROUP * GROUP
        # One number from many would be added up as there are threads: first many from many.
        sums = relative[:, :whole].unflatten(-1, (-1, GROUP)).sum(dim=-1).sum(dim=-1) + relative[:, whole:].sum(dim=-1)
        rms = (sums / self.m).sqrt_().mul_(top).mul_(self.damping)
        return torch.add(sizes.view(-1, self.m), rms.unsqueeze(-1), out=out.view(-1, self.m)).view(-1, 1)

    # -- centering ---------------------------------------------------------------------------------------------------

    def _near_the_mean(self) -> Tensor:
        """[1, n]: a row that is about as far from the mean of V as the others are, or nearer."""
        near = self.gradient[:GROUP].to(self.weight.dtype).mean(dim=0, keepdim=True)
        if self.momentum is None:
            return near
        before = self.momentum[:GROUP].mean(dim=0, keepdim=True)
        if not self.nesterov:
            return torch.lerp(before, near, 1 - self.beta)
        return near + self.beta * (near + self.beta * before)

    def _minus(self, block: slice, shift: tuple[Tensor, Tensor]) -> Tensor:
        """ΠV of a block: the first difference is exact where it matters."""
        v = self._direction(block, update=False)
        return torch.sub(v, shift[0], out=self._buffer("x", len(v))).sub_(shift[1])

    def _measure_centered(
        self,
        block: slice,
        shift: tuple[Tensor, Tensor],
        noise: Tensor,
        norms: Tensor,
        sizes: Tensor,
        units: dict[int, Tensor | None],
    ) -> Tensor:
        """ΠV of a block in its units; `sizes` ← its row norms, zero where a row is nothing but rounding."""
        x, unit = self._measure(self._minus(block, shift), norms[block])
        units[block.start] = unit
        found = norms[block].double() if unit is None else norms[block].double() / unit
        sizes[block] = torch.where(found > noise, found, 0)
        return x

    def _totals(self) -> Tensor:
        shape = (-(-self.m // GROUP), self.weight.shape[-1])
        return self.scratch.empty(shape, dtype=self.weight.dtype, device=self.weight.device)

    @staticmethod
    def _add_up(x: Tensor, totals: Tensor, block: slice) -> None:
        """Column sums of every `GROUP` rows of a block."""
        first, groups = block.start // GROUP, len(x) // GROUP
        whole = groups * GROUP
        if groups:
            torch.sum(x[:whole].unflatten(0, (groups, GROUP)), dim=1, out=totals[first : first + groups])
        if whole < len(x):
            torch.sum(x[whole:], dim=0, out=totals[first + groups])

    # -- memory ------------------------------------------------------------------------------------------------------

    @property
    def _tiny(self) -> float:
        """Less than the norm of any row that is not zero, once it is multiplied by its power of two."""
        return SMALL[self.weight.dtype] ** 2

    def _blocks(self) -> list[slice]:
        count = len(self.weight)
        return [slice(at, min(at + self.rows, count)) for at in range(0, count, self.rows)]

    def _buffer(self, name: str, rows: int) -> Tensor:
        """[rows, n], the same memory in every block."""
        if name not in self.buffers:
            shape = (min(self.rows, len(self.weight)), self.weight.shape[-1])
            self.buffers[name] = self.scratch.empty(shape, dtype=self.weight.dtype, device=self.weight.device)
        return self.buffers[name][:rows]

    def _column(self, dtype: torch.dtype | None = None) -> Tensor:
        """One number a row."""
        device = self.weight.device
        return self.scratch.empty((len(self.weight), 1), dtype=dtype or self.weight.dtype, device=device)


def _in_order(totals: Tensor) -> Tensor:
    """[groups, n] → float64 [1, n]."""
    return totals.sum(dim=0, keepdim=True, dtype=torch.float64)
