"""Schedules of profiles, as files and as defaults."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from lit_symopt.errors import ConfigError, ProfileError
from lit_symopt.profiling.spec import ProfileSpec

SPECS = sorted((Path(__file__).parents[2] / "profiles" / "specs").glob("*.yaml"))


def test_the_default_is_the_laptop_spec_and_that_file_says_every_key() -> None:
    (laptop,) = [path for path in SPECS if path.stem == "laptop"]
    assert ProfileSpec.load(laptop) == ProfileSpec()
    assert list(yaml.safe_load(laptop.read_text())) == list(asdict(ProfileSpec()))


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_spec_is_loaded_and_states_purpose_command_hardware_and_result(path: Path) -> None:
    spec = ProfileSpec.load(path)
    assert spec.steps == spec.skip_first + spec.repeat * (spec.wait + spec.warmup + spec.active)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Purpose", "Command", "Hardware", "Result"):
        assert any(line.startswith(f"# {word}") for line in header), word
    assert any("lit-symopt profile --config configs/" in line for line in header)


def test_there_is_a_spec_for_a_laptop_for_one_gpu_and_for_many() -> None:
    assert {path.stem for path in SPECS} >= {"laptop", "one_gpu", "many_gpus"}


def test_what_a_file_leaves_out_is_as_by_default(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("active: 2\nranks: all\n")
    assert ProfileSpec.load(tmp_path / "spec.yaml") == ProfileSpec(active=2, ranks="all")


def test_an_unknown_key_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("activ: 2\n")
    with pytest.raises(ConfigError, match=r"spec\.yaml has unknown key\(s\) activ; known: skip_first, wait, warmup"):
        ProfileSpec.load(tmp_path / "spec.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("active: 0", r"active=0 .* at least 1"),
        ("wait: -1", r"wait=-1 .* at least 0"),
        ("{wait: 0, warmup: 0}", r"repeat=4 windows of a profile need a step between them"),
        ("rounds: 1.5", r"rounds=1\.5 .* whole number"),
        ("repeat: true", r"repeat=True .* whole number"),
        ("repeat: null", r"repeat=None .* whole number"),
        ("threads: 0", r"threads=0"),
        ("ranks: []", r"ranks=\[\] .* \[0\], or all"),
        ("ranks: [-1]", r"ranks=\[-1\]"),
        ("ranks: some", r"ranks='some'"),
        ("memory: 1", r"memory=1 .* true or false"),
    ],
)
def test_a_value_that_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        ProfileSpec.load(tmp_path / "spec.yaml")


@pytest.mark.parametrize(
    ("text", "message"), [("- 1", "not a mapping"), ("", "not a mapping"), ("{", "not YAML"), (None, "cannot be read")]
)
def test_a_file_that_is_no_spec_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(ProfileError, match=message):
        ProfileSpec.load(tmp_path / "spec.yaml")
