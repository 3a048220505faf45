"""What is compared with one process: a model, the rules on it, a strategy, a number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lit_symopt.config import StackName

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "zero3_init", "fsdp2", "bf16"]
FAMILIES = ("qwen3", "gemma3", "olmoe", "gpt_oss")
STACKS: tuple[StackName, ...] = get_args(StackName)
STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3", "zero3_init", "fsdp2")  # in fp32
STEPS = 20
TOLERANCE = 1e-5  # ‖ΔW‖/‖W‖ of every tensor, in fp32

CONTROL = "torch.optim.AdamW"  # a stack of no rule of ours: what the strategy itself and the harness leave

# Learning rates as multiples of a stack's own, where training these small models at that rate enlarges roundings: two
# runs of one process by ssd, which has no momentum, end 1e-3 apart if their initial weights differ in the last bit; by
# muon at 0.3 of its rate a token of the mixture comes to lie between two experts (3e-3 apart).
RATES = {"muon": 0.2, "polargrad": 0.3, "ssd": 0.1}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is trained, whatever the strategy: the oracle depends on nothing else.

    Attributes:
        family: architecture; see `models.build`.
        stack: name of a stack, `CONTROL`, or a rule of `RULES`.
        micro_batches: of one step, over all ranks.
        clip: the gradient's largest norm; 0 leaves it.
        half: weights in bfloat16, masters and accumulated gradients in fp32.
        steps: optimizer steps.
    """

    family: str
    stack: str
    micro_batches: int = 2
    clip: float = 0.0
    half: bool = False
    steps: int = STEPS


@dataclass(frozen=True, kw_only=True)
class Case:
    """A work under a strategy.

    Attributes:
        work: what is trained.
        strategy: how it is distributed.
        world: ranks; they share the micro-batches of a step, one after another where there are more.
        zero: entries of the `zero_optimization` section of DeepSpeed's configuration.
    """

    work: Work
    strategy: Strategy
    world: int = 2
    zero: tuple[tuple[str, bool | int], ...] = ()

    @property
    def name(self) -> str:
        """For reports: unique among all cases."""
        work = self.work
        parts = [work.family, work.stack, self.strategy, f"{self.world} ranks"]
        parts += [f"accumulating {self.accumulated}"] if self.accumulated > 1 else []
        parts += [f"clipped at {work.clip:g}"] if work.clip else []
        parts += [f"{key}={value}" for key, value in self.zero]
        return " / ".join(parts)

    @property
    def accumulated(self) -> int:
        """Micro-batches of one step on each rank."""
        return self.work.micro_batches // self.world


# Every rule on all matrices of one model, vectors by AdamW: name → options of the matrices' group.
RULES: dict[str, dict[str, object]] = {
    f"rule {rule}{', centered' if centered else ''}{f', {scale}' if scale else ''}": {
        "rule": rule,
        "centered": centered,
        "lr": {"sgd": 0.5, "sign": 1e-3}.get(rule, 2.5e-3),
        **({"scale": scale} if scale else {"scale": "rms"} if rule not in ("sgd", "sign", "adamw") else {}),
        **({"alpha": 1.0, "lr": {"nuclear": 0.1, "row_nuclear": 1e-3}[scale]} if scale else {}),
    }
    for rule, scales in {
        "spectral": ("", "nuclear"),
        "right_spectral": ("", "nuclear"),
        "left_spectral": ("", "nuclear"),
        "row_norm": ("", "nuclear"),
        "row_then_spectral": ("", "row_nuclear"),
        "spectral_then_row": ("",),
        "sgd": ("",),
        "sign": ("",),
        "adamw": ("",),
    }.items()
    for scale in scales
    for centered in (False, True)
}
RULES["rule row_norm, damped"] = {**RULES["rule row_norm"], "row_damping": 0.1}
RULES["rule row_norm, centered, damped"] = {**RULES["rule row_norm, centered"], "row_damping": 0.1}
RULES["rule row_norm, damped, in C++"] = {**RULES["rule row_norm, damped"], "backend": "cpp"}
RULES["rule spectral, nesterov"] = {**RULES["rule spectral"], "momentum_kind": "nesterov"}
RULES["rule spectral, exact"] = {**RULES["rule spectral"], "precision": "exact"}
RULES["rule spectral, without momentum"] = {**RULES["rule spectral"], "momentum": 0.0}


def core() -> Iterator[Case]:
    """What `make test` has time for: every strategy and family, and the stacks with the most rules between them."""
    for strategy in STRATEGIES:
        for family in FAMILIES:
            yield Case(work=Work(family=family, stack="symmetric"), strategy=strategy)
    for strategy in ("ddp", "zero2", "zero3", "fsdp2"):
        yield Case(work=Work(family="olmoe", stack="muon"), strategy=strategy)
        yield Case(work=Work(family="qwen3", stack="rule row_then_spectral, centered"), strategy=strategy)
    in_cpp = Work(family="qwen3", stack="rule row_norm, damped, in C++")
    yield Case(work=in_cpp, strategy="ddp")
    yield Case(work=in_cpp, strategy="zero3")
    yield Case(work=Work(family="qwen3", stack="symmetric", half=True), strategy="bf16")


def families_and_stacks() -> Iterator[Case]:
    """Families × stacks × strategies on two ranks."""
    for strategy in (*STRATEGIES, "bf16"):
        for family in FAMILIES:
            for stack in STACKS:
                work = Work(family=family, stack=stack, half=strategy == "bf16")
                yield Case(work=work, strategy=strategy)


def rules() -> Iterator[Case]:
    """Every rule, centered and not, with every scale of its own kind, on one model."""
    for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
        for rule in RULES:
            yield Case(work=Work(family="qwen3", stack=rule), strategy=strategy)


def three_ranks() -> Iterator[Case]:
    """One family on three ranks: shards that no dimension divides by, and empty ones."""
    for strategy in STRATEGIES:
        for stack in ("symmetric", "muon", "polargrad", "adamw"):
            yield Case(work=Work(family="gpt_oss", stack=stack, micro_batches=3), strategy=strategy, world=3)


def settings() -> Iterator[Case]:
    """Clipping, accumulation, and the ways in which DeepSpeed lays out and reduces its partitions."""
    plain = Work(family="olmoe", stack="polargrad")  # its nuclear scales see the gradient's size
    for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
        yield Case(work=replace(plain, clip=0.1), strategy=strategy)
        yield Case(work=replace(plain, micro_batches=4), strategy=strategy)
    for stage in ("zero1", "zero2"):
        yield Case(work=plain, strategy=stage, zero=(("round_robin_gradients", True),))
        yield Case(work=plain, strategy=stage, zero=(("reduce_scatter", False),))
        yield Case(work=plain, strategy=stage, zero=(("contiguous_gradients", False),))
    # Several sub-groups a parameter group, and parameters that stay whole for the forward pass.
    yield Case(work=plain, strategy="zero3", zero=(("sub_group_size", 500),))
    yield Case(work=plain, strategy="zero3", zero=(("stage3_param_persistence_threshold", 100),))
    yield Case(work=plain, strategy="zero3", zero=(("contiguous_gradients", False),))


def control() -> Iterator[Case]:
    """No rule of ours: what strategies and harness leave by themselves."""
    for strategy in ("ddp", "zero1", "zero2", "zero3", "zero3_init", "fsdp2"):
        for family in FAMILIES:
            yield Case(work=Work(family=family, stack=CONTROL), strategy=strategy)
