"""When windows of a profile are taken, in steps."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lit_symopt.errors import ConfigError

_AT_LEAST = {"skip_first": 0, "wait": 0, "warmup": 0, "active": 1, "repeat": 1}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When windows are taken, in steps.

    Args:
        skip_first: before everything else, once.
        wait: before each window, without a profiler.
        warmup: before each window, with a profiler that records nothing.
        active: of a window.
        repeat: windows; between two of them there is a step without a recording at least.

    Raises:
        ConfigError: for a number that cannot be.

    Example:
        >>> Schedule(wait=10, warmup=2, active=3, repeat=2).steps
        30
    """

    skip_first: int = 0
    wait: int = 10
    warmup: int = 2
    active: int = 3
    repeat: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), _AT_LEAST[field.name]
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{field.name}={value!r} of a profile must be a whole number, at least {least}")
        if self.repeat > 1 and self.wait + self.warmup == 0:
            # A range that is open when one recording ends and the next begins would crash torch.
            raise ConfigError(
                f"repeat={self.repeat} windows of a profile need a step between them: set warmup or wait to 1, or "
                "repeat to 1 and active higher"
            )

    @property
    def steps(self) -> int:
        """Steps until the last window is whole."""
        return self.skip_first + self.repeat * (self.wait + self.warmup + self.active)

    def too_long_for(self, steps: float, limit: str) -> str | None:
        """What `steps` are too few for, in words; `None` if every window is whole by then.

        Args:
            steps: how many there will be.
            limit: what says so, such as `max_steps=20`.

        Example:
            >>> Schedule(wait=10, warmup=2, active=3).too_long_for(12, "max_steps=12")[:63]
            'no window becomes active: skip_first=0 + wait=10 + warmup=2 + a'
        """
        if steps >= self.steps:
            return None
        before, window = self.skip_first + self.wait + self.warmup, self.wait + self.warmup + self.active
        whole = max(0, int(steps) - self.skip_first) // window
        sum_ = (
            f"skip_first={self.skip_first} + wait={self.wait} + warmup={self.warmup} + active={self.active} = "
            f"{before + self.active} steps until the first window is whole, and {limit} leaves {int(steps)}"
        )
        if steps <= before:
            return f"no window becomes active: {sum_}. Lower wait, warmup or skip_first"
        if not whole:
            return f"the first window is cut short: {sum_}. Lower wait, warmup or active"
        return (
            f"{whole} of repeat={self.repeat} windows will be whole: all of them take {self.steps} steps, and {limit} "
            f"leaves {int(steps)}"
        )
