"""Pictures with titles, in rows, as one picture."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["PANEL_SIDE", "arrange_panels"]

PANEL_SIDE = 480  # pixels of a panel's longer side
GAP = 12  # pixels between panels and around them
LINE_HEIGHT = 20  # pixels of a line of a title
LETTER_WIDTH = 7.7  # pixels, of the widest lines seen
DPI = 100

Row = dict[str, np.ndarray]
"""Panels, uint8 (H, W, 3), RGB, by their titles, which may have several lines."""


def arrange_panels(rows: Sequence[Row]) -> np.ndarray:
    """Puts panels side by side, each under its title, and rows one below the other.

    Returns:
        uint8 picture, RGB, white where there is no panel.
    """
    rows = [{_wrap(title, one.shape[1]): one for title, one in row.items()} for row in rows]
    heights = [_title_height(row) + max(one.shape[0] for one in row.values()) for row in rows]
    height = sum(heights) + GAP * len(rows)
    width = max(sum(panel.shape[1] + GAP for panel in row.values()) for row in rows) + GAP
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    top = height  # matplotlib counts from below
    for row, row_height in zip(rows, heights, strict=True):
        left = GAP
        for title, panel in row.items():
            title_height = _title_height(row)
            figure.figimage(panel, left, top - title_height - panel.shape[0])
            middle = (left + panel.shape[1] / 2) / width, (top - title_height / 2) / height
            figure.text(*middle, title, ha="center", va="center", fontsize=11, linespacing=1.15)
            left += panel.shape[1] + GAP
        top -= row_height + GAP
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _wrap(title: str, width: int) -> str:
    letters = max(int(width / LETTER_WIDTH), 20)
    return "\n".join(textwrap.fill(line, letters) for line in title.split("\n"))


def _title_height(row: Row) -> int:
    return 8 + LINE_HEIGHT * max(title.count("\n") + 1 for title in row)
