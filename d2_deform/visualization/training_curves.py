"""Curves of the metrics.json that Detectron2's trainers write, of one run or of several."""

import fnmatch
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

__all__ = [
    "Curve",
    "MetricsError",
    "Run",
    "choose_keys",
    "draw_training_curves",
    "name_runs",
    "read_metrics",
    "smooth",
]

FILE_NAME = "metrics.json"
MAX_PANELS = 60
MAX_OFFSET_LAYERS = 6  # shown without being asked for: the last ones
MARKED_POINTS = 20  # a curve of fewer points shows them
POINTS_A_WINDOW = 5  # a curve is smoothed if it is so many windows long

# Told apart by people of any colour vision (Okabe and Ito); then again, dashed.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")

# What is drawn unless keys are named, in this order. Several test sets: "<name>/bbox/AP50".
DEFAULT_KEYS = (
    r"total_loss",
    r"loss\w*",
    r"lr",
    r"(.*/)?(bbox|segm)/(AP|AP50)",
    r"(.*/)?sem_seg/mIoU",
    r"(.*/)?classification/top1",
    r"(.*/)?box_proposals/AR(@1000)?",
)
OFFSET_KEY = r"offset/.*/mean"


class MetricsError(ValueError):
    """Metrics that cannot be drawn; the message says why and what to do."""


class Curve(NamedTuple):
    """One metric over a run.

    Attributes:
        iterations: int64 (n,), rising.
        values: float64 (n,).
    """

    iterations: np.ndarray
    values: np.ndarray


Run = Mapping[str, Curve]  # by key, "total_loss", "bbox/AP50"


def read_metrics(path: str) -> dict[str, Curve]:
    """Reads what Detectron2's ``JSONWriter`` wrote.

    A run that was resumed or started anew in its folder repeats iterations; the last ones count.
    Lines that were not written to their end are passed over.

    Args:
        path: a run's folder, or its metrics.json.

    Raises:
        MetricsError: there is no such file, or nothing in it.
    """
    if os.path.isdir(path):
        path = os.path.join(path, FILE_NAME)
    points: dict[str, list[tuple[int, float]]] = {}
    latest = -1
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                record = _parse(line)
                if record is None:
                    continue
                iteration = int(record.pop("iteration"))
                if iteration <= latest:
                    _forget_from(points, iteration)
                latest = iteration
                for key, value in record.items():
                    if isinstance(value, int | float):
                        points.setdefault(key, []).append((iteration, float(value)))
    except FileNotFoundError as error:
        raise MetricsError(
            f"there is no {path}; name the folder of a run (its OUTPUT_DIR)."
        ) from error
    except OSError as error:
        raise MetricsError(f"{path} cannot be read: {error.strerror}.") from error
    curves = {
        key: Curve(np.array([i for i, _ in found]), np.array([value for _, value in found]))
        for key, found in points.items()
        if found
    }
    if not curves:
        raise MetricsError(
            f"{path} holds no line of Detectron2's metrics; a training writes its first after 20 "
            "iterations."
        )
    return curves


def name_runs(paths: Sequence[str]) -> list[str]:
    """The runs' folders, each by as little of its path as tells it from the others.

    Raises:
        MetricsError: the same run is given twice.
    """
    folders = [
        os.path.dirname(path) if os.path.basename(path) == FILE_NAME else path
        for path in map(os.path.abspath, paths)
    ]
    for folder in folders:
        if folders.count(folder) > 1:
            raise MetricsError(f"{folder} is given twice.")
    parts = [folder.strip(os.sep).split(os.sep) for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = [os.sep.join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def choose_keys(runs: Sequence[Run], patterns: Sequence[str] = ()) -> list[str]:
    """Which metrics to draw.

    Args:
        runs: the keys of all together can be chosen.
        patterns: names or patterns like "bbox/AP*", in the order wanted. None: the losses, the
            learning rate, the main results of evaluations, and the mean offsets of the last layers.

    Raises:
        MetricsError: a pattern fits nothing; too many keys.
    """
    known = sorted({key for run in runs for key in run}, key=_natural_order)
    chosen: list[str] = []
    for pattern in patterns:
        found = fnmatch.filter(known, pattern)
        if not found:
            raise MetricsError(f"--keys: no run has {pattern}; there are {', '.join(known)}.")
        chosen += found
    if not patterns:
        for expression in DEFAULT_KEYS:
            chosen += [key for key in known if re.fullmatch(expression, key)]
        offsets = [key for key in known if re.fullmatch(OFFSET_KEY, key)]
        chosen += offsets[-MAX_OFFSET_LAYERS:]
        chosen = chosen or known
    chosen = list(dict.fromkeys(chosen))
    if len(chosen) > MAX_PANELS:
        raise MetricsError(
            f"--keys: {len(chosen)} metrics are more than one figure holds ({MAX_PANELS}); name "
            "fewer."
        )
    return chosen


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over ``window`` neighbours, centred; near the ends over fewer, as many each side.

    Args:
        values: float64 (n,).
        window: odd.
    """
    last = len(values) - 1
    reaches = [min(place, last - place, window // 2) for place in range(len(values))]
    return np.array([values[i - r : i + r + 1].mean() for i, r in enumerate(reaches)])


def draw_training_curves(runs: Mapping[str, Run], keys: Sequence[str], window: int = 9) -> Figure:
    """Draws a panel for each metric, with a line for each run.

    Args:
        runs: by the name for the legend.
        keys: the metrics, of :func:`choose_keys`.
        window: written points that a smoothed line averages over, odd; 1 smooths nothing. What was
            written lies pale behind it. Short curves and the learning rate are left as they are.

    Returns:
        The figure, for its ``savefig``.
    """
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    legend_columns = max(1, min(len(runs), round(110 * columns / 3 / _longest(runs))))
    legend_height = 0.25 * -(-len(runs) // legend_columns) + 0.15
    size = (4.6 * columns, 2.7 * rows + legend_height)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(keys) :]:
        panel.remove()
    end = max(int(curve.iterations[-1]) for run in runs.values() for curve in run.values())
    handles = [Line2D([], [], lw=2, label=name, **_style(i)) for i, name in enumerate(runs)]
    for panel, key in zip(panels, keys, strict=False):
        for i, run in enumerate(runs.values()):
            if key in run:
                _draw_curve(panel, run[key], 1 if key == "lr" else window, _style(i))
        panel.set_title(_shorten(key), fontsize=10)
        panel.set_xlim(-0.03 * end, 1.06 * end)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.grid(alpha=0.25)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    for panel in panels[max(len(keys) - columns, 0) : len(keys)]:
        panel.set_xlabel("iteration")
    figure.legend(handles=handles, loc="outside lower center", ncols=legend_columns, frameon=False)
    return figure


def _draw_curve(panel: Axes, curve: Curve, window: int, style: dict[str, Any]) -> None:
    iterations, values = curve
    marker = "o" if len(values) <= MARKED_POINTS else None
    if window > 1 and len(values) >= POINTS_A_WINDOW * window:
        panel.plot(iterations, values, color=style["color"], lw=0.7, alpha=0.3)
        values = smooth(values, window)
    panel.plot(iterations, values, lw=1.5, marker=marker, ms=3.5, **style)
    if len(values) == 1:  # an evaluation at the end of the training
        panel.annotate(
            f"{values[0]:.4g}",
            (iterations[0], values[0]),
            xytext=(-6, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=9,
            color=style["color"],
        )


def _style(place: int) -> dict[str, Any]:
    line_style = LINE_STYLES[place // len(COLOURS) % len(LINE_STYLES)]
    return {"color": COLOURS[place % len(COLOURS)], "ls": line_style}


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_metrics = isinstance(record, dict) and isinstance(record.get("iteration"), int)
    return record if is_metrics else None


def _forget_from(points: dict[str, list[tuple[int, float]]], iteration: int) -> None:
    for key, found in points.items():
        points[key] = [point for point in found if point[0] < iteration]


def _natural_order(key: str) -> list[tuple[bool, int, str]]:
    """ "res5.2" before "res5.10"."""
    parts = re.split(r"(\d+)", key)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _shorten(key: str, length: int = 46) -> str:
    """Long names lose their beginning, for layers differ at their end."""
    return key if len(key) <= length else f"…{key[1 - length :]}"


def _longest(runs: Mapping[str, Run]) -> int:
    return max(len(name) for name in runs) + 8
