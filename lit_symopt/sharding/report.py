"""What a plan moves and costs, by role, as numbers and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lit_symopt.sharding.holdings import Distribution
from lit_symopt.sharding.plan import Plan

CHECK = "finite check"


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """Traffic and work of one training step.

    Attributes:
        strategy: how the blocks are distributed.
        world: number of ranks.
        sent: bytes that each rank sends, by role; `finite check` is the flags by which ranks agree on a step.
        routes: number of cells by role and route.
        work: multiply-adds of each rank.
    """

    strategy: str
    world: int
    sent: dict[str, list[int]]
    routes: dict[str, dict[str, int]]
    work: list[int]

    @staticmethod
    def of(distribution: Distribution, plans: Sequence[Plan], *, flags: int) -> PlanReport:
        """The report of the plans of one training step, and of one all-reduce of `flags` bytes."""
        world = distribution.world
        sent: dict[str, list[int]] = {}
        routes: dict[str, Counter[str]] = {}
        work = [0] * world
        for plan in plans:
            for role, by_rank in plan.sent().items():
                sent[role] = [a + b for a, b in zip(sent.get(role, [0] * world), by_rank, strict=True)]
            for one in plan.rounds:
                for cell in one.cells:
                    routes.setdefault(cell.role, Counter())[one.route.value] += 1
            work = [a + b for a, b in zip(work, plan.work(), strict=True)]
        if flags:
            sent[CHECK] = [round(2 * flags * (world - 1) / world)] * world
        return PlanReport(
            strategy=distribution.strategy,
            world=world,
            sent=sent,
            routes={role: dict(counted) for role, counted in routes.items()},
            work=work,
        )

    def bytes_sent(self, rank: int) -> int:
        """Bytes that one rank sends in one step."""
        return sum(by_rank[rank] for by_rank in self.sent.values())

    def __str__(self) -> str:
        head = ("role", "cells by route", "bytes sent, busiest rank", "all ranks")
        lines = []
        for role, by_rank in self.sent.items():
            cells = ", ".join(f"{number} {route}" for route, number in self.routes.get(role, {}).items())
            lines.append((role, cells or "–", f"{max(by_rank):,}", f"{sum(by_rank):,}"))
        totals = [self.bytes_sent(rank) for rank in range(self.world)]
        lines.append(("all", "", f"{max(totals, default=0):,}", f"{sum(totals):,}"))
        widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
        mean = sum(self.work) / self.world
        balance = max(self.work) / mean if mean else 1.0
        text = [f"{self.strategy}, {self.world} processes: what one step sends for the updates"]
        text += [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [head, *lines]
        ]
        text.append(f"work: the busiest rank has {balance:.2f} times the mean")
        return "\n".join(text)
