"""`SymOpt`: one optimizer in which every block gets the update that matches its symmetry."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lit_symopt.blocks import Block, BlockTaxonomy, shape_of
from lit_symopt.capture import RATES, capturing, rates_to_device, rates_to_numbers, refuse_to_capture
from lit_symopt.config import SymOptConfig
from lit_symopt.errors import CheckpointError, ConfigError, GradientError
from lit_symopt.explain import explain
from lit_symopt.finite import FiniteCheck, Refusal
from lit_symopt.groups import DEFAULTS, MEANING, validate_group
from lit_symopt.member import BATCHED_BY, Member, local_part, make_state, subject_of
from lit_symopt.ranges import EVERYTHING, FINITE, Subject, phase
from lit_symopt.ranges import step as range_of_step
from lit_symopt.scratch import FRESH, Arena
from lit_symopt.stacks import settings_for
from lit_symopt.update import require_scratch, update

if TYPE_CHECKING:
    from lit_symopt.sharding.holdings import Distribution
    from lit_symopt.sharding.report import PlanReport
    from lit_symopt.sharding.step import DistributedStep

_HALF = (torch.bfloat16, torch.float16)
_OF_THIS_MACHINE = ("layout", "backend", "scratch", "capturable")
"""Options that a checkpoint does not bring: how steps are computed, and the layout, which it must share."""


class SymOpt(torch.optim.Optimizer):
    """An ordinary `torch.optim.Optimizer` whose groups each name a rule.

    With momentum `M`, rule `U` and scale `s`, every step does

        M ← β M + (1 − β) G            (or Nesterov's, or AdamW's two moments)
        W ← (1 − lr·wd) W − lr · radius · s(M, U) · U(M)

    for each matrix that a group's layout finds in its parameters. Parameters in half precision keep an fp32 master
    and fp32 state. Equal blocks are updated as one batch.

    Args:
        params: parameters, named parameters, or group dictionaries with any keys of the vocabulary below.
        lr: learning rate of groups that have none.
        options: defaults for the other keys of a group:
            `rule` (see `lit_symopt.rules.RULES`; there is no default), `centered`, `layout` (a `Layout`), `momentum`,
            `momentum_kind` (`ema`, `nesterov`), `scale`, `alpha`, `eps`, `row_damping`, `precision`, `radius`,
            `betas`, `weight_decay`, `master_weights`, `backend`, `scratch` and `capturable` (see `SymOptConfig`), and
            `name` and `role`, which loggers show.

    Raises:
        ConfigError: for an unknown key, rule or scale, or a value out of range, naming the group.
        TaxonomyError: for a layout that does not fit a parameter.
        GradientError: from `step`, for sparse, complex or non-finite gradients; nothing has changed then. On an
            accelerator the error for a non-finite gradient comes at the next step, or from `check()`.

    Example:
        >>> weight = torch.nn.Parameter(torch.eye(3))
        >>> optimizer = SymOpt([weight], lr=0.5, rule="spectral", momentum=0.0)
        >>> weight.grad = torch.diag(torch.tensor([3.0, 2.0, 1e-3]))
        >>> optimizer.step()
        >>> weight.diagonal().tolist()  # the polar factor of the gradient is the identity
        [0.5, 0.5, 0.5]
    """

    def __init__(self, params: ParamsT, lr: float = 1e-3, **options: Any) -> None:
        self._start()
        super().__init__(params, {**DEFAULTS, "lr": lr, **options})

    def _start(self) -> None:
        """Everything that is not state: made anew by construction, copying and unpickling."""
        self._finite = FiniteCheck()
        self._versions: dict[Tensor, int] = {}
        self._distributed: DistributedStep | None = None
        self._prepared: _Prepared | None = None
        self._arena = Arena()  # what all buckets borrow, one after the other

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # which torch adds, and which is no option of a group here
        self._start()

    @classmethod
    def for_module(
        cls,
        module: nn.Module,
        taxonomy: BlockTaxonomy | None = None,
        *,
        config: SymOptConfig | None = None,
        lr: float | None = None,
    ) -> SymOpt:
        """An optimizer for every trainable parameter of a module, one group a role.

        Args:
            module: any module.
            taxonomy: its blocks; default: what the module declares, or that of a known architecture inside it.
            config: stack, rates and overrides; default: the symmetric stack.
            lr: base learning rate, in place of the config's.

        Raises:
            TaxonomyError: if the taxonomy is not total and disjoint over the module.
        """
        config = config or SymOptConfig()
        config = config if lr is None else replace(config, lr=lr)
        blocks = (taxonomy or BlockTaxonomy.of(module)).assign(module)
        return cls(groups_for(blocks, module, config))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see the class for its keys."""
        name = param_group.get("name") or f"group{len(self.param_groups)}"
        super().add_param_group({**param_group, "name": name, "params": _named(param_group["params"], name)})
        group = self.param_groups[-1]
        # A strategy may put other tensors in the place of the parameters: what they were is kept.
        group["shapes"] = [list(shape_of(parameter)) for parameter in group["params"]]
        try:
            names = [other["name"] for other in self.param_groups]
            if names.count(group["name"]) > 1:
                raise ConfigError(f"two groups are called {group['name']!r}: give each a name of its own")
            validate_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        if group["capturable"]:
            rates_to_device(group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with range_of_step():
            self._step()
        return loss

    def _step(self) -> None:
        captured = capturing()
        with phase(EVERYTHING, "prepare"):
            key = self._made_of() if self._distributed is None else []
            prepared = self._prepared if self._prepared is not None and self._prepared.still(key, self.state) else None
            if captured:
                for group in self.param_groups:
                    refuse_to_capture(group, ready=prepared is not None)
            found = self._with_gradients() if prepared is None else prepared.with_gradients()
        if not found and any(parameter.numel() for group in self.param_groups for parameter in group["params"]):
            warnings.warn(
                "no parameter of the optimizer has a gradient, so this step does nothing. Call backward before it; if "
                "you do, the module has other parameters by now: build SymOpt after fully_shard, .to() or the like.",
                stacklevel=3,
            )
        if self._distributed is not None:
            self._distributed_step(self._distributed, found)
            return
        with phase(FINITE, "check"):
            names, gradients = [name for name, _, _ in found], [_gradient(p) for _, p, _ in found]
            admitted = self._finite.admit(names, gradients, keep=self._capturable)
        with phase(EVERYTHING, "prepare"):
            prepared = prepared or self._prepare(found)
            for member in prepared.members:
                member.gradient = _gradient(member.parameter)
            for member in prepared.half:
                member.weight = self._weight(member.parameter, member.group)
        refusal = Refusal(admitted)
        # What a graph has captured must be there whenever it is replayed: memory of its own pool.
        scratch = FRESH if captured else self._arena
        try:
            for bucket in prepared.buckets:
                with phase(subject_of, "prepare", bucket):
                    update(bucket, scratch=scratch, refused=refusal.on(bucket[0].weight.device))
            with phase(EVERYTHING, "prepare"):
                self._remember_versions(prepared.half)
        finally:
            prepared.release()

    def _made_of(self) -> list[Any]:
        """Everything that decides who is updated together with whom, to be compared with what it was."""
        return [
            (
                id(group),
                [group[option] for option in BATCHED_BY],
                [group["capturable"], *(id(group[key]) for key in RATES if isinstance(group[key], Tensor))],
                [id(parameter) for parameter in group["params"]],
                [
                    parameter.grad is not None
                    and (parameter.dtype, parameter.grad.dtype, parameter.shape, parameter.device)
                    for parameter in group["params"]
                ],
            )
            for group in self.param_groups
        ]

    def _prepare(self, found: list[tuple[str, Tensor, dict[str, Any]]]) -> _Prepared:
        """Members and buckets of a step, kept until what they were made of changes."""
        for group in self.param_groups:
            if group["capturable"]:
                rates_to_device(group)
        members = []
        for name, parameter, group in found:
            weight = self._weight(parameter, group)
            member = Member(name, _gradient(parameter), weight, parameter, group, self.state[parameter])
            make_state(member)
            members.append(member)
        self._prepared = _Prepared(self._made_of(), members)
        return self._prepared

    @property
    def _capturable(self) -> bool:
        return any(group["capturable"] for group in self.param_groups)

    def check(self) -> None:
        """Wait for the device and raise the error of a step that met a non-finite gradient, if one did.

        Steps that a CUDA graph replays are steps too.
        """
        self._finite.raise_pending()

    def attach(self, to: object = None) -> SymOpt:
        """Follow a strategy that has distributed the parameters, so that every update is that of the whole blocks.

        Args:
            to: the `DeepSpeedEngine` that `deepspeed.initialize` returned; a `torch.distributed.ProcessGroup` whose
                ranks hold copies of all parameters (DDP) and are to share the work; `None` looks for the parameters of
                FSDP2 (`DTensor`), which the first step does by itself.

        Returns:
            The optimizer.

        Raises:
            ConfigError: for a strategy that is not supported, by name, if the ranks have different groups, or if any is
                capturable: what processes exchange is not captured.
        """
        from lit_symopt.sharding.attach import distribution_for
        from lit_symopt.sharding.step import DistributedStep

        distribution = distribution_for(self, to)
        if distribution is not None and self._capturable:
            raise ConfigError(
                f"capturable=True: steps under {distribution.strategy} exchange updates between processes, which is "
                "not captured in CUDA graphs; set capturable=False"
            )
        self._distributed = None if distribution is None else DistributedStep(distribution, self.param_groups)
        return self

    def plan_report(self) -> PlanReport:
        """What one step sends between processes and computes on each, by role; print it, or read its fields.

        Raises:
            ConfigError: if the optimizer is attached to no strategy.
        """
        self._find_strategy()
        if self._distributed is None:
            raise ConfigError(
                "the optimizer is attached to no strategy: on one device nothing moves. Under DDP call "
                "attach(process_group), under DeepSpeed attach(engine), with the mixin the Trainer does it."
            )
        return self._distributed.report()

    @property
    def distribution(self) -> Distribution | None:
        """Who holds what, once the optimizer is attached to a strategy."""
        return None if self._distributed is None else self._distributed.distribution

    def kept_scratch(self, device: torch.device) -> int:
        """Bytes on a device that steps borrow and that are kept for the next one; at most the option `scratch`."""
        distributed = 0 if self._distributed is None else self._distributed.scratch.bytes(device)
        return self._arena.bytes(device) + distributed

    def explain(self, name: str) -> str:
        """What the parameter of that name gets, and why.

        Raises:
            ConfigError: for an unknown name, with the nearest known ones.
        """
        return explain(self, name)

    # -- a step's parts ------------------------------------------------------------------------------------------

    def _with_gradients(self) -> list[tuple[str, Tensor, dict[str, Any]]]:
        """Name, tensor and group of everything that a step updates; makes no state."""
        self._find_strategy()
        found = []
        for group in self.param_groups:
            for name, parameter in self._held(group):
                if parameter.grad is not None and parameter.numel() > 0:
                    _refuse_unusable(name, parameter.grad)
                    found.append((name, parameter, group))
        return found

    def _held(self, group: dict[str, Any]) -> Iterable[tuple[str, Tensor]]:
        """What the optimizer holds for a group: its parameters, or what a strategy has put in their place."""
        if self._distributed is not None:
            return [(self._distributed.holding(tensor).key, tensor) for tensor in group["params"]]
        names, shapes = group["param_names"], [tuple(tensor.shape) for tensor in group["params"]]
        if shapes != [tuple(shape) for shape in group["shapes"]]:
            raise ConfigError(
                f"group {group['name']!r} was built over {len(names)} parameter(s), {names[:3]}..., and holds "
                f"tensors of shapes {shapes[:3]} now: a strategy has put partitions in their place, of which a matrix "
                "rule would see no whole matrix. After deepspeed.initialize call attach(engine) on the optimizer; with "
                "SymOptMixin the Trainer does it, and lit_symopt.AttachOptimizer is the callback for other modules."
            )
        return zip(names, group["params"], strict=True)

    def _find_strategy(self) -> None:
        """Attach to FSDP2, which needs no call: its parameters say that they are distributed, as do those of FSDP1."""
        if self._distributed is None and any(
            hasattr(parameter, "device_mesh") or hasattr(parameter, "_fsdp_flattened")
            for group in self.param_groups
            for parameter in group["params"]
        ):
            self.attach()

    def _distributed_step(self, step: DistributedStep, found: list[tuple[str, Tensor, dict[str, Any]]]) -> None:
        with phase(FINITE, "check"):
            admitted = self._agreed(step, found)
        with phase(EVERYTHING, "prepare"):
            members = [self._member(name, parameter, group) for name, parameter, group in found]
            for member in members:
                make_state(member)
            held = [(step.holding(member.parameter), member) for member in members]
        step(held, admitted)
        with phase(EVERYTHING, "prepare"):
            self._remember_versions(members)

    def _agreed(self, step: DistributedStep, found: list[tuple[str, Tensor, dict[str, Any]]]) -> Tensor | None:
        """Whether all ranks take the step; raises on all of them alike if not."""
        known = step.distribution.finite()
        if known:
            return None
        if known is None:
            gradients = [local_part(_gradient(parameter)) for _, parameter, _ in found]
            try:
                return self._finite.admit([name for name, _, _ in found], gradients, agree=step.agree)
            except GradientError:
                step.distribution.refused()
                raise
        step.distribution.refused()
        raise GradientError(
            f"a gradient of this step is not finite ({step.distribution.strategy} says so of all ranks). No weight and "
            "no state was changed. Look at the loss of this batch; lower the learning rate or clip gradients if it "
            "grew."
        )

    def make_state(self, tensor: Tensor, group: dict[str, Any]) -> None:
        """Create the state of a held tensor before the first step, as strategies need that save or offload it."""
        make_state(Member(group["name"], tensor, self._weight(tensor, group), tensor, group, self.state[tensor]))

    def _member(self, name: str, parameter: Tensor, group: dict[str, Any]) -> Member:
        """A parameter with its arithmetic dtype, and its master if it needs one."""
        weight, gradient = self._weight(parameter, group), _whole_sum(_gradient(parameter), parameter)
        member = Member(name, gradient, weight, parameter, group, self.state[parameter])
        if gradient.dtype == weight.dtype:
            return member
        with phase(subject_of, "momentum", [member]):
            return replace(member, gradient=gradient.to(weight.dtype))

    def _weight(self, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        """What is updated for a parameter: itself, or the fp32 master of one in half precision."""
        if parameter.dtype not in _HALF:
            return parameter
        with phase(_master_subject, "momentum", parameter, group):
            return self._master(parameter, group)

    def _master(self, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        if not group["master_weights"]:
            return parameter.float()
        master: Tensor | None = self.state[parameter].get("master")
        if master is None:
            master = self.state[parameter]["master"] = parameter.float()
        elif self._versions.get(parameter) != local_part(parameter)._version:
            # Somebody wrote the parameter since (loaded weights, say): what they wrote wins over the master.
            master.copy_(torch.where(master.to(parameter.dtype) == parameter, master, parameter.float()))
        return master

    def _remember_versions(self, members: Iterable[Member]) -> None:
        for member in members:
            if member.weight is not member.parameter:
                self._versions[member.parameter] = local_part(member.parameter)._version

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and Python types, loadable with `weights_only=True`; layouts are kept as text.

        Where a strategy has put flat partitions in the place of the parameters, the entry `sharding` says which
        elements of which parameter this rank's partitions hold.
        """
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group["layout"] = str(group["layout"])
            if group["capturable"]:
                rates_to_numbers(group)
        if self._distributed is not None and (described := self._distributed.described()):
            saved["sharding"] = described
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; rates and decay come along, state keeps the dtype it was saved with.

        A capturable optimizer takes them in into the tensors that it has, which CUDA graphs may know.

        Raises:
            CheckpointError: if the groups hold other parameters, rules or layouts; nothing is loaded then.
        """
        self._compare(state_dict)
        groups = [
            # torch's DCP makes lists of tuples.
            {**saved, **{key: own[key] for key in _OF_THIS_MACHINE}, "betas": tuple(saved["betas"])}
            for saved, own in zip(state_dict["param_groups"], self.param_groups, strict=True)
        ]
        distributed, finite = self._distributed, self._finite
        kept = [_Kept(group, self.state) for group in self.param_groups]
        super().load_state_dict({"state": state_dict["state"], "param_groups": groups})
        if self._capturable:
            finite.forget()
            self._finite = finite
        if distributed is not None:
            self._distributed = distributed.over(self.param_groups)
        # torch casts state to its parameter's dtype; fp32 momentum of a bf16 parameter must stay fp32.
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for key, parameter in zip(keys, order, strict=True):
            for what, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor) and self.state[parameter][what].dtype != value.dtype:
                    self.state[parameter][what] = value.to(parameter.device, copy=True)
        for own, group in zip(kept, self.param_groups, strict=True):
            own.take_in(group, self.state)
        self._versions.clear()
        self._prepared = None

    def _compare(self, state_dict: dict[str, Any]) -> None:
        saved_groups = state_dict["param_groups"]
        saved, own = ({group.get("name"): group for group in groups} for groups in (saved_groups, self.param_groups))
        differences = []
        if list(saved) != list(own):
            differences.append(f"its groups are {list(saved)}, this optimizer's are {list(own)}")
        for name in [name for name in own if name in saved]:
            differences += [
                f"{name}: {key} is {str(saved[name].get(key))!r} there and {str(own[name][key])!r} here"
                for key in MEANING
                if str(saved[name].get(key)) != str(own[name][key])
            ]
            differences += _different_parameters(name, saved[name], own[name])
        if not differences:
            differences += self._misshapen(state_dict)
        if differences:
            raise CheckpointError(
                f"the optimizer state belongs to another model or stack: {'; '.join(differences)}. "
                f"Resume with the configuration it was saved with, or load only the weights."
            )

    def _misshapen(self, state_dict: dict[str, Any]) -> list[str]:
        wrong = []
        for saved, own in zip(state_dict["param_groups"], self.param_groups, strict=True):
            if len(saved["params"]) != len(own["params"]):
                return [
                    f"{own['name']}: {len(saved['params'])} tensors there and {len(own['params'])} here, as they are "
                    "cut by another strategy or number of processes (lit-symopt checkpoint consolidate)"
                ]
            named = len(own["param_names"]) == len(own["params"])
            names = own["param_names"] if named else [own["name"]] * len(own["params"])
            for key, name, parameter in zip(saved["params"], names, own["params"], strict=True):
                for what, value in state_dict["state"].get(key, {}).items():
                    if what != "step" and value.shape != parameter.shape:
                        wrong.append(f"{name!r}: {what} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
        return wrong


class _Kept:
    """The rates and the state of a capturable group as they were: tensors that a graph may know."""

    def __init__(self, group: Mapping[str, Any], state: Mapping[Tensor, dict[str, Tensor]]) -> None:
        self.rates: dict[str, Any] = {}
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        if group["capturable"]:
            self.rates = {key: group[key] for key in RATES if isinstance(group[key], Tensor)}
            self.state = {parameter: dict(state[parameter]) for parameter in group["params"] if parameter in state}

    @torch.no_grad()
    def take_in(self, group: dict[str, Any], state: Mapping[Tensor, dict[str, Tensor]]) -> None:
        """Put them back in the place of what was loaded, with its values."""
        for key, rate in self.rates.items():
            group[key] = rate.fill_(group[key])
        for parameter, entries in self.state.items():
            loaded = state[parameter]
            for key, tensor in entries.items():
                # What is not there is what it is before the first step.
                value = loaded.get(key, parameter if key == "master" else None)
                loaded[key] = tensor.zero_() if value is None else tensor.copy_(value)


class _Prepared:
    """The members of a step in buckets, with what they were made of.

    Args:
        made_of: what must not have changed.
        members: in the order of the groups.
    """

    def __init__(self, made_of: list[Any], members: list[Member]) -> None:
        self.made_of, self.members = made_of, members
        buckets: dict[Hashable, list[Member]] = {}
        for member in members:
            buckets.setdefault(member.bucket(), []).append(member)
        self.buckets = list(buckets.values())
        self.half = [member for member in members if member.weight is not member.parameter]
        self._kept = [len(member.state) for member in members]
        for bucket in self.buckets:
            require_scratch(bucket)

    def still(self, made_of: list[Any], state: Mapping[Tensor, Any]) -> bool:
        """Whether it holds for a step that is made of this, with the state where it was."""
        return made_of == self.made_of and all(
            state.get(member.parameter) is member.state and len(member.state) == kept  # which may have been emptied
            for member, kept in zip(self.members, self._kept, strict=True)
        )

    def release(self) -> None:
        """Keep nothing alive between steps that the model and the state do not: no gradients, no copies of weights."""
        for member in self.members:
            member.gradient = member.parameter
        for member in self.half:
            member.weight = member.parameter

    def with_gradients(self) -> list[tuple[str, Tensor, dict[str, Any]]]:
        """Name, tensor and group of the members."""
        for member in self.members:
            _refuse_unusable(member.name, _gradient(member.parameter))
        return [(member.name, member.parameter, member.group) for member in self.members]


def _different_parameters(name: Any, saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """How the parameters of a saved group differ from those of this optimizer's."""
    if saved.get("param_names") != own["param_names"]:
        there, here = set(saved.get("param_names") or ()), set(own["param_names"])
        return [f"{name}: only there {sorted(there - here)[:4]}, only here {sorted(here - there)[:4]}"]
    shapes = saved.get("shapes") or own["shapes"]  # files of before they were kept
    return [
        f"{parameter!r}: shape {tuple(there)} there and {tuple(here)} here"
        for parameter, there, here in zip(own["param_names"], shapes, own["shapes"], strict=True)
        if tuple(there) != tuple(here)
    ]


def groups_for(blocks: Iterable[Block], module: nn.Module, config: SymOptConfig) -> list[dict[str, Any]]:
    """Parameter groups of a module under a config: one a role, more where its blocks differ in layout or centering.

    Raises:
        ConfigError: if the config names a role that no block has.
    """
    parameters = dict(module.named_parameters())
    groups: dict[Hashable, dict[str, Any]] = {}
    for block in blocks:
        settings = settings_for(block, config)
        key = tuple(settings.items())
        group = groups.setdefault(key, {**settings, "symmetry": str(block.symmetry), "params": []})
        group["params"].append((block.name, parameters[block.name]))
    absent = sorted({str(role) for role in config.roles} - {group["role"] for group in groups.values()})
    if absent:
        present = ", ".join(dict.fromkeys(group["role"] for group in groups.values()))
        raise ConfigError(f"roles.{absent[0]} is set, but no block has this role; the roles here are {present}")
    taken: set[str] = set()
    for group in groups.values():
        candidates = (group["role"] if n == 1 else f"{group['role']}.{n}" for n in count(1))
        group["name"] = next(name for name in candidates if name not in taken)
        taken.add(group["name"])
    return list(groups.values())


def _named(params: Any, name: str) -> Any:
    """Parameters as (name, parameter) pairs, which torch keeps as the group's `param_names`."""
    if isinstance(params, (set, frozenset)):
        return params  # torch refuses them, because their order is not fixed
    listed = [params] if isinstance(params, Tensor) else list(params)
    return [pair if isinstance(pair, tuple) else (f"{name}[{index}]", pair) for index, pair in enumerate(listed)]


def _whole_sum(gradient: Any, parameter: Any) -> Tensor:
    """A DTensor's gradient placed as the DTensor is: that of copies may be a part of the sum on each rank."""
    placements = getattr(parameter, "placements", None)
    if placements is None or gradient.placements == placements:
        return gradient  # type: ignore[no-any-return]
    return gradient.redistribute(placements=placements)  # type: ignore[no-any-return]


def _master_subject(parameter: Tensor, group: Mapping[str, Any]) -> Subject:
    return Subject(rule=group["rule"], elements={str(group["role"]): parameter.numel()}, shape=tuple(parameter.shape))


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _refuse_unusable(name: str, gradient: Tensor) -> None:
    if gradient.layout != torch.strided:
        raise GradientError(
            f"the gradient of {name!r} is sparse ({gradient.layout}); use dense ones (nn.Embedding(sparse=False))"
        )
    if gradient.is_complex():
        raise GradientError(f"the gradient of {name!r} is complex; view the parameter as real (torch.view_as_real)")
