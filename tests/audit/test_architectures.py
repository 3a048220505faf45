"""The audit on tiny instances of architectures: right taxonomies pass, wrong ones do not.

The taxonomies are the hand-written answers of `tests/infer/answers`, never what inference says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import pytest

from lit_symopt.audit import AuditReport, Limits, audit
from lit_symopt.blocks import BlockTaxonomy, Role
from lit_symopt.config import StackName, SymOptConfig
from tests.audit.wrong_answers import WRONG, Changes
from tests.infer.answers.table import answer
from tests.infer.modules import INSTANCES


def audited(name: str, taxonomy: BlockTaxonomy | None = None, *, stack: StackName | None = None) -> AuditReport:
    """The report on an instance, by its answer or by another taxonomy; on its loss alone if no stack is named."""
    instance = INSTANCES[name]
    module = instance.module()
    chosen = answer(name, module) if taxonomy is None else taxonomy
    return audit(
        module,
        instance.batch(),
        taxonomy=chosen,
        config=SymOptConfig(stack=stack or "symmetric"),
        loss_only=stack is None,
        limits=Limits(float64=1e-10 if instance.ours else 1e-7),
    )


def changed(name: str, changes: Changes) -> BlockTaxonomy:
    """The answer with some of its blocks changed, chosen by patterns of their parameters' names."""
    module = INSTANCES[name].module()
    blocks = answer(name, module).assign(module)
    for pattern, change in changes.items():
        assert any(fnmatchcase(block.name, pattern) for block in blocks), f"no {pattern}: nothing would be proved"
        blocks = [replace(block, **change) if fnmatchcase(block.name, pattern) else block for block in blocks]
    return BlockTaxonomy(blocks, name="wrong")


# What does not apply where, by the architecture; everything else must have been tried.
UNTRIED: dict[str, tuple[str, ...]] = {
    "heads": ("bloom",),  # each has a slope of its own
    # Gains of norms of queries and keys that differ within a plane; keys of which a part is shared by all heads.
    "queries and keys": ("qwen3", "gemma3", "olmoe", "deepseek_v3"),
    # The one side of a linear or convolutional block is the stream, the other is not.
    "residual stream": ("mamba", "vit", "bert", "albert", "deepseek_v3", "qwen2_moe"),
}
TRIED: dict[str, tuple[Role, ...]] = {
    "vocabulary": (Role.EMBEDDING, Role.TIED_EMBEDDING, Role.LM_HEAD),
    "neurons": (Role.DOWN, Role.EXPERT_DOWN),
    "experts": (Role.ROUTER,),
    "heads": (Role.ATTENTION_OUT,),
    "values": (Role.ATTENTION_OUT,),
    "queries and keys": (Role.ATTENTION_OUT,),
    "residual stream": (Role.EMBEDDING, Role.TIED_EMBEDDING),
}


# Variants of an instance that is tried by default.
VARIANTS = (
    *("qwen3_tied", "gemma3_capped", "gemma3_untied", "gemma3_untied_capped", "olmoe_router_losses"),
    *("llama_biases", "mixtral_eager", "mixtral_batched", "qwen2_moe", "deepseek_v3_direct"),
    *("gpt2_square", "gptj", "gpt_bigcode", "opt", "glm", "gemma2", "falcon_per_head"),
    *("bert", "albert", "t5_gated", "t5_reglu", "listed_experts_topk_softmax", "misnamed_complex", "tied_by_hand"),
)


def _slow(names: Iterable[str], chosen: Callable[[str], bool]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if chosen(name) else name for name in names]


@pytest.mark.parametrize("name", _slow(INSTANCES, VARIANTS.__contains__))
def test_a_right_taxonomy_passes_and_what_does_not_apply_has_a_reason(name: str) -> None:
    report = audited(name, stack="symmetric")
    assert report.passed, str(report)
    assert report.updates
    assert [row for row in report.loss if row.verdict == "does not apply" and not row.reason] == []
    blocks = answer(name, INSTANCES[name].module()).blocks
    for symmetry, roles in TRIED.items():
        passed = any(row.verdict == "pass" and row.symmetry.startswith(symmetry) for row in report.loss)
        apart = name.startswith(UNTRIED.get(symmetry, ()))
        assert passed == (any(block.role in roles for block in blocks) and not apart), f"{symmetry}\n{report}"
    shifts = [row for row in report.loss if row.symmetry == "shared shift" and row.verdict == "pass"]
    assert bool(shifts) == any(block.symmetry.shift_invariant for block in blocks), str(report)


FEW = ("llama", "gpt2", "mixtral_eager", "bert_masked", "mamba2", "listed_experts_sigmoid")
WITH_ADAMW = (Role.EMBEDDING, Role.LM_HEAD, Role.TIED_EMBEDDING, Role.POSITION, Role.ROUTER)


@pytest.mark.parametrize("stack", ["adamw", "muon"])
@pytest.mark.parametrize("name", _slow(INSTANCES, lambda name: name not in FEW))
def test_the_blocks_whose_updates_do_not_commute_are_named(name: str, stack: StackName) -> None:
    """AdamW is right for vectors alone; Muon uses it at both ends of the model, in tables and in routers."""
    report = audited(name, stack=stack)
    module = INSTANCES[name].module()
    blocks = [block for block in answer(name, module).assign(module) if block.role is not Role.VECTOR]
    failed = {block for row in report.updates if row.verdict == "FAIL" for block in row.blocks}
    assert failed == {block.name for block in blocks if stack == "adamw" or block.role in WITH_ADAMW}
    assert not report.passed


@pytest.mark.parametrize("case", _slow(WRONG, lambda case: WRONG[case].repeats))
def test_a_wrong_taxonomy_is_caught(case: str) -> None:
    wrong = WRONG[case]
    report = audited(wrong.name, changed(wrong.name, wrong.changes))
    assert not report.passed, str(report)
