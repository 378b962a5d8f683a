"""What was measured of effective dilation, as a table, a line, a figure and plain data."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tabulate import tabulate  # type: ignore[import-untyped]

from .effective_dilation import BIN_WIDTH, FILTER_CLASSES, Distribution, LayerDilation

__all__ = ["dilation_table", "dilations_as_dict", "draw_dilation_histograms", "summarize_dilations"]

Layers = dict[str, LayerDilation]

# Told apart by people of any colour vision, and in print by their lightness (Okabe and Ito).
CLASS_COLOURS = {
    "small": "#e69f00",
    "medium": "#009e73",
    "large": "#0072b2",
    "background": "#666666",
}
SHOWN = 0.995  # share of all filters that the axis reaches


def dilation_table(layers: Layers) -> str:
    """The paper's table 2 in Markdown: mean ± standard deviation in cells, the last layer first."""
    headers = ["layer", "dilation", *FILTER_CLASSES, "filters (in the same order)"]
    rows = [
        [
            name,
            describe_dilation(layer),
            *(_mean_and_std(layer.by_class[class_name]) for class_name in FILTER_CLASSES),
            " / ".join(f"{layer.by_class[class_name].count:,}" for class_name in FILTER_CLASSES),
        ]
        for name, layer in reversed(layers.items())
    ]
    alignment = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers, tablefmt="pipe", colalign=alignment, disable_numparse=True)


def summarize_dilations(layers: Layers) -> str:
    """One line: how many layers, and the means of the last one."""
    name, layer = list(layers.items())[-1]
    means = [
        f"{class_name} {layer.by_class[class_name].mean:.2f}"
        for class_name in FILTER_CLASSES
        if layer.by_class[class_name].count
    ]
    number = "1 deformable layer" if len(layers) == 1 else f"{len(layers)} deformable layers"
    return f"{number}; {name}: {', '.join(means)} (undeformed {describe_dilation(layer)})"


def dilations_as_dict(layers: Layers) -> dict[str, Any]:
    """For JSON. Histogram bin i is centred on ``i * bin_width`` cells; empty ends are left out."""
    return {
        "unit": "cells of the layer's input map",
        "bin_width": BIN_WIDTH,
        "layers": {
            name: {
                "dilation": list(layer.dilation),
                "by_class": {
                    class_name: {
                        "filters": values.count,
                        "mean": values.mean if values.count else None,
                        "std": values.std if values.count else None,
                        "histogram": np.trim_zeros(values.histogram, "b").tolist(),
                    }
                    for class_name, values in layer.by_class.items()
                },
            }
            for name, layer in layers.items()
        },
    }


def draw_dilation_histograms(layers: Layers, title: str = "") -> np.ndarray:
    """How the effective dilation of each layer's filters is spread, by class.

    Args:
        layers: of :func:`~d2_deform.analysis.measure_effective_dilation`.
        title: over all.

    Returns:
        uint8 (H, W, 3), RGB.
    """
    columns = 1 if len(layers) <= 4 else 2
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(7.2 * columns, 2.1 * rows + 1.1), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for panel in axes[len(layers) :]:
        panel.remove()
    reach = max(_reach(layer) for layer in layers.values())
    for panel, (name, layer) in zip(axes, reversed(layers.items()), strict=False):
        _draw_layer(panel, name, layer, reach)
    for panel in axes[max(len(layers) - columns, 0) : len(layers)]:
        panel.set_xlabel("effective dilation (cells)")
        panel.tick_params(labelbottom=True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _draw_layer(panel: Axes, name: str, layer: LayerDilation, reach: float) -> None:
    edges = (np.arange(len(layer.by_class["small"].histogram) + 1) - 0.5) * BIN_WIDTH
    for class_name, values in layer.by_class.items():
        share = 100 * values.histogram / max(values.count, 1)
        panel.stairs(share, edges, color=CLASS_COLOURS[class_name], lw=1.5, label=class_name)
    # One line where y and x agree, as they do in every network of the paper
    for dilation in sorted(set(layer.dilation)):
        panel.axvline(dilation, color="black", lw=1, ls="--", label="undeformed")
    panel.set_xlim(0, reach)
    panel.set_ylim(bottom=0)
    panel.set_ylabel("filters (%)")
    panel.set_title(name, fontsize=10, loc="left")
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _reach(layer: LayerDilation) -> float:
    """Up to where nearly all filters of every class are, and the undeformed one."""
    places = [float(max(layer.dilation))]
    for values in layer.by_class.values():
        if values.count:
            share = np.cumsum(values.histogram) / values.count
            places.append(float(np.searchsorted(share, SHOWN)) * BIN_WIDTH)
    return 1.05 * max(places) + 4 * BIN_WIDTH


def describe_dilation(layer: LayerDilation) -> str:
    """ "2", or "2 x 4" where y and x differ."""
    return " x ".join(str(one) for one in dict.fromkeys(layer.dilation))


def _mean_and_std(values: Distribution) -> str:
    return f"{values.mean:.2f} ± {values.std:.2f}" if values.count else ""
