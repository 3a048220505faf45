"""Whether two records can be compared: what must be the same for their times to mean the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_symopt.profiling.record import Record


def unlike(before: Record, after: Record, stacks: Sequence[str]) -> list[str]:
    """Why two records should not be compared."""
    found = _differences("device", before.device, after.device, ("name", "type", "threads"))
    found += _differences("", {"torch": before.versions.get("torch")}, {"torch": after.versions.get("torch")})
    found += _differences("", {"processes": before.world}, {"processes": after.world})
    found += _differences("spec", before.spec, after.spec, ("ranks", "record_shapes", "memory"))
    found += _differences("recipe", before.recipe.get("essentials", {}), after.recipe.get("essentials", {}))
    for stack in stacks:
        found += _differences(stack, before.stacks[stack].settings, after.stacks[stack].settings)
    return found


def _differences(
    what: str, before: Mapping[str, Any], after: Mapping[str, Any], keys: Sequence[str] | None = None
) -> list[str]:
    chosen = dict.fromkeys([*before, *after]) if keys is None else keys
    return [
        f"{f'{what}: ' if what else ''}{key} is {before.get(key)!r} in A and {after.get(key)!r} in B"
        for key in chosen
        if before.get(key) != after.get(key)
    ]
