"""The refusal of gradients that are not finite.

On CPU a bad gradient raises at once, before anything has changed. On an accelerator, asking would stop the host until
the device has caught up, so a flag on the device masks every write of the step, and the error is raised at the next
step or check that finds the flag already copied to the host. In a step that a CUDA graph replays there is no host to
raise it: there the flags stay on the device, set, until a step that is not replayed, or a check, has looked at them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lit_symopt.capture import capturing
from lit_symopt.errors import GradientError
from lit_symopt.ranges import FINITE, phase

LARGE = 1 << 20
"""Entries of a gradient that is worth a call of its own."""


class FiniteCheck:
    """Decides once per step whether all gradients are finite.

    Args:
        defer: mask now and raise later, without a synchronization; default: only for gradients on an accelerator.
    """

    def __init__(self, *, defer: bool | None = None) -> None:
        self.defer = defer
        self._pending: list[tuple[list[str], Tensor, torch.Event | None]] = []
        self._kept: dict[tuple[str, ...], Tensor] = {}  # by the names: which gradients were bad, on the device

    def admit(
        self,
        names: Sequence[str],
        gradients: Sequence[Tensor],
        *,
        agree: Callable[[Tensor], Tensor] | None = None,
        keep: bool = False,
    ) -> Tensor | None:
        """A boolean scalar on the device, true if the step may be taken; `None` if that is already certain.

        Args:
            names: of the blocks.
            gradients: one for each name, or this process's part of it.
            agree: makes flags that are set (1) on any process set on all; default: there is one process.
            keep: leave flags on the device that add up over steps, as those need that a graph replays.

        Raises:
            GradientError: naming the blocks whose gradients are not finite, of this step or of an earlier one.
        """
        captured = capturing()
        if not captured:
            self.raise_pending(wait=False)
        if not gradients:
            return None
        finite = _are_finite(gradients)
        if agree is not None:
            finite = agree((~finite).to(torch.uint8)) == 0
        defer = finite.device.type != "cpu" if self.defer is None else self.defer
        if not defer:
            _raise_for(names, finite)
            return None
        since = self._keep(names, finite) if keep else finite
        if not captured:
            self._pending.append((list(names), *_copy_to_host(since)))
        return finite.all()

    def _keep(self, names: Sequence[str], finite: Tensor) -> Tensor:
        """Which gradients have been finite in all steps since flags were last looked at."""
        bad = finite.logical_not()
        key = tuple(names)
        if key not in self._kept:
            self._kept[key] = torch.zeros_like(bad)
        return self._kept[key].logical_or_(bad).logical_not()

    def raise_pending(self, *, wait: bool = True) -> None:
        """Raise the error of an earlier step, if there was one.

        Args:
            wait: synchronize with the device to be certain; otherwise look only at what has already arrived.
        """
        while self._pending:
            names, finite, event = self._pending[0]
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    return
            self._pending.pop(0)
            self._raise_for(names, finite)
        if wait:
            for kept, bad in self._kept.items():
                self._raise_for(kept, bad.logical_not())

    def forget(self) -> None:
        """Whatever earlier steps met is settled; flags that a graph sets stay where they are."""
        self._pending.clear()
        for bad in self._kept.values():
            bad.zero_()

    def _raise_for(self, names: Sequence[str], finite: Tensor) -> None:
        try:
            _raise_for(names, finite)
        except GradientError:
            if self._kept:  # what was copied later says it once more
                self.forget()
            raise


@contextmanager
def undone_unless(admitted: Tensor | None, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Leave `tensors` as they were, on the device and without asking it, where `admitted` is false."""
    if admitted is None:
        yield
        return
    with phase(FINITE, "check"):
        before = [tensor.clone() for tensor in tensors]
    yield
    with phase(FINITE, "check"):
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(admitted.to(tensor.device, non_blocking=True), tensor, old))


class Refusal:
    """A refused step as torch's fused operations take it, on each device: a float32 scalar, 1 if refused, else 0.

    Args:
        admitted: of `FiniteCheck.admit`.
    """

    def __init__(self, admitted: Tensor | None) -> None:
        self._flag = None if admitted is None else (~admitted).to(torch.float32)
        self._on: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor | None:
        """The scalar on a device; `None` if the step is certain to be taken."""
        if self._flag is None:
            return None
        if device not in self._on:
            self._on[device] = self._flag.to(device, non_blocking=True)
        return self._on[device]


def _are_finite(gradients: Sequence[Tensor]) -> Tensor:
    """One flag for each gradient, together on the device of the first."""
    if all(part.device.type == "cpu" for part in gradients):
        finite = torch.isfinite(_together(_signs_of_life(gradients)))
        for index in finite.logical_not().nonzero().flatten().tolist():
            finite[index] = torch.isfinite(torch.stack(torch.aminmax(gradients[index]))).all()
        return finite
    # Of an empty part there is no maximum; a zero in its place is as finite.
    parts = [part if part.numel() else part.new_zeros(1) for part in gradients]
    # The maximum norm carries inf and NaN along and, unlike a sum, cannot overflow by itself.
    return torch.isfinite(_together(torch._foreach_norm(parts, float("inf"))))


def _signs_of_life(gradients: Sequence[Tensor]) -> list[Tensor]:
    """A number for each gradient on a CPU that is not finite if any of its entries is not, and rarely otherwise.

    A sum carries inf and NaN along and takes half of the time of a norm; but norms of many tensors are one call.
    """
    found = [gradient.sum() if gradient.numel() >= LARGE else gradient for gradient in gradients]
    small = [index for index, gradient in enumerate(gradients) if gradient.numel() < LARGE]
    if small:
        for index, norm in zip(small, torch._foreach_norm([gradients[index] for index in small]), strict=True):
            found[index] = norm
    return found


def _together(norms: Sequence[Tensor]) -> Tensor:
    device, dtype = norms[0].device, norms[0].dtype
    if any(norm.device != device or norm.dtype != dtype for norm in norms):
        norms = [norm.to(device, torch.float64, non_blocking=True) for norm in norms]
    return torch.stack(list(norms))


def _raise_for(names: Sequence[str], finite: Tensor) -> None:
    bad = [name for name, good in zip(names, finite.tolist(), strict=True) if not good]
    if bad:
        shown = ", ".join(map(repr, bad[:8])) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
        raise GradientError(
            f"the gradient of {len(bad)} parameter(s) is not finite: {shown}. No weight and no state was changed. "
            f"Look at the loss of this batch; lower the learning rate or clip gradients if it grew."
        )


def _copy_to_host(flags: Tensor) -> tuple[Tensor, torch.Event | None]:
    if flags.device.type == "cpu":
        return flags, None
    host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
    host.copy_(flags, non_blocking=True)
    event = torch.Event(flags.device)
    event.record()
    return host, event
