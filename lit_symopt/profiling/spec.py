"""When and what a profile measures, as a YAML file: `profiles/specs/*.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from lit_symopt.errors import ConfigError, ProfileError

_AT_LEAST = {"skip_first": 0, "wait": 0, "warmup": 0, "active": 1, "repeat": 1, "rounds": 1, "threads": 1}


@dataclass(frozen=True, kw_only=True)
class ProfileSpec:
    """The schedule of a profile; the defaults are those of `profiles/specs/laptop.yaml`.

    Each of `rounds` runs trains for `skip_first + repeat · (wait + warmup + active)` optimizer steps, of which
    `repeat` windows of `active` steps are measured.

    Args:
        skip_first: optimizer steps before the first window: allocators, caches and compiled code settle.
        wait: steps without a profiler before each window.
        warmup: steps with a profiler whose events are thrown away, before each window.
        active: steps of a window.
        repeat: windows of a run.
        rounds: runs of each stack, in turn with those of the others (A B A B): a machine that slows down over minutes
            does so for all.
        ranks: which processes are profiled, or `all`.
        record_shapes: keep the shapes of operators; batches of several roles are divided by them.
        memory: keep allocations, from which the scratch of a step follows.
        threads: threads of a process for operators of a CPU (`OMP_NUM_THREADS`); default: as it is here.

    Raises:
        ConfigError: for a number that cannot be.

    Example:
        >>> ProfileSpec(skip_first=0, wait=1, warmup=1, active=3, repeat=2).steps
        10
    """

    skip_first: int = 5
    wait: int = 1
    warmup: int = 1
    active: int = 6
    repeat: int = 4
    rounds: int = 3
    ranks: tuple[int, ...] | Literal["all"] = (0,)
    record_shapes: bool = True
    memory: bool = True
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is None and name == "threads":
                continue
            if not _whole(value) or value < least:
                raise ConfigError(f"{name}={value!r} of a profile must be a whole number, at least {least}")
        for name in ("record_shapes", "memory"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} of a profile must be true or false")
        if self.repeat > 1 and self.wait + self.warmup == 0:
            raise ConfigError(
                f"repeat={self.repeat} windows of a profile need a step between them: set wait or warmup to 1 or more"
            )
        if self.ranks == "all":
            return
        ranks: Any = self.ranks
        if not isinstance(ranks, (list, tuple)) or not ranks or not all(_whole(rank) and rank >= 0 for rank in ranks):
            raise ConfigError(f"ranks={ranks!r} of a profile must be a list of ranks such as [0], or all")
        object.__setattr__(self, "ranks", tuple(ranks))

    @property
    def steps(self) -> int:
        """Optimizer steps of one run."""
        return self.skip_first + self.repeat * (self.wait + self.warmup + self.active)

    @staticmethod
    def from_dict(given: Mapping[str, Any], *, source: str = "a profile's spec") -> ProfileSpec:
        """The spec with these keys.

        Raises:
            ConfigError: for a key that is not known, naming those that are.
        """
        known = [field.name for field in fields(ProfileSpec)]
        unknown = [str(key) for key in given if key not in known]
        if unknown:
            raise ConfigError(f"{source} has unknown key(s) {', '.join(unknown)}; known: {', '.join(known)}")
        try:
            return ProfileSpec(**given)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @staticmethod
    def load(path: str | Path) -> ProfileSpec:
        """Reads a YAML file; what it leaves out is as by default.

        Raises:
            ProfileError: if there is no such file, or it is not a mapping in YAML.
            ConfigError: for a key or a value that cannot be.
        """
        import yaml

        try:
            given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"the spec {path} cannot be read: {error}; see profiles/specs for some") from error
        except yaml.YAMLError as error:
            raise ProfileError(f"the spec {path} is not YAML: {error}") from error
        if not isinstance(given, dict):
            raise ProfileError(f"the spec {path} is not a mapping such as `active: 3`, but {given!r}")
        return ProfileSpec.from_dict(given, source=f"the spec {path}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
