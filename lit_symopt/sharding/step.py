"""One step of an optimizer whose blocks lie on several ranks: element by element here, rules through the plan."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from lit_symopt.elements import apply, directions, masked, update_elements
from lit_symopt.errors import ConfigError
from lit_symopt.finite import Refusal
from lit_symopt.groups import layout_of
from lit_symopt.member import Member, local_part, subject_of
from lit_symopt.ranges import EVERYTHING, FINITE, phase
from lit_symopt.scratch import Arena
from lit_symopt.sharding.exchange import Exchange
from lit_symopt.sharding.holdings import Distribution, Holding, Placement
from lit_symopt.sharding.plan import OPTIONS, Block, Plan, make_plan
from lit_symopt.sharding.report import PlanReport
from lit_symopt.sharding.transport import Transport
from lit_symopt.update import update
from lit_symopt.whole_step import taken_as_a_whole

Group = dict[str, Any]
Planned = tuple[Holding, Group]
Held = tuple[Holding, Member]


class DistributedStep:
    """A distribution made ready to be stepped: plans are made when a set of tensors is first seen, and kept.

    Args:
        distribution: who holds what.
        groups: the optimizer's parameter groups.

    Raises:
        ConfigError: if a block of the distribution belongs to no group.
    """

    def __init__(self, distribution: Distribution, groups: Sequence[Group]) -> None:
        self.distribution = distribution
        self.transport = Transport(distribution.process_group)
        self._holdings = {id(holding.tensor): holding for holding in distribution.holdings}
        self._exchanges: dict[Hashable, Exchange] = {}
        self._order = {holding.key: index for index, holding in enumerate(distribution.holdings)}
        self._groups = self._by_key(groups)
        self.scratch = Arena()

    def _by_key(self, groups: Sequence[Group]) -> dict[str, Group]:
        group_of = {name: group for group in groups for name in group["param_names"]}
        found = {}
        for holding in self.distribution.holdings:
            names = [placement.name for placement in holding.placements]
            strangers = [name for name in names if name not in group_of]
            if strangers:
                raise ConfigError(
                    f"{self.distribution.strategy} holds {strangers[:4]}, which are in no group of the optimizer; "
                    f"build it over all trainable parameters of the module that the strategy has (SymOpt.for_module)"
                )
            if names:
                found[holding.key] = group_of[names[0]]
        return found

    def holding(self, tensor: Tensor) -> Holding:
        """What lies in a tensor that a step finds in `param_groups`.

        Raises:
            ConfigError: for a tensor that the strategy made after the optimizer was attached.
        """
        try:
            return self._holdings[id(tensor)]
        except KeyError:
            raise ConfigError(
                f"the optimizer holds a tensor of shape {tuple(tensor.shape)} that was not there when it was attached "
                f"to {self.distribution.strategy}; attach it again after the strategy has changed its parameters"
            ) from None

    def over(self, groups: Sequence[Group]) -> DistributedStep:
        """The same distribution for groups that were loaded in place of the old ones."""
        return DistributedStep(self.distribution, groups)

    def described(self) -> dict[str, Any] | None:
        """Plain types that say which elements of which parameter this rank holds; `None` if it holds parameters."""
        holdings = self.distribution.holdings
        if all([placement.name for placement in holding.placements] == [holding.key] for holding in holdings):
            return None
        return {
            "strategy": self.distribution.strategy,
            "world": self.transport.world,
            "rank": self.transport.rank,
            "holdings": {holding.key: _segments(holding) for holding in holdings},
        }

    def agree(self, bad: Tensor) -> Tensor:
        """Flags that are set on any rank: the same on all."""
        with phase(FINITE, "communication"):
            return self.transport.all_reduce(bad, "max")

    def report(self) -> PlanReport:
        """What moves in one training step; see `PlanReport`."""
        flags = 0 if self.distribution.decides else len(self.distribution.holdings)
        return PlanReport.of(self.distribution, self.plans(), flags=flags)

    def plans(self) -> list[Plan]:
        """The plans of one training step in which every block has a gradient, one for each call."""
        return list(self._plans().values())

    def __call__(self, members: Sequence[Held], admitted: Tensor | None) -> None:
        """Update what the members hold.

        Args:
            members: the held tensors of this step with gradients, in the same order on every rank.
            admitted: a flag on the device that masks every write, or `None`.
        """
        with phase(EVERYTHING, "prepare"):
            local = [(holding, _localized(member)) for holding, member in members]
            at_once = _at_once(local)
            alone = {holding.key for bucket in at_once for holding, _ in bucket}
            buckets = _alike([one for one in local if one[0].key not in alone])
        refusal = Refusal(admitted)
        for bucket in at_once:
            alike = [member for _, member in bucket]
            with phase(subject_of, "prepare", alike):
                update(alike, scratch=self.scratch, refused=refusal.on(alike[0].weight.device))
        exchanged = []
        for bucket in buckets:
            alike = [member for _, member in bucket]
            with phase(subject_of, "prepare", alike), masked(alike, refusal.on(alike[0].weight.device)) as mask:
                if _is_exchanged(alike[0].group):
                    exchanged.append((bucket, directions(alike, refused=mask)))
                else:
                    update_elements(alike, refused=mask)
        directed = [
            (holding, member, direction)
            for bucket, found in exchanged
            for (holding, member), direction in zip(bucket, found, strict=True)
        ]
        updates = self._exchange(directed, at_once)
        for bucket, found in exchanged:
            alike = [member for _, member in bucket]
            with phase(subject_of, "prepare", alike), masked(alike, refusal.on(alike[0].weight.device)) as mask:
                here, updates = updates[: len(found)], updates[len(found) :]
                apply(alike, here, refused=mask)

    def _exchange(
        self, directed: Sequence[tuple[Holding, Member, Tensor]], at_once: Sequence[Sequence[Held]]
    ) -> list[Tensor]:
        if not directed:
            return []
        flat_directions: dict[str, Tensor] = {}
        flat_updates: dict[str, Tensor] = {}
        results = []
        with phase(EVERYTHING, "prepare"):
            for holding, _, direction in directed:
                dim = holding.placements[0].dim if holding.placements else 0
                flat = direction.movedim(dim, 0).reshape(-1) if dim else direction.reshape(-1)
                result = torch.zeros_like(flat)
                for segment in holding.segments:
                    here = slice(segment.offset, segment.offset + segment.stop - segment.start)
                    flat_directions[segment.name], flat_updates[segment.name] = flat[here], result[here]
                moved = direction.movedim(dim, 0).shape if dim else direction.shape
                results.append(result.view(moved).movedim(0, dim) if dim else result.view(moved))
            exchange = self._exchange_for(
                [(holding, member.group) for holding, member, _ in directed],
                [(holding, member.group) for bucket in at_once for holding, member in bucket],
            )
        exchange.run(flat_directions, flat_updates)
        return results

    def _exchange_for(self, moved: Sequence[Planned], at_once: Sequence[Planned]) -> Exchange:
        """The exchange of what is `moved`, by the plan of all: who owns what is for all blocks of a call to decide."""
        planned = sorted([*moved, *at_once], key=lambda one: self._order[one[0].key])
        alone = frozenset(placement.name for holding, _ in at_once for placement in holding.placements)
        key = _key(planned)
        if (key, alone) not in self._exchanges:
            plan = self._plans().get(key) or self._plan(planned)  # another one where some have no gradient
            segments = {segment.name: segment for holding, _ in moved for segment in holding.segments}
            self._exchanges[key, alone] = Exchange(plan.without(alone), self.transport, segments, scratch=self.scratch)
        return self._exchanges[key, alone]

    def _plans(self) -> dict[Hashable, Plan]:
        """The plans of all calls of a training step in which every block has a gradient."""
        plans: dict[Hashable, Plan] = {}
        work = [0] * self.transport.world
        for call in self.distribution.calls():
            planned = [(holding, self._groups[holding.key]) for holding in call if holding.placements]
            planned = [one for one in planned if _is_exchanged(one[1])]
            if planned:
                plan = plans[_key(planned)] = self._plan(planned, carried=work)
                work = [a + b for a, b in zip(work, plan.work(), strict=True)]
        return plans

    def _plan(self, planned: Sequence[Planned], *, carried: Sequence[int] | None = None) -> Plan:
        blocks = [_block(placement, group, holding) for holding, group in planned for placement in holding.placements]
        return make_plan(blocks, world=self.transport.world, device_type=self.transport.device.type, carried=carried)


def _is_exchanged(group: Group) -> bool:
    """Whether the update of an element depends on others; AdamW's does not unless it is centered."""
    return bool(group["rule"] != "adamw" or group["centered"])


def _key(planned: Sequence[Planned]) -> Hashable:
    return tuple((holding.key, _options(group), str(group["layout"])) for holding, group in planned)


def _block(placement: Placement, group: Group, holding: Holding) -> Block:
    dtype = holding.tensor.dtype
    return Block(
        placement=placement,
        role=str(group["role"]),
        layout=layout_of(group, placement.shape),
        options=_options(group),
        dtype=torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype,
    )


def _segments(holding: Holding) -> list[dict[str, Any]]:
    placed = {placement.name: placement for placement in holding.placements}
    return [
        {**asdict(segment), "shape": list(placed[segment.name].shape), "dim": placed[segment.name].dim}
        for segment in holding.segments
    ]


def _options(group: Group) -> tuple[Any, ...]:
    return tuple(group[key] for key in OPTIONS)


def _at_once(local: Sequence[Held]) -> list[list[Held]]:
    """Buckets whose step is taken as a whole, as one process takes it: every rank has all of them; nothing moves."""
    buckets: dict[Hashable, list[Held]] = {}
    for holding, member in local:
        if member.group["rule"] == "row_norm" and _is_copy(holding, member):
            buckets.setdefault(member.bucket(), []).append((holding, member))
    return [bucket for bucket in buckets.values() if taken_as_a_whole([member for _, member in bucket])]


def _is_copy(holding: Holding, member: Member) -> bool:
    """Whether the tensor is a whole block, on every rank."""
    if len(holding.placements) != 1:
        return False
    (placement,) = holding.placements
    return tuple(member.weight.shape) == placement.shape and set(placement.held) == {(0, placement.numel)}


def _alike(local: Sequence[Held]) -> list[list[Held]]:
    """Members whose element-wise half is the same."""
    buckets: dict[Hashable, list[Held]] = {}
    for holding, member in local:
        group, weight = member.group, member.weight
        if group["rule"] == "adamw":
            alike = tuple(group[key] for key in ("rule", "centered", "betas", "eps", "lr", "weight_decay"))
        else:
            # Not needed, but then what a profiler shows of a batch is of one rule.
            alike = (group["rule"], group["momentum"], group["momentum_kind"])
        buckets.setdefault((*alike, weight.dtype, weight.device), []).append((holding, member))
    return list(buckets.values())


def _localized(member: Member) -> Member:
    """The member with the local parts of distributed tensors, which share their storage."""
    return replace(
        member,
        gradient=local_part(member.gradient),
        weight=local_part(member.weight),
        parameter=local_part(member.parameter),
        state={name: local_part(value) for name, value in member.state.items()},
    )
