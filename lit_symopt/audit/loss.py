"""The proof by the loss: every declared symmetry acts on live weights, beside a broken version of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from torch import Generator, nn

from lit_symopt.audit import attention, experts, residual
from lit_symopt.audit.laboratory import Changes, Laboratory, Limits
from lit_symopt.audit.moves import Move, Refusal
from lit_symopt.audit.neurons import neurons
from lit_symopt.audit.report import LossFinding, Verdict
from lit_symopt.audit.shifts import shifts
from lit_symopt.audit.sites import Anatomy, gates_heads
from lit_symopt.audit.vocabulary import padding, vocabulary
from lit_symopt.blocks import SYMMETRIES, Role

CONTROLS = 3
"""How many broken elements are tried at most."""

Made = Sequence[Move | Refusal]
Maker = Callable[[Generator], Made]


def prove(laboratory: Laboratory, model: Anatomy, module: nn.Module, *, seed: int) -> list[LossFinding]:
    """Every symmetry on every kind of site."""
    buffers = experts.untrained(model, module)
    makers: list[Maker] = [
        lambda g: neurons(model, g),
        lambda g: experts.experts(model, g, buffers=buffers),
        lambda g: attention.attention(model, g, module),
        lambda g: shifts(model, g),
    ]
    found = _vocabulary(laboratory, model, module, seed)
    found += [finding for maker in makers for finding in _findings(laboratory, maker, seed)]
    found += _partnerless(model)
    found = _grouped_experts(laboratory, found, model, buffers, seed)
    found = _told_apart(laboratory, found, model, seed)
    return [*found, *_residual(laboratory, model, module, seed)]


def _vocabulary(laboratory: Laboratory, model: Anatomy, module: nn.Module, seed: int) -> list[LossFinding]:
    """All ids; where that fails, those that a module does not tell apart, and heads that score some ids only."""
    evaluator, ends = laboratory.single, model.of(Role.EMBEDDING, Role.TIED_EMBEDDING, Role.LM_HEAD)

    def tried(fixed: frozenset[int], *, joined: bool) -> list[LossFinding]:
        tables = evaluator.token_tables
        return _findings(laboratory, lambda g: vocabulary(model, g, tables=tables, fixed=fixed, joined=joined), seed)

    everything = tried(frozenset(), joined=False)
    if all(finding.verdict != "FAIL" for finding in everything):
        return everything
    pads, most = padding(module), max(max(block.shape or (0,)) for block in ends)
    padded, nothing = f"the module tells padding apart: {sorted(pads)} stay", frozenset[int]()
    other = "the head scores another number of ids than the embedding has"
    chosen: list[tuple[frozenset[int], bool, str]] = [(nothing, True, other)]
    if pads:
        chosen = [(pads, False, padded), *chosen, (pads, True, f"{padded}; {other}")]
    chosen.append((pads | evaluator.absent(most), True, "the module uses ids that the batch does not hold: they stay"))
    for fixed, joined, reason in chosen:
        found = tried(fixed, joined=joined)
        acted = any(finding.tried and finding.site == "vocabulary" for finding in found)
        if acted and all(finding.verdict != "FAIL" for finding in found):
            return [replace(f, reason="; ".join(filter(None, (f.reason, reason if f.tried else "")))) for f in found]
    return everything


def _partnerless(model: Anatomy) -> list[LossFinding]:
    """Blocks of a joint role with nothing to act jointly with: another role is missing, or theirs is wrong."""
    found: dict[str, list[str]] = {}
    gates = [block.name for block in model.lost if gates_heads(block)]
    for block in (block for block in model.lost if block.name not in gates):
        found.setdefault(str(block.role), []).append(block.name)
    return [
        LossFinding(
            symmetry="joint action",
            site=role,
            where=names[0],
            sites=len(names),
            verdict="FAIL",
            reason=f"role {role} acts jointly with {', '.join(SYMMETRIES[Role(role)].joint)}; no module around it has "
            "blocks of these roles that belong to it",
        )
        for role, names in found.items()
    ] + [
        LossFinding(
            symmetry="joint action",
            site=str(Role.LINEAR),
            where=name,
            verdict="FAIL",
            reason=f"{name!r} declares rows for each head, and which attention's they are cannot be told",
        )
        for name in gates
    ]


def _findings(laboratory: Laboratory, maker: Maker, seed: int) -> list[LossFinding]:
    """One finding for each symmetry and kind of site that a maker makes moves or refusals for."""
    made = maker(Generator().manual_seed(seed))
    kinds = dict.fromkeys((move.symmetry, move.site) for move in made if isinstance(move, Move))
    found = [_tried(laboratory, _Draws(maker, seed, *kind)) for kind in kinds]
    refusals: dict[tuple[str, str, str], list[Refusal]] = {}
    for refusal in (refusal for refusal in made if isinstance(refusal, Refusal)):
        reason = refusal.reason.replace(refusal.where, "…") if refusal.where else refusal.reason
        refusals.setdefault((refusal.symmetry, refusal.site, reason), []).append(refusal)
    for of in refusals.values():
        verdict: Verdict = "FAIL" if of[0].fails else "does not apply"
        found.append(
            LossFinding(
                symmetry=of[0].symmetry,
                site=of[0].site,
                where=of[0].where,
                sites=len(of),
                verdict=verdict,
                reason=of[0].reason,
            )
        )
    return found


class _Draws:
    """Elements of one symmetry on one kind of site: `draws[n]` is the n-th, a move for each site."""

    def __init__(self, maker: Maker, seed: int, symmetry: str, site: str) -> None:
        self.maker, self.seed, self.symmetry, self.site = maker, seed, symmetry, site

    def __getitem__(self, number: int) -> list[Move]:
        made = self.maker(Generator().manual_seed(self.seed + number))
        moves = [move for move in made if isinstance(move, Move)]
        return [move for move in moves if (move.symmetry, move.site) == (self.symmetry, self.site)]


def _tried(laboratory: Laboratory, draws: _Draws) -> LossFinding:
    """All sites at once for each element; one by one where that fails, to name the worst. Controls one by one."""
    elements = [draws[number] for number in range(laboratory.elements)]
    first = elements[0][0]
    finding = LossFinding(
        symmetry=first.symmetry,
        site=first.site,
        where=first.where,
        sites=len(elements[0]),
        tried=len(elements),
        verdict="pass",
    )
    limits = laboratory.limits
    try:
        results = [(laboratory.changes(_joint(moves)), moves) for moves in elements]
        worst, moves = max(results, key=lambda result: _rank(result[0].excess))
        notes = [changes.note for changes, _ in results if changes.note]
        finding = replace(finding, fp32=max(c.fp32 for c, _ in results), float64=_largest(c for c, _ in results))
        if not worst.excess <= 1:
            if len(moves) > 1:
                single = [(laboratory.changes(move), move) for move in moves]
                worst, move = max(single, key=lambda result: _rank(result[0].excess))
                finding = replace(finding, where=move.where)
            return replace(finding, verdict="FAIL", reason=_why(worst, limits))
        controls = _controls(laboratory, draws)
    except (ValueError, RuntimeError, IndexError, KeyError) as error:
        # Blocks whose declared shapes agree, and which still cannot be acted on together.
        reason = f"the element cannot act: {type(error).__name__}: {str(error).splitlines()[0]}"
        return replace(finding, verdict="FAIL", reason=reason)
    control, where, _ = min(controls)
    beyond = max(change for _, _, change in controls)
    finding = replace(finding, control=control, where=where, reason="; ".join(dict.fromkeys(notes)))
    if not beyond <= laboratory.limit:
        reason = f"the loss moves by {beyond:.1e} in {laboratory.deciding} where the site has more weight"
        return replace(finding, verdict="FAIL", reason=reason)
    if not control > limits.control:
        reason = f"the broken element moves the loss by {control:.1e} only: the test proves nothing here"
        return replace(finding, verdict="inconclusive", reason=reason)
    return finding


def _controls(laboratory: Laboratory, draws: _Draws) -> list[tuple[float, str, float]]:
    """For each site the change of the loss by its broken element, its name, and what `Laboratory.control` adds.

    A mean over many tokens hardly moves if some lose what others win, so up to `CONTROLS` elements are broken until
    one of them shows.
    """
    found: list[tuple[float, str, float]] = []
    for number in range(CONTROLS):
        weak = [index for index, (control, _, _) in enumerate(found) if not control > laboratory.limits.control]
        if number > 0 and not weak:
            break
        moves = draws[number]
        if number == 0:
            found = [(-1.0, move.where, 0.0) for move in moves]
            weak = list(range(len(moves)))
        for index in weak:
            control, beyond = laboratory.control(moves[index], _joint(moves))
            found[index] = (max(found[index][0], control), moves[index].where, max(found[index][2], beyond))
    return found


def _joint(moves: Sequence[Move]) -> Move:
    if len(moves) == 1:
        return moves[0]
    edits = {name: edit for move in moves for name, edit in move.edits.items()}
    return replace(moves[0], edits=edits, keep=frozenset().union(*(move.keep for move in moves)))


def _rank(value: float) -> float:
    """Not a number is worse than everything."""
    return value if value == value else float("inf")


def _largest(changes: Iterable[Changes]) -> float | None:
    found = [of.float64 for of in changes if of.float64 is not None]
    return max(found, default=None)


def _why(changes: Changes, limits: Limits) -> str:
    if changes.float64 is None:
        return f"the loss moves by {changes.fp32:.1e} in fp32"
    if changes.float64 <= limits.float64:
        return f"fp32 moves by {changes.fp32:.1e}, float64 does not: a loss of precision, not of symmetry"
    return f"the loss moves by {changes.float64:.1e} in float64"


def _grouped_experts(
    laboratory: Laboratory, found: list[LossFinding], model: Anatomy, buffers: dict[str, tuple[int, ...]], seed: int
) -> list[LossFinding]:
    """Where not every permutation of experts is allowed, those that keep groups of them together may be."""
    failed = next((f for f in found if f.symmetry == experts.SYMMETRY and f.verdict == "FAIL" and f.tried), None)
    if failed is None:
        return found
    for groups in experts.divisors(model):
        tried = _findings(laboratory, lambda g, n=groups: experts.experts(model, g, buffers=buffers, groups=n), seed)  # type: ignore[misc]
        if tried and all(finding.verdict == "pass" for finding in tried if finding.tried):
            reason = f"routing keeps {groups} groups of experts apart: only permutations of and in groups are left"
            refused = replace(failed, verdict="does not apply", reason=reason, fp32=None, float64=None, tried=0)
            grouped = [replace(finding, symmetry=f"experts in {groups} groups") for finding in tried if finding.tried]
            return [*(finding for finding in found if finding is not failed), refused, *grouped]
    return found


def _told_apart(laboratory: Laboratory, found: list[LossFinding], model: Anatomy, seed: int) -> list[LossFinding]:
    """Heads whose projections belong together, as the other two symmetries show, and which cannot change places.

    Either they are pieces of larger heads, which larger maps of the values show, or something tells them apart.
    """
    failed = next((f for f in found if f.symmetry == attention.HEADS and f.verdict == "FAIL" and f.tried), None)
    others = [f for f in found if f.symmetry.startswith((attention.VALUES, attention.SCORES))]
    if failed is None or len(others) < 2 or not all(f.verdict == "pass" for f in others) or attention.marked(model):
        return found
    for times in attention.multiples(model):
        larger = attention.coarser(model, Generator().manual_seed(seed), times=times)
        if larger and laboratory.changes(_joint(larger)).excess <= 1:
            reason = f"maps of {times} heads together leave the loss as it is: heads are {times} times as large"
            return [replace(f, reason=reason) if f is failed else f for f in found]
    reason = (
        "the heads cannot change places, although each one's query, key, value and output belong together: something "
        "outside the blocks tells them apart, such as ALiBi's slopes"
    )
    refused = replace(failed, verdict="does not apply", reason=reason)
    return [refused if finding is failed else finding for finding in found]


def _residual(laboratory: Laboratory, model: Anatomy, module: nn.Module, seed: int) -> list[LossFinding]:
    kinds, left_out = residual.kinds(model, module)
    found = []
    for kind in kinds:
        found += _findings(laboratory, lambda g, k=kind: [residual.residual(model, g, module, kind=k)], seed)  # type: ignore[misc]
        if found[0].tried == 0:
            return found
    signed = next((f for f in found if f.verdict == "FAIL" and f.symmetry.endswith(": signed permutations")), None)
    if signed is not None:
        tried = _findings(laboratory, lambda g: [residual.residual(model, g, module, kind="permutations")], seed)
        if all(finding.verdict == "pass" for finding in tried):
            reason = "something in the stream tells signs apart, such as a mean that is subtracted"
            return [replace(signed, verdict="does not apply", reason=reason), *tried]
    refused = [
        LossFinding(
            symmetry=refusal.symmetry, site=refusal.site, where="", verdict="does not apply", reason=refusal.reason
        )
        for refusal in left_out
    ]
    return [*found, *refused]
