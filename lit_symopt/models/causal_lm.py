"""Training a causal language model: the loss, what is logged, and weights in and out.

Shape legend:  B sequences of a batch, T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric

from lit_symopt.config import SymOptConfig
from lit_symopt.errors import ConfigError
from lit_symopt.mixin import SymOptMixin
from lit_symopt.models.checkpoint import SECTION, refuse_another_architecture
from lit_symopt.models.deferred import Deferred
from lit_symopt.models.fully_sharded import data_parallel_mesh, shard_decoder
from lit_symopt.models.next_token import next_token_loss, refuse_without_targets
from lit_symopt.models.pretrained import load_pretrained, write_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_SYMOPT = SymOptConfig()


class TargetMean(Metric):
    """The mean loss over all targets, from the mean loss of each batch and its number of targets; reduced over ranks.

    Not a number is kept: a diverged run must show. (torchmetrics' MeanMetric drops it, and the weights too if told
    not to: `nan_strategy="disable"`, version 1.9.)
    """

    full_state_update = False
    total: Tensor
    targets: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("targets", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, targets: int) -> None:
        """Add a batch."""
        self.total += loss * targets
        self.targets += targets

    def compute(self) -> Tensor:
        """The mean in nats."""
        return self.total / self.targets


class LitCausalLM(SymOptMixin, L.LightningModule):
    """A causal language model of transformers, trained on next tokens with `SymOpt`.

    The loss of a batch `input_ids [B, T]` is `next_token_loss` of the model's logits: the mean over its B·(T-1)
    targets in nats, in float32, or in float64 if the model is. What transformers adds to its own loss by a
    configuration's `router_aux_loss_coef` is no part of it.

    Every row of the embedding trains: a configuration's `pad_token_id`, whose row transformers would leave as it is
    (Gemma 3: token 0), is no padding here, where token 0 may be a token like any other.

    Logged: `train/loss`, `train/tokens` (tokens seen by all ranks since step 0, across resumes),
    `train/tokens_per_second` (all ranks, since the last logged step, validation excluded), and for each evaluation
    `val/loss` or `test/loss` (the mean over every target of the set, not over batches; reduced over ranks) and
    `val/perplexity` or `test/perplexity`, its exponential.

    Weights are initialized by transformers when the model is built: matrices and embeddings normal with mean 0 and
    the configuration's `initializer_range` as standard deviation, norm gains 1 (Gemma 3 stores them less 1), biases 0
    (gpt-oss draws sinks and router biases like matrices), drawn from torch's global generator. They are float32 here;
    what is computed in a lower precision is the Trainer's `precision` (`bf16-mixed` keeps float32 parameters,
    `bf16-true` turns them into bfloat16).

    In a float64 model everything is float64 but what transformers computes in float32 whatever the model: RMSNorms and
    rotary angles in every family, OLMoE's routing weights, and the softmax of `eager` attention except gpt-oss's.

    Under Lightning's `ModelParallelStrategy` every decoder layer, and then the model, is sharded by FSDP2.

    Args:
        model: the model, e.g. `Qwen3ForCausalLM(config)`; one that is `Deferred` gets its weights in `configure_model`.
        symopt: stack, learning rates and schedule.

    Example:
        >>> import torch
        >>> from lit_symopt.models import Qwen3
        >>> model = Qwen3(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...               num_attention_heads=2, num_key_value_heads=1, head_dim=8)
        >>> model.loss(torch.zeros(1, 4, dtype=torch.long)).shape
        torch.Size([])
    """

    def __init__(self, model: PreTrainedModel | Deferred, *, symopt: SymOptConfig = DEFAULT_SYMOPT) -> None:
        super().__init__()
        self._deferred = model if isinstance(model, Deferred) else None
        self.model = model.model if isinstance(model, Deferred) else model
        embedding: Any = self.model.get_input_embeddings()
        embedding.padding_idx = None  # it masks the gradient of that row
        self.symopt = symopt
        self.tokens_seen = 0
        self.val_loss = TargetMean()
        self.test_loss = TargetMean()
        self._timed_from: float | None = None
        self._timed_tokens = 0

    # -- weights in and out --------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Shards the model under `ModelParallelStrategy` and builds what is deferred; nothing if that is done.

        The Trainer calls it. Whoever uses a deferred model without one calls it too, after `fully_shard` or inside
        `deepspeed.zero.Init`.

        Raises:
            ConfigError: for tensor parallelism, or a deferred model that cannot be handed out.
        """
        mesh = data_parallel_mesh(self)
        if mesh is not None:
            shard_decoder(self.model, mesh)
        if self._deferred is not None:
            self._deferred.materialize()
            self._deferred = None

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, symopt: SymOptConfig = DEFAULT_SYMOPT) -> LitCausalLM:
        """The model of a folder that transformers' `save_pretrained` wrote, its weights in float32.

        Raises:
            ConfigError: if the path is not such a folder. Nothing is ever downloaded.
        """
        return cls(load_pretrained(folder), symopt=symopt)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as a folder that transformers' `from_pretrained` reads; all of it or nothing.

        Raises:
            ConfigError: if the folder exists and is not empty.
        """
        write_pretrained(self.model, folder)

    # -- what is computed ----------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits `[B, T, V]` of token ids `[B, T]`."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    def loss(self, input_ids: Tensor) -> Tensor:
        """Mean next-token loss of token ids `[B, T]` in nats; see `next_token_loss`."""
        refuse_without_targets(input_ids)
        return next_token_loss(self(input_ids), input_ids)

    def losses(self, input_ids: Tensor) -> dict[str, Tensor]:
        """What training logs of a batch under `train/`: `loss`, the cross-entropy.

        A subclass with more terms adds them by name, and their sum as `total_loss`.
        """
        return {"loss": self.loss(input_ids)}

    def training_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """What training minimizes for a batch: the cross-entropy, or `total_loss` where there is more."""
        return _minimized(self.losses(batch["input_ids"]))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """What training minimizes for one batch, after logging its terms."""
        input_ids = batch["input_ids"]
        losses = self.losses(input_ids)
        # Every rank's batch has the same shape, so the count needs no communication.
        self.tokens_seen += input_ids.numel() * self.trainer.world_size
        for name, value in losses.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss", sync_dist=True)
        self.log("train/tokens", float(self.tokens_seen))
        return _minimized(losses)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds one batch to the validation loss."""
        self._evaluate(self.val_loss, batch["input_ids"])

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds one batch to the test loss."""
        self._evaluate(self.test_loss, batch["input_ids"])

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss` and `val/perplexity`."""
        self._log_evaluation("val", self.val_loss)

    def on_test_epoch_end(self) -> None:
        """Logs `test/loss` and `test/perplexity`."""
        self._log_evaluation("test", self.test_loss)

    def _evaluate(self, metric: TargetMean, input_ids: Tensor) -> None:
        targets = input_ids.shape[0] * (input_ids.shape[1] - 1)
        metric.update(self.loss(input_ids), targets)

    def _log_evaluation(self, name: str, metric: TargetMean) -> None:
        loss = metric.compute()  # already reduced over ranks: sync_dist below averages equal numbers
        metric.reset()
        self.log(f"{name}/loss", loss, prog_bar=True, sync_dist=True)
        self.log(f"{name}/perplexity", loss.exp(), sync_dist=True)

    # -- speed ---------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs `train/tokens_per_second` at the steps at which the Trainer logs."""
        now = perf_counter()
        if self._timed_from is None:  # the first batch also pays for warming up
            self._timed_from = now
            return
        self._timed_tokens += batch["input_ids"].numel() * self.trainer.world_size
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a part of the Trainer
        if self.trainer.global_step % every == 0:
            self.log("train/tokens_per_second", self._timed_tokens / (now - self._timed_from), prog_bar=True)
            self._timed_from, self._timed_tokens = now, 0

    def on_validation_start(self) -> None:
        """Stops the clock of `train/tokens_per_second`."""
        if self._timed_from is not None:
            self._timed_from -= perf_counter()

    def on_validation_end(self) -> None:
        """Starts the clock of `train/tokens_per_second` again."""
        if self._timed_from is not None:
            self._timed_from += perf_counter()

    # -- checks and checkpoints ----------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Compares the vocabulary of the data with that of the model.

        Raises:
            ConfigError: if the data has more token ids than the model has rows.
        """
        data, known = getattr(self.trainer, "datamodule", None), int(self.model.config.vocab_size)
        needed = getattr(data, "vocab_size", None)
        if needed is not None and needed > known:
            raise ConfigError(
                f"{type(data).__name__} has {needed} token ids (vocab_size={needed}) but {type(self).__name__} only "
                f"{known} rows (vocab_size={known}); give the model vocab_size={needed} or more, or the data a "
                f"vocabulary of at most {known}"
            )

    def architecture(self) -> dict[str, Any]:
        """What a checkpoint says about the model: transformers' configuration as plain Python types."""
        described: dict[str, Any] = self.model.config.to_dict()
        return described

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the architecture, the stack and the number of tokens seen."""
        checkpoint[SECTION] = {
            "architecture": self.architecture(),
            "stack": self.symopt.stack,
            "tokens_seen": self.tokens_seen,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another architecture and restores the number of tokens seen.

        Raises:
            CheckpointError: naming what differs.
        """
        refuse_another_architecture(checkpoint, self)
        self.tokens_seen = int(checkpoint.get(SECTION, {}).get("tokens_seen", 0))


def _minimized(losses: dict[str, Tensor]) -> Tensor:
    return losses.get("total_loss", losses["loss"])
