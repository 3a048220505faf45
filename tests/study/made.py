"""A study whose runs are computed instead of trained: losses fall as in training, and know their best rates."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path

from lit_symopt.study.plan import Run, finals, trial
from lit_symopt.study.result import Result
from lit_symopt.study.spec import Axis, Contender, Family, Search, Study

LR = "model.symopt.lr"
EMBEDDING = "model.symopt.roles.embedding.lr_multiplier"
HEAD = "model.symopt.roles.lm_head.lr_multiplier"
TAG = "router/load_cv"
TOKENS_A_STEP = 2048
# Loss at the end with the best rates, seconds a step, and where the best rates lie, in spans from the start.
CONTENDERS = {
    "adamw": (3.19, 0.118, {LR: 0.3, EMBEDDING: -0.4, HEAD: 0.1}),
    "muon": (3.12, 0.152, {LR: -0.35, EMBEDDING: 0.3, HEAD: -0.2}),
    "symmetric": (3.05, 0.147, {LR: 0.1, EMBEDDING: 0.5, HEAD: 0.4}),
}
STARTS = {LR: 5e-3, EMBEDDING: 10.0, HEAD: 1.0}
SPAN = 8.0


def study(
    *,
    sampler: str = "random",
    trials: int = 12,
    families: tuple[str, ...] = ("qwen3", "gemma3", "olmoe", "gpt_oss"),
    names: tuple[str, ...] = tuple(CONTENDERS),
    seeds: tuple[int, ...] = (2, 3, 4),
    search_seed: int = 1,
) -> Study:
    """All contenders over three rates; of tied embeddings there is no head."""
    untied = tuple(name for name in families if name != "gemma3") or None
    axes = tuple(
        Axis(option=option, start=start, span=SPAN, families=untied if option == HEAD else None)
        for option, start in STARTS.items()
    )
    return Study(
        name="made",
        families=tuple(Family(name=name, config=f"configs/{name}_tiny.yaml") for name in families),
        contenders=tuple(
            Contender(
                name=name,
                set={"model.symopt.stack": name},
                search=axes,
                lengths=(1.0,) if name == "adamw" else (1.0, 0.8, 0.65, 0.5),
            )
            for name in names
        ),
        steps=400,
        seeds=seeds,
        search=Search(sampler=sampler, trials=trials, seed=search_seed),  # type: ignore[arg-type]
        reference="adamw" if "adamw" in names else None,
        record=(TAG,),
    )


def loss_of(run: Run) -> float | None:
    """A quadratic in the logarithms of the rates, a cliff at high rates, and noise by seed; `None`: diverged."""
    least, _, place = CONTENDERS[run.contender]
    noise = random.Random(f"{run.family}/{run.contender}/{run.seed}/{run.length}").gauss(0.0, 0.008)
    off = {
        option: math.log(max(rate, 1e-3) / STARTS[option], SPAN) - place[option] for option, rate in run.rates.items()
    }
    if off.get(LR, 0.0) > 0.6:
        return None
    easier = {"gemma3": 0.15, "gpt_oss": -0.1}.get(run.family, 0.0)
    rough = sum(weight * off.get(option, 0.0) ** 2 for option, weight in ((LR, 0.5), (EMBEDDING, 0.2), (HEAD, 0.1)))
    cliff = 4.0 * max(0.0, off.get(LR, 0.0) - 0.4)
    return least + easier + rough + cliff + 0.35 * (1.0 / math.sqrt(run.length) - 1.0) + noise


def result(run: Run) -> Result:
    """What the run would leave."""
    loss = loss_of(run)
    _, seconds, _ = CONTENDERS[run.contender]
    noise = random.Random(run.name)
    seconds *= 1.0 + noise.uniform(-0.04, 0.04)

    def at(step: int) -> float:
        return (loss or 3.0) + 5.2 * math.exp(-7.0 * step / run.steps) + 0.5 * (1 - step / run.steps) ** 2

    def points(every: int, spread: float) -> tuple[tuple[int, int, float, float], ...]:
        last = run.steps if loss is not None else run.steps // 4
        return tuple(
            (step, step * TOKENS_A_STEP, step * seconds, at(step) + noise.gauss(0, spread))
            for step in range(every, last + 1, every)
        )

    level = {"adamw": 0.9, "muon": 0.6, "symmetric": 0.4}[run.contender]
    routed = run.family in ("olmoe", "gpt_oss")
    load = tuple(
        (step, level * (0.4 + math.exp(-3 * step / run.steps)) + noise.gauss(0, 0.02))
        for step in range(10, run.steps + 1, 10)
    )
    return Result(
        run=run.name,
        study="made",
        family=run.family,
        contender=run.contender,
        stack=run.contender,
        purpose=run.purpose,
        seed=run.seed,
        length=run.length,
        steps=run.steps,
        rates=run.rates,
        options={"model.symopt.stack": run.contender, **run.rates},
        status="finished" if loss is not None else "diverged",
        loss=loss,
        tokens=run.steps * TOKENS_A_STEP,
        seconds=run.steps * seconds,
        wall_seconds=run.steps * seconds + 14.0,
        parameters=2_000_000,
        curve=points(max(1, run.steps // 10), 0.01),
        train=points(max(1, run.steps // 50), 0.05),
        records={TAG: load} if routed else {},
        environment={"torch": "2.13.0", "python": "3.11.9", "machine": "x86_64", "threads": 1, "commit": "0123abc"},
    )


def write(run: Run, folder: Path) -> Result:
    """The run's result, as a file of the study."""
    made = result(run)
    run.folder(folder).mkdir(parents=True)
    made.save(run.folder(folder))
    return made


def trials(study: Study, *, family: str, contender: str) -> list[Run]:
    """Trials at random rates, the first at the start."""
    assert study.search is not None
    draw = random.Random(f"{family}/{contender}")
    axes = study.contender(contender).axes(family)
    factors = [[1.0] * len(axes)]
    factors += [[SPAN ** draw.uniform(-1, 1) for _ in axes] for _ in range((study.search.trials or 1) - 1)]
    return [trial(study, family=family, contender=contender, rates=_rates(axes, each)) for each in factors]


def best_trial(runs: list[Run]) -> Mapping[str, float]:
    """The rates of the lowest loss, by the formula."""
    return min(runs, key=lambda run: loss_of(run) or math.inf).rates


def write_all(study: Study, folder: Path) -> list[Result]:
    """All runs of the study."""
    found: list[Result] = []
    for family, contender in study.pairs():
        names = {"family": family.name, "contender": contender.name}
        tried = trials(study, **names)
        runs = [*tried, *finals(study, **names, rates=best_trial(tried))]
        found.extend(write(run, folder) for run in runs)
    return found


def _rates(axes: tuple[Axis, ...], factors: list[float]) -> dict[str, float]:
    return {
        axis.option: float(f"{(axis.start or 1.0) * factor:.3g}") for axis, factor in zip(axes, factors, strict=True)
    }
