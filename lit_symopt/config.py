"""What a user can choose, as frozen dataclasses that YAML and the command line can set.

`None` means "as the stack says". Everything is validated where it is built; values of a group's vocabulary are checked
once more, with the parameters at hand, by the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from lit_symopt.backends import check_backend, check_scratch
from lit_symopt.blocks import Role
from lit_symopt.errors import ConfigError
from lit_symopt.linalg import Backend, Precision
from lit_symopt.rules import Scale, get_rule

StackName = Literal["symmetric", "muon", "polargrad", "ssd", "scion", "adamw"]
MomentumKind = Literal["ema", "nesterov"]
ScheduleKind = Literal["constant", "linear", "cosine", "wsd"]


@dataclass(frozen=True, kw_only=True)
class RoleConfig:
    """What one role gets. Every field left at `None` is the stack's.

    Args:
        rule: `spectral`, `right_spectral`, `left_spectral`, `row_norm`, `row_then_spectral`, `spectral_then_row`,
            `sgd`, `sign` or `adamw`. Another rule than the stack's comes with its usual settings: an EMA of 0.95 and
            the scale `rms` for matrix rules.
        centered: project the update off the shift `1aᵀ`. Only where the loss cannot see that shift.
        momentum: β of the momentum, in [0, 1); 0 keeps no state. AdamW uses `betas` instead.
        momentum_kind: `ema` (`M ← βM + (1−β)G`) or `nesterov` (`B ← βB + G`, use `G + βB`).
        scale: `none`, `spectral`, `aspect`, `rms`, `row_rms`, `inverse_fan_in`, `nuclear` or `row_nuclear`.
        alpha: exponent of a nuclear scale; only with one.
        eps: AdamW's ε; for row rules a guard against 0/0, relative to the row's largest entry.
        row_damping: δ in `1/(‖Mᵢ‖ + δ·rms of row norms)`.
        precision: arithmetic of polar factors: `exact`, `fp32`, `tf32`, `bf16`, `fp16` or `auto` (`fp32` on a CPU,
            `bf16` on an accelerator); the errors of each are in `lit_symopt.linalg.polar`.
        radius: constant factor of the update (Scion's ρ).
        betas: AdamW's β₁ and β₂.
        lr: learning rate of the role, in place of base rate × multiplier.
        lr_multiplier: the role's rate as a multiple of `SymOptConfig.lr`.
        weight_decay: decoupled decay, `W ← (1 − lr·wd) W − lr·U`.
        heads: update attention per head (`separate`) or as whole matrices (`whole`).
        pairs: let a fused gate/up hold neuron pairs `[gate_j, up_j]` as rows instead of two matrices.
        backend: by whose kernels the step is computed, see `SymOptConfig`.
    """

    rule: str | None = None
    centered: bool | None = None
    momentum: float | None = None
    momentum_kind: MomentumKind | None = None
    scale: str | None = None
    alpha: float | None = None
    eps: float | None = None
    row_damping: float | None = None
    precision: Precision | None = None
    radius: float | None = None
    betas: tuple[float, float] | None = None
    lr: float | None = None
    lr_multiplier: float | None = None
    weight_decay: float | None = None
    heads: Literal["separate", "whole"] | None = None
    pairs: bool | None = None
    backend: Backend | None = None

    def __post_init__(self) -> None:
        if self.rule is not None:
            get_rule(self.rule)
        if self.scale is not None and self.scale not in get_args(Scale):
            raise ConfigError(f"unknown scale {self.scale!r}; known: {', '.join(get_args(Scale))}")
        if self.backend is not None:
            check_backend(self.backend)
        if self.lr is not None and self.lr_multiplier is not None:
            raise ConfigError(f"lr={self.lr} and lr_multiplier={self.lr_multiplier} both set a role's rate; keep one")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rates over optimizer steps: linear warm-up, then constant or decaying. Steps are given, never estimated.

    Args:
        kind: `constant`; `linear` or `cosine` from the peak at the end of the warm-up down to `final_ratio` at
            `total_steps`; `wsd` stays at the peak and falls linearly over the last `decay_steps`.
        warmup_steps: optimizer steps of linear warm-up; step k (from 1) has `k / warmup_steps` of the rate.
        total_steps: optimizer steps until the end of the decay; needed by every kind but `constant`.
        decay_steps: length of the final decay of `wsd`.
        final_ratio: rate at the end as a share of the peak.
    """

    kind: ScheduleKind = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    decay_steps: int | None = None
    final_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear", "cosine", "wsd"):
            raise ConfigError(f"unknown schedule {self.kind!r}; known: 'constant', 'linear', 'cosine', 'wsd'")
        if self.warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps={self.warmup_steps} must not be negative")
        if not 0.0 <= self.final_ratio <= 1.0:
            raise ConfigError(f"schedule.final_ratio={self.final_ratio} must be in [0, 1]")
        if self.kind != "constant" and (self.total_steps is None or self.total_steps <= self.warmup_steps):
            raise ConfigError(
                f"schedule.kind={self.kind!r} needs total_steps greater than warmup_steps={self.warmup_steps}, "
                f"not {self.total_steps}; set schedule.total_steps, for example to trainer.max_steps"
            )
        if self.kind == "wsd" and not 0 < (self.decay_steps or 0) <= (self.total_steps or 0) - self.warmup_steps:
            raise ConfigError(
                f"schedule.kind='wsd' needs decay_steps between 1 and total_steps − warmup_steps, "
                f"not {self.decay_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class SymOptConfig:
    """Which optimizer update every role gets.

    Args:
        stack: a role → rule table: `symmetric` (every block the update of its symmetry), or a published method for
            comparison: `muon`, `polargrad`, `ssd`, `scion`, `adamw`.
        lr: base learning rate; default: the stack's own.
        weight_decay: decoupled decay of all roles but `vector`; default: the stack's own.
        precision: arithmetic of polar factors for all roles.
        roles: overrides by role, such as `{"embedding": RoleConfig(lr_multiplier=3.0)}`.
        schedule: warm-up and decay in optimizer steps.
        backend: by whose kernels steps are computed: `eager` (torch's operations), `cpp` (kernels for CPUs, compiled
            on the machine), `compile` (`torch.compile`), `triton` (kernels for CUDA), `gram-newton-schulz` (the
            package, for polar factors) or `auto`, which is `eager`. The others take over polar factors in bfloat16
            (precision `bf16`, or `auto` on an accelerator) and, but for the package, whole steps of `row_norm` in
            float32; what else there is in a model is computed as `eager` does it (`SymOpt.explain` says which), but a
            backend that cannot run on the device is an error.
        scratch: MiB that a step may borrow for intermediates on each device; larger batches are cut. Default: 256, or
            one matrix where that is more; on a CPU what fits its cache, where that is faster. What the backends
            `compile` and `gram-newton-schulz` need in between is not counted: it is torch's allocator's.
        capturable: make steps that a CUDA graph can capture, see `lit_symopt.capture`: rates become tensors on the
            device, and an error for a non-finite gradient that a replayed step met waits for `SymOpt.check`.

    Raises:
        ConfigError: for an unknown stack, role, rule, scale or backend, naming the known ones.
    """

    stack: StackName = "symmetric"
    lr: float | None = None
    weight_decay: float | None = None
    precision: Precision = "auto"
    roles: dict[str, RoleConfig] = field(default_factory=dict)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    backend: Backend = "auto"
    scratch: float | None = None
    capturable: bool = False

    def __post_init__(self) -> None:
        from lit_symopt.stacks import get_stack

        get_stack(self.stack)
        known = [str(role) for role in Role]
        unknown = [str(role) for role in self.roles if str(role) not in known]
        if unknown:
            raise ConfigError(f"unknown role(s) {', '.join(map(repr, unknown))} in roles; known: {', '.join(known)}")
        if self.precision not in get_args(Precision):
            raise ConfigError(f"unknown precision {self.precision!r}; known: {', '.join(get_args(Precision))}")
        check_backend(self.backend)
        check_scratch(self.scratch)
        if self.lr is not None and not self.lr >= 0.0:
            raise ConfigError(f"lr={self.lr} must not be negative")
