"""The callbacks under DDP. Oracle: one process with the batches of both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FILES = ("load_imbalance", "router_stability", "logit_norms")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    found = {processes: tmp_path_factory.mktemp(f"on {processes}") for processes in (1, 2)}
    for processes, folder in found.items():
        subprocess.run(
            [sys.executable, "-m", "tests.callbacks.on_ranks", str(folder), str(processes)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            timeout=240,
        )
    return found


@pytest.mark.parametrize("file", FILES)
def test_two_processes_find_what_one_finds_with_the_batches_of_both(folders: dict[int, Path], file: str) -> None:
    with (
        np.load(folders[1] / "whole" / f"{file}.npz") as one,
        np.load(folders[2] / "whole" / f"{file}.npz") as two,
    ):
        assert one.files == two.files
        assert len(one["steps"]) == 5
        for name in one.files:
            if name == "histogram":  # an average of gradients is rounded: an entry at an edge may change its bin
                assert np.abs(one[name] - two[name]).sum() <= 4
                np.testing.assert_array_equal(one[name].sum(-1), two[name].sum(-1))
            elif one[name].dtype.kind == "f":
                np.testing.assert_allclose(one[name], two[name], rtol=1e-4, atol=1e-6, err_msg=name)
            else:
                np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@pytest.mark.parametrize("processes", [1, 2])
def test_weights_are_bitwise_those_of_a_run_without_callbacks(folders: dict[int, Path], processes: int) -> None:
    assert (folders[processes] / "equal").read_text() == "True"


@pytest.mark.parametrize("file", FILES)
def test_a_run_resumed_on_two_processes_goes_on_as_if_nothing_had_happened(folders: dict[int, Path], file: str) -> None:
    with (
        np.load(folders[2] / "whole" / f"{file}.npz") as whole,
        np.load(folders[2] / "resumed" / f"{file}.npz") as resumed,
    ):
        for name in whole.files:
            np.testing.assert_array_equal(whole[name], resumed[name], err_msg=name)
