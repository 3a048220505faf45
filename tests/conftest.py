"""What all tests share: no network, and a marked test is skipped where its device or extra is missing."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from tests.triton_places import PLACES, Run

# Read by huggingface_hub when it is first imported, here and in every process a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run on this machine, with the reason."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    no_deepspeed = pytest.mark.skip(reason="needs `pip install lit-symopt[deepspeed]`")
    has_gpu = torch.cuda.is_available()
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    for item in items:
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(no_gpu)
        if "deepspeed" in item.keywords and not has_deepspeed:
            item.add_marker(no_deepspeed)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Run]:
    """Calls a function of a module in a process in which Triton interprets kernels."""
    from tests.sharding.processes import Ranks

    with Ranks(1, env={"TRITON_INTERPRET": "1"}, group=False) as ranks:
        yield lambda check, *args, **options: ranks(check, *args, device="cpu", **options)[0]


@pytest.fixture(params=PLACES)
def on(request: pytest.FixtureRequest) -> Run:
    """Calls a function of a module with `device`, where kernels run."""
    if request.param == "cuda":
        return lambda check, *args, **options: check(*args, device="cuda", **options)
    run: Run = request.getfixturevalue("interpreter")
    return run
