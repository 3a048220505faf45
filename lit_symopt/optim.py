"""`SymOpt`: one optimizer in which every block gets the update that matches its symmetry."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from itertools import count
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lit_symopt.blocks import Block, BlockTaxonomy
from lit_symopt.config import SymOptConfig
from lit_symopt.errors import CheckpointError, ConfigError, GradientError
from lit_symopt.explain import explain
from lit_symopt.finite import FiniteCheck, undone_unless
from lit_symopt.groups import DEFAULTS, MEANING, validate_group
from lit_symopt.stacks import settings_for
from lit_symopt.update import Member, make_state, update

_HALF = (torch.bfloat16, torch.float16)


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
            `betas`, `weight_decay`, `master_weights`, and `name` and `role`, which loggers show.

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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
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
        try:
            names = [other["name"] for other in self.param_groups]
            if names.count(group["name"]) > 1:
                raise ConfigError(f"two groups are called {group['name']!r}: give each a name of its own")
            validate_group(group)
        except ValueError:
            self.param_groups.pop()
            raise

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
        found = self._with_gradients()
        admitted = self._finite.admit([name for name, _, _ in found], [_gradient(p) for _, p, _ in found])
        members = [self._member(name, parameter, group) for name, parameter, group in found]
        for bucket in self._buckets(members):
            with undone_unless(admitted, [tensor for member in bucket for tensor in member.touched()]):
                update(bucket)
        self._remember_versions(members)
        return loss

    def check(self) -> None:
        """Wait for the device and raise the error of a step that met a non-finite gradient, if one did."""
        self._finite.raise_pending()

    def explain(self, name: str) -> str:
        """What the parameter of that name gets, and why.

        Raises:
            ConfigError: for an unknown name, with the nearest known ones.
        """
        return explain(self, name)

    # -- a step's parts ------------------------------------------------------------------------------------------

    def _with_gradients(self) -> list[tuple[str, Tensor, dict[str, Any]]]:
        """Name, parameter and group of everything that a step updates; makes no state."""
        found = []
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is not None and parameter.numel() > 0:
                    _refuse_unusable(name, parameter.grad)
                    found.append((name, parameter, group))
        return found

    def _member(self, name: str, parameter: Tensor, group: dict[str, Any]) -> Member:
        """A parameter with its arithmetic dtype, and its master if it needs one."""
        weight, gradient = self._weight(parameter, group), _gradient(parameter)
        if gradient.dtype != weight.dtype:
            gradient = gradient.to(weight.dtype)
        return Member(name, gradient, weight, parameter, group, self.state[parameter])

    def _weight(self, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        """What is updated for a parameter: itself, or the fp32 master of one in half precision."""
        if parameter.dtype not in _HALF:
            return parameter
        if not group["master_weights"]:
            return parameter.float()
        master: Tensor | None = self.state[parameter].get("master")
        if master is None:
            master = self.state[parameter]["master"] = parameter.float()
        elif self._versions.get(parameter) != parameter._version:
            # Somebody wrote the parameter since (loaded weights, say): what they wrote wins over the master.
            master.copy_(torch.where(master.to(parameter.dtype) == parameter, master, parameter.float()))
        return master

    def _remember_versions(self, members: Iterable[Member]) -> None:
        for member in members:
            if member.weight is not member.parameter:
                self._versions[member.parameter] = member.parameter._version

    @staticmethod
    def _buckets(members: Iterable[Member]) -> list[list[Member]]:
        buckets: dict[Hashable, list[Member]] = {}
        for member in members:
            make_state(member)
            buckets.setdefault(member.bucket(), []).append(member)
        return list(buckets.values())

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and Python types, loadable with `weights_only=True`; layouts are kept as text."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group["layout"] = str(group["layout"])
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; rates and decay come along, state keeps the dtype it was saved with.

        Raises:
            CheckpointError: if the groups hold other parameters, rules or layouts; nothing is loaded then.
        """
        self._compare(state_dict)
        groups = [
            {**saved, "layout": own["layout"]}
            for saved, own in zip(state_dict["param_groups"], self.param_groups, strict=True)
        ]
        super().load_state_dict({**state_dict, "param_groups": groups})
        # torch casts state to its parameter's dtype; fp32 momentum of a bf16 parameter must stay fp32.
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for key, parameter in zip(keys, order, strict=True):
            for what, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor) and self.state[parameter][what].dtype != value.dtype:
                    self.state[parameter][what] = value.to(parameter.device, copy=True)
        self._versions.clear()

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
            if saved[name].get("param_names") != own[name]["param_names"]:
                there, here = set(saved[name].get("param_names") or ()), set(own[name]["param_names"])
                differences.append(
                    f"{name}: only there {sorted(there - here)[:4]}, only here {sorted(here - there)[:4]}"
                )
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
            for key, name, parameter in zip(saved["params"], own["param_names"], own["params"], strict=True):
                for what, value in state_dict["state"].get(key, {}).items():
                    if what != "step" and value.shape != parameter.shape:
                        wrong.append(f"{name!r}: {what} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
        return wrong


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
