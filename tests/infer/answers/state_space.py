"""Mamba and Mamba-2: no attention. The channels of a mixer share a symmetry that these blocks do not spell out."""

from __future__ import annotations

from lit_symopt.blocks import Block, Layout, Role
from tests.infer.answers.pieces import untied, vector

_MAMBA = [
    *untied("backbone.embeddings.weight"),
    Block("*.mixer.in_proj.weight", role=Role.LINEAR),
    Block("*.mixer.x_proj.weight", role=Role.LINEAR),
    Block("*.mixer.dt_proj.weight", role=Role.LINEAR),
    vector("*.mixer.dt_proj.bias", "linear"),
    Block("*.mixer.out_proj.weight", role=Role.LINEAR),
    Block("*.mixer.conv1d.weight", role=Role.CONV, layout=Layout.flatten()),
    vector("*.mixer.conv1d.bias", "conv"),
    vector("*.mixer.A_log", None),  # decay rates, a channel x a state: a table of numbers, no matrix
    vector("*.mixer.D", None),
    vector("backbone.layers.*.norm.weight"),
    vector("backbone.norm_f.weight"),
]

_MAMBA2 = [
    *untied("backbone.embeddings.weight"),
    Block("*.mixer.in_proj.weight", role=Role.LINEAR),
    Block("*.mixer.out_proj.weight", role=Role.LINEAR),
    Block("*.mixer.conv1d.weight", role=Role.CONV, layout=Layout.flatten()),
    vector("*.mixer.conv1d.bias", "conv"),
    *(vector(f"*.mixer.{name}", None) for name in ("A_log", "D", "dt_bias", "norm.weight")),
    *(vector(f"backbone.layers.{layer}.norm.weight") for layer in range(2)),
    vector("backbone.norm_f.weight"),
]

ANSWERS = {"mamba": _MAMBA, "mamba2": _MAMBA2}
