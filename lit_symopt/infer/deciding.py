"""The state while roles are decided: the evidence, blocks so far, and why other parameters have none."""

from __future__ import annotations

from dataclasses import dataclass, field

from lit_symopt.blocks import Block
from lit_symopt.infer.facts import Application, Facts
from lit_symopt.layout import Layout, Stored

Shape = tuple[int, ...]


@dataclass
class Deciding:
    """Blocks decided so far, and why others are not.

    Attributes:
        facts: the evidence.
        shapes: of all parameters, by name.
        blocks: decided, by name.
        reasons: why a parameter is not decided, by name.
        suggestions: the arguments of a Block that would fit a parameter that is not decided, by name.
        plain: maps to logits that enter a plain softmax, which cannot see a shift of them all.
        rows: for a fused projection of queries, keys and values, the rows of each.
    """

    facts: Facts
    shapes: dict[str, Shape]
    blocks: dict[str, Block] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    suggestions: dict[str, str] = field(default_factory=dict)
    plain: set[str] = field(default_factory=set)
    rows: dict[str, dict[str, frozenset[int]]] = field(default_factory=dict)

    def free(self, name: str) -> bool:
        """Whether nothing was decided about a parameter yet."""
        return name not in self.blocks and name not in self.reasons

    def decide(self, block: Block) -> None:
        """Note a block."""
        self.blocks.setdefault(block.name, block)

    def ask(self, name: str, reason: str) -> None:
        """Note why a parameter cannot be decided."""
        self.reasons.setdefault(name, reason)

    def application(self, name: str) -> Application | None:
        """How a parameter is applied as a linear map, if always in the same way."""
        found = self.facts.applications.get(name, [])
        axes = {(each.out_axis, each.in_axis) for each in found}
        return found[0] if len(axes) == 1 else None

    def outputs(self, name: str) -> int:
        """Number of outputs of a linear map."""
        application = self.application(name)
        return 0 if application is None else self.shapes[name][application.out_axis]


def stored(application: Application) -> Stored:
    """Whether stored rows are outputs."""
    return "out_in" if application.out_axis < application.in_axis else "in_out"


def by_rows(application: Application) -> Layout:
    """One matrix whose units are the outputs."""
    way = stored(application)
    return Layout.matrix() if way == "out_in" else Layout.transposed(stored=way)


def by_columns(application: Application) -> Layout:
    """One matrix whose units are the inputs."""
    way = stored(application)
    return Layout.transposed() if way == "out_in" else Layout.matrix(stored=way)


def counts(units: tuple[int, ...] | None) -> bool:
    """Whether units are 0, 1, 2, ... in order."""
    return units is not None and units == tuple(range(len(units)))
