"""What a study compares, as a YAML file: `configs/studies/*.yaml`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from lit_symopt.errors import ConfigError
from lit_symopt.study.checks import (
    check_name,
    check_option,
    check_set,
    check_whole,
    listed,
    number,
    refuse_repeated,
    refuse_unknown,
)

Sampler = Literal["grid", "gp", "tpe", "random"]
_ROLE = re.compile(r"model\.(?:init_args\.)?symopt\.roles\.(\w+)\.(\w+)")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One option of a search: a range on a logarithmic scale, or values.

    Args:
        option: as of `lit-symopt fit`, without dashes.
        start: middle of the range, tried first.
        span: the range is `[start / span, start · span]`.
        values: instead of a range, what a grid tries.
        families: only in these; default: in all.
    """

    option: str
    start: float | None = None
    span: float | None = None
    values: tuple[float, ...] | None = None
    families: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        where = f"search of {self.option}"
        check_option(self.option, where)
        if (self.values is None) == (self.start is None) or (self.start is None) != (self.span is None):
            raise ConfigError(f"{where}: give either {{start: ..., span: ...}} or {{values: [...]}}")
        if self.values is not None:
            values = tuple(number(value, f"values of {where}") for value in listed(self.values, f"values of {where}"))
            object.__setattr__(self, "values", values)
        else:
            start, span = number(self.start, f"start of {where}"), number(self.span, f"span of {where}")
            if start <= 0:
                raise ConfigError(f"start={start} of {where} must be positive: the range is a logarithmic one")
            if span <= 1:
                raise ConfigError(f"span={span} of {where} must be above 1: the range is [start/span, start·span]")
            object.__setattr__(self, "start", start)
            object.__setattr__(self, "span", span)

    @property
    def low(self) -> float:
        """The smallest value that may be tried."""
        if self.values is not None:
            return min(self.values)
        assert self.start is not None
        assert self.span is not None
        return self.start / self.span

    @property
    def high(self) -> float:
        """The largest value that may be tried."""
        if self.values is not None:
            return max(self.values)
        assert self.start is not None
        assert self.span is not None
        return self.start * self.span

    def holds_in(self, family: str) -> bool:
        """Whether it is searched in a family."""
        return self.families is None or family in self.families


@dataclass(frozen=True, kw_only=True)
class Search:
    """How rates are searched, alike for all contenders.

    Args:
        sampler: `grid` (all combinations of values), `gp` (Gaussian process), `tpe` or `random`.
        trials: of each contender in each family; not for `grid`.
        seed: of the runs, not among the final ones.
    """

    sampler: Sampler = "gp"
    trials: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if self.sampler not in get_args(Sampler):
            raise ConfigError(f"search.sampler={self.sampler!r} is unknown; known: {', '.join(get_args(Sampler))}")
        if self.sampler == "grid" and self.trials is not None:
            raise ConfigError(
                f"search.trials={self.trials} has no meaning with sampler grid, which tries "
                "all combinations; leave it out"
            )
        if self.sampler != "grid":
            check_whole(self.trials, "search.trials", least=1)
        check_whole(self.seed, "search.seed", least=0)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A recipe that contenders are compared on.

    Args:
        name: in names of runs.
        config: the recipe's file, relative to the working directory.
        set: options over the recipe.
        callbacks: of its runs, after those of the study.
    """

    name: str
    config: str
    set: Mapping[str, Any] = field(default_factory=dict)
    callbacks: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        where = f"families.{self.name}"
        check_name(self.name, "family")
        config: Any = self.config
        if not isinstance(config, str) or not config:
            raise ConfigError(f"{where}: config={self.config!r} must be the path of a recipe")
        check_set(self.set, f"{where}.set")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An optimizer with its settings, and what is searched.

    Args:
        name: in names of runs.
        set: options over those of study and family.
        search: what is searched; nothing: no trials.
        lengths: of the final runs, as shares of the study's steps.
        families: only in these; default: in all.
    """

    name: str
    set: Mapping[str, Any] = field(default_factory=dict)
    search: tuple[Axis, ...] = ()
    lengths: tuple[float, ...] = (1.0,)
    families: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        where = f"contenders.{self.name}"
        check_name(self.name, "contender")
        check_set(self.set, f"{where}.set")
        lengths = tuple(number(length, f"{where}.lengths") for length in listed(self.lengths, f"{where}.lengths"))
        if any(length <= 0 for length in lengths):
            raise ConfigError(f"{where}.lengths={list(lengths)}: lengths are positive shares of the study's steps")
        object.__setattr__(self, "lengths", lengths)
        both = [axis.option for axis in self.search if axis.option in self.set]
        if both:
            raise ConfigError(f"{where}: {both[0]} is in both set and search; keep one")
        shorts = [short_name(axis.option) for axis in self.search]
        refuse_repeated(shorts, f"{where}.search: short names of options")

    def axes(self, family: str) -> tuple[Axis, ...]:
        """What is searched in a family."""
        return tuple(axis for axis in self.search if axis.holds_in(family))


@dataclass(frozen=True, kw_only=True)
class Study:
    """A grid of runs.

    Args:
        name: of the default folder, `runs/studies/<name>`.
        families, contenders: what is combined.
        steps: optimizer steps of a run of length 1.
        seeds: of the final runs.
        warmup: share of a run's steps in which rates rise.
        set: options of all runs, over the recipe.
        search: how rates are searched; needed where a contender searches.
        reference: the contender that others are compared with.
        record: logged tags to keep.
        looks: validations during a run.
        look_batches: batches of each of them, evenly spread over the validation set.
        callbacks: of all runs, as in `trainer.callbacks` of a recipe.

    Raises:
        ConfigError: for what does not fit together, naming it.
    """

    name: str
    families: tuple[Family, ...]
    contenders: tuple[Contender, ...]
    steps: int
    seeds: tuple[int, ...]
    warmup: float = 0.1
    set: Mapping[str, Any] = field(default_factory=dict)
    search: Search | None = None
    reference: str | None = None
    record: tuple[str, ...] = ()
    looks: int = 10
    look_batches: int = 8
    callbacks: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name, "study")
        if not self.families or not self.contenders:
            raise ConfigError("a study needs at least one entry of families and one of contenders")
        families, contenders = [one.name for one in self.families], [one.name for one in self.contenders]
        refuse_repeated(families, "families")
        refuse_repeated(contenders, "contenders")
        check_whole(self.steps, "steps", least=1)
        check_whole(self.looks, "looks", least=1)
        check_whole(self.look_batches, "look_batches", least=1)
        if not 0.0 <= number(self.warmup, "warmup") < 1.0:
            raise ConfigError(f"warmup={self.warmup} must be a share of the steps: at least 0 and below 1")
        for seed in listed(self.seeds, "seeds"):
            check_whole(seed, "seeds", least=0)
        refuse_repeated(self.record, "record")
        check_set(self.set, "set")
        for contender in self.contenders:
            for where, named in (
                (f"contenders.{contender.name}.families", contender.families),
                *((f"families of the search of {axis.option}", axis.families) for axis in contender.search),
            ):
                if named is not None:
                    refuse_unknown(listed(named, where), families, where)
        if self.reference is not None:
            refuse_unknown([self.reference], contenders, "reference")
        self._check_search()

    def _check_search(self) -> None:
        searching = [contender for contender in self.contenders if contender.search]
        if not searching:
            return
        if self.search is None:
            raise ConfigError(
                f"contenders.{searching[0].name} has a search but the study none; add "
                "search: {sampler: gp, trials: 12, seed: 1}"
            )
        if self.search.seed in self.seeds:
            raise ConfigError(
                f"seed {self.search.seed} is that of the search and one of the final seeds {list(self.seeds)}: "
                "rates would be judged by the run that chose them; take another one"
            )
        grid = self.search.sampler == "grid"
        for contender in searching:
            for axis in contender.search:
                if grid != (axis.values is not None):
                    raise ConfigError(
                        f"contenders.{contender.name}: the sampler {self.search.sampler} needs "
                        f"{'{values: [...]}' if grid else '{start: ..., span: ...}'} for {axis.option}"
                    )

    def family(self, name: str) -> Family:
        """The family of that name."""
        return next(family for family in self.families if family.name == name)

    def contender(self, name: str) -> Contender:
        """The contender of that name."""
        return next(contender for contender in self.contenders if contender.name == name)

    def pairs(self) -> list[tuple[Family, Contender]]:
        """Every family with every contender that takes part in it."""
        return [
            (family, contender)
            for family in self.families
            for contender in self.contenders
            if contender.families is None or family.name in contender.families
        ]

    def to_dict(self) -> dict[str, Any]:
        """All that it consists of as plain types, names as keys; equal for equal studies."""
        plain = asdict(self)
        for key, name in (("families", "name"), ("contenders", "name")):
            plain[key] = {entry.pop(name): entry for entry in plain[key]}
        for contender in plain["contenders"].values():
            contender["search"] = {axis.pop("option"): axis for axis in contender["search"]} or None
        found: dict[str, Any] = _lists(plain)
        return found


def short_name(option: str) -> str:
    """What an option is called in names of runs and columns of tables.

    Example:
        >>> short_name("model.symopt.lr"), short_name("model.symopt.roles.lm_head.lr_multiplier")
        ('lr', 'lm_head')
        >>> short_name("model.symopt.roles.lm_head.row_damping")
        'lm_head_row_damping'
    """
    match = _ROLE.fullmatch(option)
    if match:
        role, key = match.groups()
        return role if key == "lr_multiplier" else f"{role}_{key}"
    return option.rsplit(".", 1)[-1]


def _lists(value: Any) -> Any:
    """The same with lists for tuples, as YAML has them."""
    if isinstance(value, Mapping):
        return {key: _lists(one) for key, one in value.items()}
    return [_lists(one) for one in value] if isinstance(value, list | tuple) else value
