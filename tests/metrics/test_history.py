"""History: what is written is what was appended, also after a stop."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_symopt.errors import CheckpointError
from lit_symopt.metrics import History


def filled(*steps: int) -> History:
    history = History({"layers": np.array(["a", "b"])})
    for step in steps:
        history.append(step, {"cv": np.array([step, 2.0 * step]), "counts": np.full((2, 3), step)})
    return history


def test_a_file_holds_steps_constants_and_stacked_rows(tmp_path: Path) -> None:
    filled(1, 5).save(tmp_path / "new folder" / "raw.npz")
    with np.load(tmp_path / "new folder" / "raw.npz") as file:
        assert {name: file[name].shape for name in file.files} == {
            "layers": (2,),
            "steps": (2,),
            "cv": (2, 2),
            "counts": (2, 2, 3),
        }
        assert file["steps"].tolist() == [1, 5]
        assert file["cv"].tolist() == [[1.0, 2.0], [5.0, 10.0]]


def test_a_write_that_fails_leaves_the_old_file_whole_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "raw.npz"
    filled(1).save(path)
    old = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="no space"):
        filled(1, 2).save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_file_takes_the_place_of_the_old_one_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "raw.npz"
    filled(1).save(path)
    old = path.read_bytes()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt  # everything is written, the last step is missing

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        filled(1, 2).save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_state_goes_through_a_checkpoint_and_continues(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(filled(1, 5).state_dict(), buffer)
    buffer.seek(0)
    resumed = filled()
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    resumed.append(9, {"cv": np.array([9.0, 18.0]), "counts": np.full((2, 3), 9)})
    for name, array in filled(1, 5, 9).arrays().items():
        np.testing.assert_array_equal(resumed.arrays()[name], array)


def test_rows_after_the_step_that_a_run_resumes_from_are_replaced(tmp_path: Path) -> None:
    filled(1, 5, 9).save(tmp_path / "raw.npz")
    resumed = filled()
    resumed.read(tmp_path / "raw.npz", constants=["layers"])
    resumed.cut(6)
    assert resumed.steps == [1, 5]
    resumed.append(5, {"cv": np.array([0.0, 0.0]), "counts": np.zeros((2, 3))})
    assert resumed.steps == [1, 5]
    assert resumed.last("cv").tolist() == [0.0, 0.0]
    assert resumed.first("cv").tolist() == [1.0, 2.0]


def test_rows_of_another_model_are_refused() -> None:
    with pytest.raises(CheckpointError, match="of another model"):
        filled(1).append(2, {"cv": np.zeros(3), "counts": np.zeros((3, 3))})
