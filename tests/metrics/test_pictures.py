"""Heat maps: everything is on the picture, and large values are bright."""

from __future__ import annotations

import numpy as np
import pytest

from lit_symopt.metrics import heat_map

TITLE, BAR = "probability mass by layer and expert, step 30,000", "share × experts (1: even)"


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (4, 8), (24, 32), (48, 256)])
def test_no_label_is_cut_off(layers: int, experts: int) -> None:
    # Text that runs over the edge leaves ink in the outermost pixels.
    rows = [f"layer_{index}" for index in range(layers)]
    image = heat_map(np.random.default_rng(0).random((layers, experts)), rows=rows, title=TITLE, bar=BAR)
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert (edge == 255).all()


def test_a_full_path_as_layer_name_fits_too() -> None:
    image = heat_map(np.eye(2, 8), rows=["encoder.mixture.router", "decoder.mixture.router"], title=TITLE, bar=BAR)
    assert (image[:, 0] == 255).all()


def test_colors_follow_the_values_and_what_is_missing_stays_blank() -> None:
    values = np.array([[0.0, 1.0, np.nan]])
    image = heat_map(values, rows=["layer_0"], title="t", bar="b", lowest=0.0, highest=1.0)
    colors = {tuple(int(c) for c in pixel) for pixel in image.reshape(-1, 3)}
    assert {(68, 1, 84), (253, 231, 36)} <= colors  # the two ends of viridis
    blank = heat_map(values * np.nan, rows=["layer_0"], title="t", bar="b", lowest=0.0, highest=1.0)
    left = slice(0, image.shape[1] * 2 // 3)  # without the color bar
    assert (68, 1, 84) not in {tuple(int(c) for c in pixel) for pixel in blank[:, left].reshape(-1, 3)}


def test_drawing_leaves_pyplot_alone() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    heat_map(np.eye(3), rows=["a", "b", "c"], title="t", bar="b")
    assert plt.get_fignums() == before
