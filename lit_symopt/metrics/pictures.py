"""Heat maps of layers × experts as images.

Shape legend:  L layers, E experts, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_NAMES = 24  # more layers than this are not all named at the axis


def heat_map(
    values: NDArray[Any],
    *,
    rows: Sequence[str],
    title: str,
    bar: str,
    lowest: float | None = None,
    highest: float | None = None,
) -> NDArray[np.uint8]:
    """A heat map with axes, labels and a color bar.

    Args:
        values: `[L, E]`; not-a-numbers (experts that a layer does not have) stay blank.
        rows: names of the layers, one for each row, drawn from top to bottom.
        title: above the map.
        bar: what the colors mean, beside the color bar, with its unit.
        lowest, highest: the values at the ends of the color bar; default: those of the map.

    Returns:
        RGB pixels `[H, W, 3]`.

    Example:
        >>> image = heat_map(np.eye(2, 4), rows=["layer_0", "layer_1"], title="share", bar="share × experts")
        >>> image.shape[-1], image.dtype
        (3, dtype('uint8'))
    """
    # The object-oriented interface: pyplot would keep global figures and choose a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers, experts = values.shape
    figure = Figure(
        figsize=(min(4.8 + 0.2 * experts, 14.0), min(2.8 + 0.22 * layers, 12.0)), dpi=100, layout="constrained"
    )
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", vmin=lowest, vmax=highest)
    figure.suptitle(title, fontsize="medium")  # over the whole figure: a long title is not cut off
    axes.set(xlabel="expert", ylabel="layer")
    shown = range(0, layers, -(-layers // _MOST_NAMES))
    axes.set_yticks(list(shown), labels=[rows[layer].removeprefix("layer_") for layer in shown])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label=bar)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
