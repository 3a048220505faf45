"""A DeepSpeed checkpoint folder, read without DeepSpeed.

    latest                     the name of the folder below (Lightning: "checkpoint")
    checkpoint/
      mp_rank_00_model_states.pt                  module and client state (ZeRO 3: zero_pp_rank_R_..., one a rank)
      [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt      what rank R held: fp32 weights, the client's state

How elements lie in the flat tensors is not DeepSpeed's secret here: `SymOpt.state_dict` says under `sharding` which
stretch of which block each of its flat tensors holds, and DeepSpeed saves its fp32 weights in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_symopt.checkpoint.folder import Folder
from lit_symopt.checkpoint.named import prefix_between
from lit_symopt.checkpoint.storage import Scratch, load_mapped
from lit_symopt.checkpoint.stretches import put, uncovered
from lit_symopt.errors import CheckpointError

# What DeepSpeed puts beside the client's own entries in the file of the module.
_DEEPSPEEDS = frozenset(
    {
        "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
        "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
        "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "num_experts",
        "checkpoint_parallel_dimensions", "universal_checkpoint_info", "ds_autoep_layers", "ds_config", "ds_version",
    }
)  # fmt: skip
_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<model_rank>\d+)_model_states\.pt")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of a block that a rank saved.

    Attributes:
        shape, dim, start, stop: of the block and the stretch; see `Placement`.
        weight: the stretch of the fp32 weight.
        state: the stretch of every state tensor, and whole the state that is one number.
    """

    shape: tuple[int, ...]
    dim: int
    start: int
    stop: int
    weight: Tensor
    state: dict[str, Tensor]


class DeepSpeedFolder(Folder):
    """ZeRO 1, 2 and 3, BF16_Optimizer, and stage 0; of any number of ranks."""

    @staticmethod
    def is_at(path: Path) -> bool:
        """Whether DeepSpeed has saved something there."""
        return (path / "latest").is_file() or any(path.glob("*/*_model_states.pt"))

    @property
    def strategy(self) -> str:
        """Stage and, if it is that one, the BF16_Optimizer."""
        if self.stage == 1 and any(self._below.glob("bf16_*")) and "zero_stage" not in self._shard(0):
            return "DeepSpeed ZeRO 1 (BF16_Optimizer)"
        return f"DeepSpeed ZeRO {self.stage}"

    @property
    def stage(self) -> int:
        """0 to 3."""
        return int((self._model["ds_config"].get("zero_optimization") or {}).get("stage", 0))

    @property
    def world(self) -> int:
        """Data-parallel ranks."""
        return int(self._model["dp_world_size"])

    def missing(self) -> list[Path]:
        """The marker `latest`, which is written last, and the files of every rank."""
        if not (self.path / "latest").is_file():
            return [self.path / "latest"]
        if not self._model_file(0).is_file():
            return [self._model_file(0)]
        files = [self._shard_file(rank) for rank in range(self.world)] if self.stage else []
        if self.stage == 3:
            files += [self._model_file(rank) for rank in range(self.world)]
        return [file for file in files if not file.is_file()]

    def refuse_incomplete(self) -> None:
        """Checks that every file is there and can be opened.

        Raises:
            CheckpointError: naming the file.
        """
        super().refuse_incomplete()
        for rank in range(self.world if self.stage else 0):
            self._shard(rank)
            load_mapped(self._model_file(rank))

    def header(self) -> dict[str, Any]:
        """What Lightning gave DeepSpeed to keep, of rank 0."""
        return {key: value for key, value in self._model.items() if key not in _DEEPSPEEDS}

    def groups(self) -> list[dict[str, Any]]:
        """The groups of the client optimizer, without DeepSpeed's flat tensors."""
        groups = self._client(0)["param_groups"] if self.stage else self._whole_client()["param_groups"]
        return [{**group} for group in groups]

    def assemble(self, scratch: Scratch) -> dict[str, Any]:
        """Weights are the fp32 ones; a model in half precision keeps them also as `master`, as on one device."""
        module: dict[str, Tensor] = self._model["module"]
        weights, optimizer = self._unsharded(scratch) if self.stage else self._replicated()
        prefix = prefix_between(list(weights), module)
        state_dict, aliases = {}, dict(self._model["shared_params"] or {})
        for name, saved in module.items():
            original = aliases.get(name, name).removeprefix(prefix)
            state_dict[name] = weights[original] if original in weights else self._frozen(name, saved)
        for name, weight in weights.items():
            if module[prefix + name].dtype in (torch.bfloat16, torch.float16):
                optimizer["state"][name]["master"] = weight
        return {**self.header(), "state_dict": state_dict, "optimizer_states": [optimizer]}

    # -- files ---------------------------------------------------------------------------------------------------

    @cached_property
    def _below(self) -> Path:
        latest = self.path / "latest"
        if not latest.is_file():
            return self.path / "checkpoint"
        return self.path / latest.read_text(encoding="utf-8").strip()

    def _model_file(self, rank: int) -> Path:
        found = [match for file in self._below.glob("*_model_states.pt") if (match := _MODEL.fullmatch(file.name))]
        if any(int(match["model_rank"]) > 0 for match in found):
            raise CheckpointError(
                f"{self.path} was saved with tensor or pipeline parallelism, which is not supported here"
            )
        by_rank = self._below / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        return by_rank if any(match["rank"] for match in found) else self._below / "mp_rank_00_model_states.pt"

    @cached_property
    def _model(self) -> dict[str, Any]:
        model: dict[str, Any] = load_mapped(self._model_file(0))
        return model

    def _shard_file(self, rank: int) -> Path:
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        return self._below / (f"bf16_{name}" if any(self._below.glob("bf16_zero_pp_rank_*")) else name)

    def _shard(self, rank: int) -> dict[str, Any]:
        shard: dict[str, Any] = load_mapped(self._shard_file(rank), foreign=True)["optimizer_state_dict"]
        return shard

    def _client(self, rank: int) -> dict[str, Any]:
        return self._client_of(self._shard(rank))

    def _client_of(self, shard: dict[str, Any]) -> dict[str, Any]:
        client = shard["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
        if not isinstance(client, dict) or "sharding" not in client:
            raise CheckpointError(
                f"{self.path} does not say which block lies where: it was not saved by a SymOpt that knows its engine "
                "(the mixin does it, else optimizer.attach(engine); zero_optimization.elastic_checkpoint must be off). "
                "DeepSpeed's zero_to_fp32.py, in the folder, recovers the weights without the optimizer's state."
            )
        return client

    # -- what lies in them ---------------------------------------------------------------------------------------

    def _pieces(self, rank: int) -> Iterator[tuple[str, Piece]]:
        """Name and stretch of everything a rank held."""
        shard = self._shard(rank)
        client = self._client_of(shard)
        flats = shard["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"]
        keys = [key for group in client["param_groups"] for key in group["params"]]
        holdings = client["sharding"]["holdings"]
        if not len(flats) == len(keys) == len(holdings):
            raise CheckpointError(
                f"{self._shard_file(rank)} has {len(flats)} flat weights, {len(keys)} tensors in the optimizer's "
                f"groups and {len(holdings)} in its own account of them: these are not of one checkpoint"
            )
        for flat, key, segments in zip(flats, keys, holdings.values(), strict=True):
            state = client["state"].get(key, {})
            for segment in segments:
                length = segment["stop"] - segment["start"]
                where = slice(segment["offset"], segment["offset"] + length)
                yield (
                    segment["name"],
                    Piece(
                        shape=tuple(segment["shape"]),
                        dim=segment["dim"],
                        start=segment["start"],
                        stop=segment["stop"],
                        weight=flat[where],
                        state={what: value if value.ndim == 0 else value[where] for what, value in state.items()},
                    ),
                )

    def _unsharded(self, scratch: Scratch) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """fp32 weights and a state dict of whole tensors, both by the optimizer's names."""
        pieces: dict[str, list[Piece]] = {}
        for rank in range(self.world):
            for name, piece in self._pieces(rank):
                pieces.setdefault(name, []).append(piece)
        weights: dict[str, Tensor] = {}
        state: dict[str, dict[str, Tensor]] = {}
        groups = [{**group, "params": list(group["param_names"])} for group in self.groups()]
        known = {name for group in self._model["param_shapes"] for name in group}
        for name in (name for group in groups for name in group["param_names"]):
            state[name] = {}
            if name in pieces:
                weights[name], state[name] = self._joined(name, pieces[name], scratch)
            elif name in known:  # DeepSpeed leaves only parameters without elements out
                raise CheckpointError(f"{name!r} is in no shard of {self.path}: it is not whole")
        return weights, {"state": state, "param_groups": groups}

    def _joined(self, name: str, pieces: list[Piece], scratch: Scratch) -> tuple[Tensor, dict[str, Tensor]]:
        shape = pieces[0].shape
        gap = uncovered([(piece.start, piece.stop) for piece in pieces], torch.Size(shape).numel())
        if gap is not None:
            raise CheckpointError(
                f"the elements {gap[0]} to {gap[1]} of {name!r} are in no shard of {self.path}: it is not whole"
            )
        weight = scratch.empty(shape, pieces[0].weight.dtype)
        state = {
            what: value.clone() if value.ndim == 0 else scratch.empty(shape, value.dtype)
            for what, value in pieces[0].state.items()
        }
        for piece in pieces:
            put(weight, piece.weight, dim=piece.dim, start=piece.start)
            for what, value in piece.state.items():
                if value.ndim > 0:
                    put(state[what], value, dim=piece.dim, start=piece.start)
        return weight, state

    def _whole_client(self) -> dict[str, Any]:
        saved: dict[str, Any] = self._model["optimizer"]
        client: dict[str, Any] = saved.get("optimizer_state_dict", saved)  # in half precision a wrapper's
        if "param_groups" not in client:
            raise CheckpointError(f"{self.path} holds no optimizer state that is known here")
        return client

    def _replicated(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Stage 0: every rank holds everything; in half precision the wrapper keeps the fp32 weights."""
        client, masters = self._whole_client(), self._model["optimizer"].get("fp32_groups")
        groups = [{**group, "params": list(group["param_names"])} for group in client["param_groups"]]
        keys = [key for group in client["param_groups"] for key in group["params"]]
        names = [name for group in groups for name in group["param_names"]]
        if len(keys) != len(names):
            raise CheckpointError(f"{self.path} holds {len(keys)} tensors for {len(names)} parameters")
        state = {name: dict(client["state"].get(key, {})) for key, name in zip(keys, names, strict=True)}
        if masters is None:
            prefix = prefix_between(names, self._model["module"])
            weights = {name: self._model["module"][prefix + name] for name in names}
        else:
            weights = dict(zip(names, (weight for group in masters for weight in group), strict=True))
        return weights, {"state": state, "param_groups": groups}

    def _frozen(self, name: str, saved: Tensor) -> Tensor:
        """What the optimizer does not hold: buffers, and frozen parameters, which ZeRO 3 shards too."""
        shape = (self._model["frozen_param_shapes"] or {}).get(name)
        if shape is None or tuple(saved.shape) == tuple(shape):
            return saved
        shards = [load_mapped(self._model_file(rank))["frozen_param_fragments"][name] for rank in range(self.world)]
        return torch.cat([shard.reshape(-1) for shard in shards])[: torch.Size(shape).numel()].view(shape)
