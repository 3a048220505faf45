"""How far a run has come, for a run that accumulates another number of batches per step."""

from __future__ import annotations

from typing import Any

ACCUMULATED = "accumulate_grad_batches"  # where a checkpoint says what its run did


def restate_progress(checkpoint: dict[str, Any], accumulated: int) -> None:
    """Restate the batches that a checkpoint counts as those of a run that accumulates `accumulated` of them a step.

    Whoever moves a run to fewer processes accumulates more batches, to keep the batch of a step. The Trainer takes a
    step whenever its count of batches is a multiple of what is accumulated, so that with the count of the earlier run
    steps begin amid one: six steps of 2 batches each, twelve in all, are 36 of 6 each. After a number of steps that
    does not fit by accident, the first step of the resumed run would be one of too few batches, and all later ones
    would be cut elsewhere.

    Nothing changes for a checkpoint that does not say what its run accumulated.

    Args:
        checkpoint: what a Trainer has saved; its `loops` are changed.
        accumulated: `accumulate_grad_batches` of the run that resumes.

    Example:
        >>> batches = {"ready": 10, "started": 10, "processed": 10, "completed": 9}
        >>> progress = {"total": dict(batches), "current": dict(batches), "is_last_batch": False}
        >>> checkpoint = {"accumulate_grad_batches": 2, "loops": {"fit_loop": {"epoch_loop.batch_progress": progress}}}
        >>> restate_progress(checkpoint, 6)
        >>> progress["current"]
        {'ready': 30, 'started': 30, 'processed': 30, 'completed': 29}
    """
    before = checkpoint.get(ACCUMULATED, accumulated)
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    if progress is None or before == accumulated:
        return
    for counted in (progress["total"], progress["current"]):
        shift = counted["ready"] // before * accumulated - counted["ready"]
        for event in counted:
            counted[event] += shift  # a batch whose end is not yet counted stays so
    checkpoint[ACCUMULATED] = accumulated
