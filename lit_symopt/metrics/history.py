"""The raw arrays of a run: one row a look, kept in checkpoints and written as one `.npz` file.

Shape legend:  N looks.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lit_symopt.errors import CheckpointError

Array = NDArray[Any]


class History:
    """Rows of named arrays with the number of optimizer steps that were done when each was taken.

    Args:
        constants: arrays that are the same in every row and are written once, such as the names of the layers.

    Example:
        >>> history = History({"layers": np.array(["layer_0"])})
        >>> history.append(10, {"cv": np.array([0.5])})
        >>> {name: array.shape for name, array in history.arrays().items()}
        {'layers': (1,), 'steps': (1,), 'cv': (1, 1)}
    """

    def __init__(self, constants: Mapping[str, Array] | None = None) -> None:
        self.constants = dict(constants or {})
        self.steps: list[int] = []
        self._rows: list[dict[str, Array]] = []

    def __len__(self) -> int:
        return len(self.steps)

    def append(self, step: int, row: Mapping[str, Array]) -> None:
        """Add a row; a row of the same step, or of a later one, is replaced.

        Raises:
            CheckpointError: if the row has other names or shapes than those before it.
        """
        row = {name: np.asarray(array) for name, array in row.items()}
        self.cut(step - 1)
        if self._rows:
            before, now = ({name: array.shape for name, array in r.items()} for r in (self._rows[-1], row))
            if before != now:
                raise CheckpointError(
                    f"the arrays of step {step} are {now} and those before are {before}: they are of another model; "
                    "start in another folder, without the callback's state"
                )
        self.steps.append(step)
        self._rows.append(row)

    def cut(self, step: int) -> None:
        """Forget what came after a step."""
        kept = sum(known <= step for known in self.steps)
        del self.steps[kept:], self._rows[kept:]

    def first(self, name: str) -> Array:
        """The array of that name in the first row."""
        return self._rows[0][name]

    def last(self, name: str) -> Array:
        """The array of that name in the last row."""
        return self._rows[-1][name]

    def arrays(self) -> dict[str, Array]:
        """Everything as arrays: the constants, `steps` int64 `[N]`, and the rows stacked to `[N, ...]`."""
        names = self._rows[0] if self._rows else {}
        return {
            **self.constants,
            "steps": np.array(self.steps, dtype=np.int64),
            **{name: np.stack([row[name] for row in self._rows]) for name in names},
        }

    def save(self, path: Path) -> None:
        """Write the arrays as `.npz`; the file that was there stays whole until the new one is."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **self.arrays())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def read(self, path: Path, *, constants: Collection[str]) -> None:
        """Take the rows of a file that `save` wrote; `constants` are the names in it that are no rows."""
        with np.load(path, allow_pickle=False) as file:
            self._take({name: file[name] for name in file.files if name not in constants})

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The rows as tensors, which load with `weights_only=True`."""
        return {name: torch.from_numpy(a) for name, a in self.arrays().items() if name not in self.constants}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take the rows that `state_dict` gave."""
        self._take({name: tensor.numpy() for name, tensor in state.items()})

    def _take(self, arrays: Mapping[str, Array]) -> None:
        self.steps = [int(step) for step in arrays["steps"]]
        self._rows = [
            {name: array[row] for name, array in arrays.items() if name != "steps"} for row in range(len(self.steps))
        ]
