"""How large the logits of a language model's head are, on the training batches themselves.

Shape legend:  N looks, H heads, V vocabulary, B bins.
"""

from __future__ import annotations

import lightning as L
import numpy as np
from torch import Tensor

from lit_symopt.blocks import BlockTaxonomy
from lit_symopt.callbacks.batch_looks import BatchLooks
from lit_symopt.callbacks.looks import as_array
from lit_symopt.callbacks.probe import is_probing
from lit_symopt.errors import ConfigError
from lit_symopt.metrics.heads import Head, HeadWatch, find_heads
from lit_symopt.metrics.histogram import edges
from lit_symopt.metrics.logits import LogitStatistics, sample_positions


class LogitNorms(BatchLooks):
    """Logs how large the logits are, how far they drift along the shift that a loss cannot see, and how sure they are.

    Over sampled positions t of one optimizer step (of every micro-batch and every rank), with the logits `z_tv`, the
    centered ones `c_tv = z_tv − mean_v z_tv` and `p_t = softmax(z_t)`:

    | tag | formula | range | unit |
    |---|---|---|---|
    | `logits/rms`, `logits/max` | `√(mean_tv z²)`, `max_tv |z|` | ≥ 0 | logits |
    | `logits/centered_rms`, `logits/centered_max` | `√(mean_tv c²)`, `max_tv |c|` | ≥ 0 | logits |
    | `logits/logsumexp` | `mean_t log Σ_v exp z_tv` | real | logits |
    | `logits/entropy` | `mean_t −Σ_v p_tv log p_tv` | 0 to log V | nats |
    | `logits/largest_probability` | `mean_t max_v p_tv` | 1/V to 1 | – |
    | `logits/shift` | `‖1ᵀW‖/√V` of the head's weight W | ≥ 0 | of W |

    A model with several heads has `logits/rms/NAME` and so on for each. Pictures: `logits/histogram`, of the centered
    logits. In `logit_norms.npz`: `steps [N]`, `heads [H]`, `positions [N, H]`, the metrics `[N, H]`, and `histogram
    [N, H, B]` between `edges [B-1]`.

    The logits are those the head has just computed, and pieces of them are looked at one after the other: a look
    takes less than 100 MB more, whatever the vocabulary and the batch. Where the model caps its logits softly after the
    head (`final_logit_softcapping`), the capped ones are measured; other changes after the head are not seen.

    Args:
        every_n_steps: optimizer steps between two looks; the first step is looked at, too.
        positions: at most this many positions of each micro-batch of each rank.
        softcap: the soft cap of the logits, in place of what a transformers configuration says.
        folder: where `logit_norms.npz` goes, in place of the log folder.

    Example:
        >>> callback = LogitNorms(every_n_steps=100, positions=128)
    """

    file = "logit_norms"

    def __init__(
        self,
        *,
        every_n_steps: int = 50,
        positions: int = 256,
        softcap: float | None = None,
        folder: str | None = None,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, folder=folder)
        if positions < 1:
            raise ConfigError(f"LogitNorms: positions={positions} must be at least 1")
        self.positions = positions
        self.softcap = softcap
        self._heads: list[Head] = []
        self._metrics: list[LogitStatistics] = []
        self._seed = 0

    def _find(self, pl_module: L.LightningModule, taxonomy: BlockTaxonomy) -> str | None:
        self._heads = find_heads(pl_module, taxonomy)
        if not self._heads:
            return f"{type(pl_module).__name__} has no module that is a head"
        self.layers = [head.path for head in self._heads]
        self.history.constants = {"heads": np.array(self.layers), "edges": edges().numpy()}
        return None

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._metrics = [LogitStatistics().to(pl_module.device) for _ in self._heads]
        # Other positions at every step and rank; a resumed run samples those of the uninterrupted one.
        self._seed = (trainer.global_step * trainer.world_size + trainer.global_rank) * 100_003

    def _watching(self) -> HeadWatch:
        return HeadWatch(self._heads, self._add, unless=is_probing)

    def _add(self, head: int, logits: Tensor, shift: Tensor) -> None:
        self._seed += 1
        positions = sample_positions(logits[..., 0].numel(), self.positions, seed=self._seed)
        softcap = self._heads[head].softcap if self.softcap is None else self.softcap
        self._metrics[head].update(logits, shift=shift, positions=positions.to(logits.device), softcap=softcap)

    def _finish(self, trainer: L.Trainer) -> None:
        found = [metric.compute() for metric in self._metrics]
        bins = [values.pop("histogram") for values in found]
        names = [f"/{path}" for path in self.layers] if len(found) > 1 else [""]
        scalars = {
            f"logits/{key}{name}": float(value)
            for name, values in zip(names, found, strict=True)
            for key, value in values.items()
            if key != "positions"
        }
        arrays = {key: np.array([float(values[key]) for values in found]) for key in found[0]}
        arrays["histogram"] = np.stack([as_array(counts, -1) for counts in bins])
        self._publish(trainer, step=trainer.global_step, arrays=arrays, scalars=scalars)
        for name, counts in zip(names, bins, strict=True):
            self._histogram(trainer, f"logits/histogram{name}", counts)
