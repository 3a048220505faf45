"""The metrics of 1, 2 and 3 processes. Oracle: NumPy in float64 on all the data at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.metrics.ranks import EXPERTS, TOP_K, data, on_ranks

Found = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module", params=[1, 2, 3])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return on_ranks(request.param, tmp_path_factory.mktemp("ranks"))


def softmax(logits: NDArray[Any]) -> NDArray[Any]:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    result: NDArray[Any] = powers / powers.sum(1, keepdims=True)
    return result


def gathered(layer: int, key: str) -> NDArray[Any]:
    return np.concatenate([batch["layers"][layer][key] for batch in data()])


def agree(found: Found, metric: str, name: str, expected: Any, layer: int | None = None) -> None:
    for rank in found:
        value = rank[metric][name].double().numpy()
        np.testing.assert_allclose(value if layer is None else value[layer], expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("layer", [0, 1])
def test_load(found: Found, layer: int) -> None:
    experts = EXPERTS[layer]
    selected, p = gathered(layer, "selected"), softmax(gathered(layer, "logits").astype(np.float64)).mean(0)
    counts = np.array([(selected == expert).sum() for expert in range(experts)])
    f = counts / counts.sum()
    for rank in found:
        assert rank["load"]["assignments"][layer, :experts].tolist() == counts.tolist()
        np.testing.assert_allclose(rank["load"]["mass"][layer, :experts], p, rtol=1e-6)
        assert rank["load"]["mass"][layer, experts:].isnan().all()
    agree(found, "load", "tokens", len(selected), layer)
    agree(found, "load", "balance_loss", experts * (f * p).sum(), layer)
    for group, x, dead in (("assignments", f, (f == 0).sum()), ("mass", p, (p < 0.01 / experts).sum())):
        agree(found, "load", f"{group}/cv", x.std() / x.mean(), layer)
        agree(found, "load", f"{group}/entropy", -(x[x > 0] * np.log(x[x > 0])).sum() / np.log(experts), layer)
        agree(found, "load", f"{group}/largest_share", x.max(), layer)
        agree(found, "load", f"{group}/dead_experts", dead, layer)


@pytest.mark.parametrize("layer", [0, 1])
def test_stability(found: Found, layer: int) -> None:
    z, experts = gathered(layer, "logits").astype(np.float64), EXPERTS[layer]
    p, s = softmax(z), np.log(np.exp(z).sum(1))
    now, before = gathered(layer, "selected"), gathered(layer, "previous")
    kept = [len(set(a) & set(b)) for a, b in zip(now.tolist(), before.tolist(), strict=True)]
    assert 0 < sum(kept) < now.size
    agree(found, "stability", "changed", 1 - np.mean(kept) / TOP_K, layer)
    agree(found, "stability", "token_entropy", -(p * np.log(p)).sum(1).mean(), layer)
    agree(found, "stability", "logit_rms", np.sqrt((z**2).mean()), layer)
    agree(found, "stability", "logit_max", np.abs(z).max(), layer)
    agree(found, "stability", "logsumexp", s.mean(), layer)
    agree(found, "stability", "z_loss", (s**2).mean(), layer)
    agree(found, "stability", "shift", 0.5 + layer, layer)
    for rank in found:
        assert rank["stability"]["histogram"][layer].sum() == z.size
        counts = [(now == expert).sum() for expert in range(experts)]
        assert rank["stability"]["assignments"][layer, :experts].tolist() == counts


def test_logits(found: Found) -> None:
    z = np.concatenate([batch["head"] for batch in data()]).astype(np.float64)
    c, p = z - z.mean(1, keepdims=True), softmax(z)
    agree(found, "norms", "rms", np.sqrt((z**2).mean()))
    agree(found, "norms", "max", np.abs(z).max())
    agree(found, "norms", "centered_rms", np.sqrt((c**2).mean()))
    agree(found, "norms", "centered_max", np.abs(c).max())
    agree(found, "norms", "logsumexp", np.log(np.exp(z).sum(1)).mean())
    agree(found, "norms", "entropy", -(p * np.log(p)).sum(1).mean())
    agree(found, "norms", "largest_probability", p.max(1).mean())
    agree(found, "norms", "shift", 1.5)
    agree(found, "norms", "positions", len(z))
    for rank in found:
        assert rank["norms"]["histogram"].sum() == z.size
