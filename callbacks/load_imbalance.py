"""How evenly the experts of each layer are used, on the training batches themselves.

Shape legend:  N looks, L layers, E experts.
"""

from __future__ import annotations

import lightning as L
import numpy as np
import torch

from lit_symopt.blocks import BlockTaxonomy
from lit_symopt.callbacks.batch_looks import BatchLooks
from lit_symopt.callbacks.looks import as_array, by_layer, logged_step
from lit_symopt.callbacks.probe import is_probing
from lit_symopt.metrics.load import OVER_LAYERS, ExpertLoad
from lit_symopt.metrics.routers import Router, find_routers
from lit_symopt.metrics.watch import RouterWatch, Routing


class LoadImbalance(BatchLooks):
    """Logs how unevenly tokens and probability mass are spread over the experts.

    Over all tokens of one optimizer step (every micro-batch, every rank, padding included), with f_e the share of the
    assignments and p_e of the probability mass that expert e of a layer gets:

    | tag | formula | range | unit | over layers |
    |---|---|---|---|---|
    | `router/assignments/cv`, `router/mass/cv` | `√(E Σ (x_e − 1/E)²)` of x = f, p | 0 (even) to √(E−1) | – | mean |
    | `router/assignments/entropy`, `router/mass/entropy` | `−Σ x_e log x_e / log E` | 0 to 1 (even) | – | mean |
    | `router/assignments/largest_share`, `router/mass/largest_share` | `max x_e` | 1/E (even) to 1 | – | largest |
    | `router/assignments/dead_experts` | experts with f_e = 0 | 0 to E−1 | experts | sum |
    | `router/mass/dead_experts` | experts with p_e < 0.01/E | 0 to E−1 | experts | sum |
    | `router/balance_loss` | `E Σ f_e p_e` | 1 if even, at most E | – | mean |

    Each also for every layer, as `router/mass/cv/layer_3`. `f_e` is at most 1/K with K experts a token. Pictures:
    `router/assignments/heat_map` and `router/mass/heat_map` (`E·f_e`, `E·p_e`: 1 is an even share) and their
    histograms `router/assignments/histogram` and `router/mass/histogram`, over all layers and experts. In
    `load_imbalance.npz`: `steps [N]`, `layers [L]`, `experts [L]`, `assignments [N, L, E]` (counts), `mass [N, L, E]`
    (mean probability), `tokens [N, L]` and the metrics `[N, L]`.

    Between two looks nothing runs. A look computes the router logits a second time and synchronizes the device.

    Args:
        every_n_steps: optimizer steps between two looks; the first step is looked at, too.
        top_k: experts a token is sent to, for routers of which that cannot be seen; see `RouterWatch`.
        folder: where `load_imbalance.npz` goes, in place of the log folder.

    Example:
        >>> callback = LoadImbalance(every_n_steps=100)
    """

    file = "load_imbalance"

    def __init__(self, *, every_n_steps: int = 50, top_k: int | None = None, folder: str | None = None) -> None:
        super().__init__(every_n_steps=every_n_steps, folder=folder)
        self.top_k = top_k
        self._routers: list[Router] = []
        self._metric = ExpertLoad([1])

    def _find(self, pl_module: L.LightningModule, taxonomy: BlockTaxonomy) -> str | None:
        self._routers = find_routers(pl_module, taxonomy, top_k=self.top_k)
        if not self._routers:
            return f"{type(pl_module).__name__} has no router"
        self.layers = [router.label for router in self._routers]
        experts = np.array([router.experts for router in self._routers])
        self.history.constants = {"layers": np.array(self.layers), "experts": experts}
        return None

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._metric = ExpertLoad([router.experts for router in self._routers]).to(pl_module.device)

    def _watching(self) -> RouterWatch:
        return RouterWatch(self._routers, self._add, unless=is_probing)

    def _add(self, routing: Routing) -> None:
        router = self._routers[routing.layer]
        self._metric.update(routing.layer, routing.selected, router.probabilities(routing.logits))

    def _finish(self, trainer: L.Trainer) -> None:
        found = self._metric.compute()
        layers, experts = len(self._routers), max(router.experts for router in self._routers)
        counts, mass = (as_array(found.pop(name), layers, experts) for name in ("assignments", "mass"))
        each = {name: as_array(value, layers) for name, value in found.items()}
        scalars: dict[str, float] = {}
        for group in ("assignments", "mass"):
            values = {name.partition("/")[2]: value for name, value in found.items() if name.startswith(f"{group}/")}
            scalars |= by_layer(f"router/{group}", values, self.layers, OVER_LAYERS)
        scalars |= by_layer("router", {"balance_loss": found["balance_loss"]}, self.layers, OVER_LAYERS)
        step = trainer.global_step
        self._publish(
            trainer,
            step=step,
            arrays={"assignments": counts, "mass": mass.astype(np.float32), **each},
            scalars=scalars,
        )
        number = np.array([[router.experts] for router in self._routers])
        load = np.where(np.isnan(mass), np.nan, counts / np.maximum(counts.sum(1, keepdims=True), 1) * number)
        for group, map_, what in (("assignments", load, "assignments"), ("mass", mass * number, "probability mass")):
            title = f"{what} by layer and expert, step {step:,}"
            bar = "share × experts (1: even)"
            self._draw(trainer, f"router/{group}/heat_map", map_, title=title, bar=bar, lowest=0.0)
            for logger in self._with_pictures(trainer):
                flat = torch.from_numpy(map_[~np.isnan(map_)])
                logger.experiment.add_histogram(f"router/{group}/histogram", flat, logged_step(trainer))
