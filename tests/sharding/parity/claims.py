"""Runs of cases, kept, and what must hold for each of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from tests.sharding.parity.cases import TOLERANCE, Case
from tests.sharding.parity.models import WIDTH, build
from tests.sharding.parity.oracle import gradients_at, oracle, replayed
from tests.sharding.parity.worker import Found, train
from tests.sharding.processes import Ranks

GRADIENT_TOLERANCE = 1e-6  # of means of the same bfloat16 gradients, accumulated in fp32
RECORD = "LIT_SYMOPT_PARITY"  # environment variable: a file to which every comparison appends a line


class Runs:
    """Trains cases, each once, in processes that are started once."""

    def __init__(self) -> None:
        self._ranks: dict[int, Ranks] = {}
        self._found: dict[Case, list[Found] | Exception] = {}

    def __enter__(self) -> Runs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for ranks in self._ranks.values():
            ranks.close()

    def __call__(self, case: Case) -> list[Found]:
        """What each rank found.

        Raises:
            RanksFailed: if the training failed; every time it is asked for.
        """
        if case not in self._found:
            ranks = self._ranks.setdefault(case.world, Ranks(case.world))
            try:
                self._found[case] = ranks(train, case)
            except AssertionError as error:
                self._found[case] = error
        found = self._found[case]
        if isinstance(found, Exception):
            raise found
        return found


def distances(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """‖X − X*‖/‖X*‖ of every tensor, X* the oracle's."""
    assert set(found) == set(expected)
    return {
        name: float((found[name].double() - whole.double()).norm() / whole.double().norm().clamp(min=1e-30))
        for name, whole in expected.items()
    }


def agrees_with_one_process(found: Sequence[Found], case: Case) -> None:
    """Every tensor is the oracle's to the tolerance, has moved far beyond it, and is bitwise the same on all ranks."""
    assert len({one.digest for one in found}) == 1, "the ranks' weights differ"
    work, first = case.work, found[0]
    if not work.half:
        expected = oracle(work)
    else:
        assert len(first.trace) == work.steps
        for step, (weights, gradients) in enumerate(first.trace):
            off = distances(gradients, gradients_at(weights, work, step))
            assert max(off.values()) <= GRADIENT_TOLERANCE, f"gradients of step {step}: {_worst(off)}"
        expected = replayed([gradients for _, gradients in first.trace], work)
        for name, weight in first.half.items():
            assert torch.equal(weight, first.weights[name].bfloat16()), f"{name} is not its master, rounded"
    by_name = distances(first.weights, expected)
    _record(case, found, by_name)
    initial = dict(build(work.family).named_parameters())
    for name, whole in expected.items():
        moved = (whole - initial[name]).norm() / whole.norm()
        assert moved > 100 * TOLERANCE, f"{name} moves by {moved:.1e} only: the comparison says nothing"
    assert max(by_name.values()) <= TOLERANCE, f"from one process: {_worst(by_name)}"


def _worst(off: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {off[name]:.1e}" for name in sorted(off, key=lambda name: -off[name])[:4])


def keeps_its_share_of_state(found: Sequence[Found], case: Case) -> None:
    """4 bytes an element that the rank holds, 8 under AdamW, within 2 %; and together the ranks hold the model once."""
    elements = sum(parameter.numel() for parameter in build(case.work.family).parameters())
    held = sum(one.held for one in found) / (case.world if case.strategy == "ddp" else 1)
    assert elements <= held <= 1.02 * elements
    for one in found:
        assert abs(one.state - one.due) <= 0.02 * one.due


def moves_what_is_planned(found: Sequence[Found], case: Case) -> None:
    """The bytes of the last step are the plan's, on every rank, at most 2P/W; row-norm embeddings move one row."""
    parameters = 4 * sum(parameter.numel() for parameter in build(case.work.family).parameters())
    for rank, one in enumerate(found):
        assert one.report is not None
        sent, planned = sum(one.sent.values()), one.report.bytes_sent(rank)
        slack = one.calls.get("allreduce", 0) + len(one.report.sent)  # fractions of a byte are rounded in each
        assert abs(sent - planned) <= slack, f"rank {rank} sent {sent} bytes ({one.sent}), planned {one.report.sent}"
        if case.strategy != "ddp":
            assert sent <= 2 * parameters / case.world
        if case.work.stack == "symmetric" and "embedding" in one.report.sent:
            # Rows cut in two, of which the smaller parts move, and one sum for the damping.
            assert one.report.sent["embedding"][rank] <= 4 * WIDTH + 2 * 8


def _record(case: Case, found: Sequence[Found], off: Mapping[str, float]) -> None:
    """Appends what was found to the record, if one is asked for."""
    if (file := os.environ.get(RECORD)) is None:
        return
    tensor = max(off, key=off.__getitem__)
    line = {
        "case": case.name,
        "family": case.work.family,
        "stack": case.work.stack,
        "strategy": case.strategy,
        "world": case.world,
        "error": off[tensor],
        "tensor": tensor,
        "sent": [sum(one.sent.values()) for one in found],
        "state": [one.state for one in found],
    }
    with Path(file).open("a") as record:
        record.write(json.dumps(line) + "\n")
