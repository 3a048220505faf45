"""Whether routers keep sending the same tokens to the same experts.

Shape legend:  N looks, L layers, T tokens of the probe set, K experts a token is sent to, B bins.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_symopt.callbacks.looks import Looks, as_array, by_layer
from lit_symopt.callbacks.probe import fingerprint, run_probe, take_probe
from lit_symopt.callbacks.ranks import gathered
from lit_symopt.errors import ConfigError
from lit_symopt.metrics.histogram import edges
from lit_symopt.metrics.routers import Router, find_routers
from lit_symopt.metrics.stability import OVER_LAYERS, RouterStatistics
from lit_symopt.metrics.watch import RouterWatch, Routing

KEY = "router_stability"


class RouterStability(Looks):
    """Logs what the routers do with the same held-out tokens as training goes on.

    The probe set is the first batches of the validation loader, taken once when the fit starts, each rank its own. At
    a look the model runs on it in eval mode, without gradients; modes and random state are put back. With `z_te` the
    logit and `p_te` the probability of expert e for token t, and `S_t` its K experts:

    | tag | formula | range | unit | over layers |
    |---|---|---|---|---|
    | `router/probe/changed` | `1 − mean_t |S_t ∩ S'_t| / K`, S' at the look before | 0 to 1 | – | mean |
    | `router/probe/token_entropy` | `mean_t −Σ_e p_te log p_te` | 0 to log E | nats | mean |
    | `router/probe/logit_rms` | `√(mean_te z²)` | ≥ 0 | logits | root mean square |
    | `router/probe/logit_max` | `max_te |z|` | ≥ 0 | logits | largest |
    | `router/probe/logsumexp` | `mean_t log Σ_e exp z_te` | real | logits | mean |
    | `router/probe/z_loss` | `mean_t (log Σ_e exp z_te)²` | ≥ 0 | logits² | mean |
    | `router/probe/shift` | `‖1ᵀW‖/√E` of the router's weight W | ≥ 0 | of W | root mean square |

    Each also for every layer, as `router/probe/changed/layer_3`. `changed` is missing at the first look. Pictures:
    `router/probe/heat_map` (share of the probe's assignments × E) and `router/probe/histogram/layer_3` (logits). In
    `router_stability.npz`: `steps [N]`, `layers [L]`, `experts [L]`, the metrics `[N, L]`, `assignments [N, L, E]` and
    `histogram [N, L, B]` between `edges [B-1]`.

    The last selections are in the checkpoints (two bytes for each of T·K·L): a resumed run compares with the look
    before the checkpoint. A run without validation batches has no probe set: a warning says so and nothing is logged.

    Args:
        every_n_steps: optimizer steps between two looks; there is one before the first step, too.
        probe_batches: validation batches of each rank.
        top_k: experts a token is sent to, for routers of which that cannot be seen; see `RouterWatch`.
        folder: where `router_stability.npz` goes, in place of the log folder.

    Example:
        >>> callback = RouterStability(every_n_steps=100)
    """

    file = "router_stability"

    def __init__(
        self,
        *,
        every_n_steps: int = 50,
        probe_batches: int = 1,
        top_k: int | None = None,
        folder: str | None = None,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, folder=folder)
        if probe_batches < 1:
            raise ConfigError(f"RouterStability: probe_batches={probe_batches} must be at least 1")
        self.probe_batches = probe_batches
        self.top_k = top_k
        self._routers: list[Router] = []
        self._probe: list[Any] = []
        self._fingerprint = ""
        self._previous: list[Tensor] | None = None
        self._restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the probe set and the first look; a resumed run goes on from the last one instead."""
        super().on_train_start(trainer, pl_module)
        restored, self._restored, self._previous = self._restored, None, None
        self._probe = take_probe(trainer, batches=self.probe_batches)
        self._fingerprint = fingerprint(self._probe)
        if not trainer.strategy.reduce_boolean_decision(bool(self._probe), all=True):
            self._turn_off("there is no validation batch to take as a probe set (limit_val_batches, val_dataloader)")
            return
        taxonomy = self._taxonomy(pl_module, self._probe[0])
        if taxonomy is None:
            return
        self._routers = find_routers(pl_module, taxonomy, top_k=self.top_k)
        if not self._routers:
            self._turn_off(f"{type(pl_module).__name__} has no router")
            return
        self.layers = [router.label for router in self._routers]
        experts = np.array([router.experts for router in self._routers])
        self.history.constants = {"layers": np.array(self.layers), "experts": experts, "edges": edges().numpy()}
        self._warn_of_loggers(trainer)
        same = restored is not None and restored["probe"] == self._fingerprint
        if restored is not None and trainer.strategy.reduce_boolean_decision(same, all=True):
            self._previous = list(restored["selected"])
        else:
            if restored is not None:
                rank_zero_warn("RouterStability: the validation set is another than that of the checkpoint")
            self._look(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks if it is time."""
        if not self._off and trainer.global_step >= self._due:
            self._due = self._next(trainer.global_step)
            self._look(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writes the file, and adds the last selections of every rank."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._previous is None:
            return
        checkpoint[KEY] = gathered(trainer, {"probe": self._fingerprint, "selected": self._previous})

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes this rank's selections, if the run has as many ranks as the one that saved them."""
        states = checkpoint.get(KEY)
        if states is not None and len(states) == trainer.world_size:
            self._restored = states[trainer.global_rank]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lets go of the probe set."""
        self._probe = []

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metric = RouterStatistics([router.experts for router in self._routers]).to(pl_module.device)
        chosen: list[list[Tensor]] = [[] for _ in self._routers]

        def add(routing: Routing) -> None:
            done = sum(len(rows) for rows in chosen[routing.layer])
            rows = slice(done, done + len(routing.selected))
            metric.update(
                routing.layer,
                routing.logits,
                self._routers[routing.layer].probabilities(routing.logits),
                routing.selected,
                shift=routing.shift,
                previous=None if self._previous is None else self._previous[routing.layer][rows],
            )
            chosen[routing.layer].append(routing.selected.to("cpu", torch.int16))

        with RouterWatch(self._routers, add) as watch:
            run_probe(trainer, pl_module, self._probe)
        if not trainer.strategy.reduce_boolean_decision(watch.seen > 0, all=True):
            self._turn_off(f"no router of {type(pl_module).__name__} ran (a compiled module runs no hooks)")
            return
        self._previous = [torch.cat(rows) for rows in chosen]
        self._finish(trainer, metric)

    def _finish(self, trainer: L.Trainer, metric: RouterStatistics) -> None:
        found = metric.compute()
        layers, experts = len(self._routers), max(router.experts for router in self._routers)
        bins = found.pop("histogram").reshape(layers, -1).cpu()
        counts = as_array(found.pop("assignments"), layers, experts)
        step = trainer.global_step
        self._publish(
            trainer,
            step=step,
            arrays={
                **{name: as_array(value, layers) for name, value in found.items()},
                "assignments": counts,
                "histogram": bins.numpy(),
            },
            scalars=by_layer("router/probe", found, self.layers, OVER_LAYERS),
        )
        for label, row in zip(self.layers, bins, strict=True):
            self._histogram(trainer, f"router/probe/histogram/{label}", row)
        number = np.array([[router.experts] for router in self._routers])
        load = np.where(
            np.arange(experts) < number, counts / np.maximum(counts.sum(1, keepdims=True), 1) * number, np.nan
        )
        title = f"probe set: assignments by layer and expert, step {step:,}"
        bar = "share × experts (1: even)"
        self._draw(trainer, "router/probe/heat_map", load, title=title, bar=bar, lowest=0.0)
