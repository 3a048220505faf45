"""Folders of weights as transformers writes them (`config.json` and `*.safetensors`), read and written locally."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_symopt.errors import CheckpointError, ConfigError
from lit_symopt.models.checkpoint import SECTION, open_checkpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def read_config(folder: str | Path) -> PretrainedConfig:
    """The configuration of a `save_pretrained` folder.

    Raises:
        ConfigError: if the path is not a folder or holds no readable `config.json`.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(
            f"pretrained={str(folder)!r} is not a folder; give a folder that save_pretrained wrote (nothing is "
            "downloaded: for a model of a hub, download it first and give its folder)"
        )
    if not (path / "config.json").is_file():
        raise ConfigError(f"the folder {path} holds no config.json; give a folder that save_pretrained wrote")
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path / 'config.json'} cannot be read as a model configuration: {error}") from error
    return config


def load_pretrained(folder: str | Path, *, attention: str | None = None) -> PreTrainedModel:
    """The causal language model of a `save_pretrained` folder, every weight in torch's default dtype.

    Args:
        folder: the folder.
        attention: transformers' attention kernel; default: its own choice for the architecture.

    Raises:
        ConfigError: if the path is not such a folder, or weights are missing from it, left over or of another shape.
    """
    config = read_config(folder)
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            Path(folder),
            config=config,
            local_files_only=True,
            dtype=torch.get_default_dtype(),
            attn_implementation=attention,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"the weights of {folder} cannot be loaded: {error}") from error
    model: PreTrainedModel
    model, report = loaded
    wrong = {
        what: names
        for what, names in report.items()
        if names and what in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if wrong:
        listed = "; ".join(f"{what.replace('_', ' ')}: {sorted(map(str, names))}" for what, names in wrong.items())
        raise ConfigError(f"the weights of {folder} do not fit its config.json: {listed}")
    return model


def write_pretrained(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a `save_pretrained` folder: in a temporary folder beside it, renamed when whole.

    Raises:
        ConfigError: if the folder exists and is not empty, or cannot be written.
    """
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder; give a new one")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error}; give a folder that can be written") from error
    try:
        model.save_pretrained(temporary)
        os.chmod(temporary, 0o755)  # mkdtemp's folder is private
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export_checkpoint(checkpoint: str | Path, folder: str | Path) -> None:
    """Turn a Trainer checkpoint of a `LitCausalLM` into a `save_pretrained` folder.

    Raises:
        CheckpointError: if the file is not a checkpoint of such a model.
        ConfigError: if the folder exists and is not empty, or cannot be written.
    """
    saved = open_checkpoint(checkpoint)
    architecture = saved.get(SECTION, {}).get("architecture")
    if architecture is None:
        raise CheckpointError(f"{checkpoint} does not say which architecture it is of: it was not saved by LitCausalLM")
    from transformers import AutoConfig, AutoModelForCausalLM

    described = {name: value for name, value in architecture.items() if name not in ("model_type", "architectures")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture["model_type"], **described))
    prefix = "model."
    weights = {
        name.removeprefix(prefix): value for name, value in saved["state_dict"].items() if name.startswith(prefix)
    }
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the weights of {checkpoint} do not fit its own architecture: {error}") from error
    write_pretrained(model, folder)
